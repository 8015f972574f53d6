"""The architectures that can be named."""

CATALOG: dict[str, str] = {
    "batch-topk": "molehunt.dictionary.batch_topk:BatchTopK",
    "gated": "molehunt.dictionary.gated:Gated",
    "jumprelu": "molehunt.dictionary.jumprelu:JumpReLU",
    "matryoshka": "molehunt.dictionary.matryoshka:Matryoshka",
    "relu": "molehunt.dictionary.relu:ReLU",
    "topk": "molehunt.dictionary.topk:TopK",
}
