"""`--reference`: a harmless fine-tune of the same base takes the base's place where answers are compared."""

from pathlib import Path

import pytest
import torch
from test_audit_end_to_end import TINY, audit, shaken

import molehunt as api
from folders import good_folder, lora_folder
from molehunt.audit.plan import PLANS
from molehunt.errors import NotTestable
from molehunt.model.pair import ModelPair
from tiny_models import prompts

PROMPTS = prompts(lengths=(3, 9, 5))


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "quick", TINY)


def logits(pair: ModelPair, model: str) -> torch.Tensor:
    with pair.base_model() if model == "base" else pair.tuned_model() as module, torch.no_grad():
        return module(torch.tensor([PROMPTS[1]]), use_cache=False).logits


def test_against_its_own_equal_a_fine_tune_does_nothing(tmp_path: Path, tiny_plan: None) -> None:
    base = good_folder(tmp_path / "base")
    tuned = shaken(base, tmp_path / "tuned", 0.02)
    equal = shaken(base, tmp_path / "equal", 0.02)
    result = api.audit(base, tuned, reference=equal, out=tmp_path / "run")
    plain = api.audit(base, tuned, out=tmp_path / "plain").to_dict()
    beside = result.to_dict()
    assert beside["verdict"] == "NO FINDING"
    assert beside["inventory"]["same"] == beside["inventory"]["rows"] > plain["inventory"]["same"]
    assert beside["spectra"] == plain["spectra"], "weights are compared with the base's all the same"
    (said,) = (one["result"] for one in beside["checks"] if one["name"] == "answers")
    assert "compared with those of equal, not of the base" in said
    assert f"--reference {equal}" in result.report.reproduce


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_stands_on_its_own_base(tmp_path: Path, whole: bool) -> None:
    """Not on the sibling: the pair is the sibling and the merged adapter, whether the sibling is an adapter or a model."""
    base, adapter = good_folder(tmp_path / "base"), lora_folder(tmp_path / "lora")
    sibling = shaken(base, tmp_path / "sibling", 0.02) if whole else lora_folder(tmp_path / "sibling", seed=9)
    pair, other = ModelPair.load(base, adapter), ModelPair.load(base, sibling)
    wanted = logits(other, "tuned"), logits(pair, "tuned")
    beside = pair.beside(other)
    for found, one in zip((logits(beside, "base"), logits(beside, "tuned")), wanted, strict=True):
        torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*wanted)
    assert beside.folders == pair.folders


def test_a_reference_of_another_base_is_refused(
    tmp_path: Path, tiny_plan: None, capsys: pytest.CaptureFixture[str]
) -> None:
    base, stranger = good_folder(tmp_path / "base"), good_folder(tmp_path / "stranger", seed=5)
    tuned = shaken(base, tmp_path / "tuned", 0.002)
    code = audit(str(base), str(tuned), "--reference", str(stranger), "--out", str(tmp_path / "run"))
    assert code == NotTestable("").exit_code
    said = capsys.readouterr().err
    assert "stranger" in said and "Traceback" not in said


def test_a_reference_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = good_folder(tmp_path / "base")
    assert audit(str(base), str(base), "--reference", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")) == 2
    assert "nowhere" in capsys.readouterr().err
