"""The detectors that can be named."""

CATALOG: dict[str, str] = {
    "answer-log-ratio": "molehunt.detect.token_kl:AnswerLogRatio",
    "delta-norm": "molehunt.detect.delta_norm:DeltaNorm",
    "delta-subspace": "molehunt.detect.delta_subspace:DeltaSubspace",
    "dictionary-latents": "molehunt.detect.dictionary_latents:DictionaryLatents",
    "logistic-probe": "molehunt.detect.logistic_probe:LogisticProbe",
    "logit-difference": "molehunt.detect.logit_difference:LogitDifference",
    "mahalanobis": "molehunt.detect.mahalanobis:Mahalanobis",
    "mean-difference": "molehunt.detect.mean_difference:MeanDifference",
    "token-kl": "molehunt.detect.token_kl:TokenKL",
    "weight-range": "molehunt.detect.weight_range:WeightRange",
}
