"""Do `ModelPair.load`, `molehunt audit` and `molehunt watch` read the weights that transformers and PEFT load?"""

import importlib
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.what_is_read.alphabet import ROWS, write_rows
from experiments.what_is_read.case import Case, Saving
from experiments.what_is_read.cell import Cell, no_answer, wrong
from experiments.what_is_read.command import Ran, run, small_audits
from experiments.what_is_read.planted import logits_of
from experiments.what_is_read.zoo import VOCAB
from molehunt.errors import MolehuntError, NotTestable
from molehunt.model.pair import ModelPair

VERDICTS = ("NO FINDING", "FLAGGED-CAUSAL", "FLAGGED-CORRELATIONAL", "UNSTABLE", "NOT TESTABLE")
LOGGED, CLEAN = 50, 200


MIXERS_ALONE = "The fine-tune changed only mix_in"
"""What the watch says of a state-space model whose adapter reaches no matrix that writes: these are no linear modules."""


def check_read(case: Case, saving: Saving, *, no_decoder: bool) -> Cell:
    """Logits of both sides are those of the models in memory, which are those that transformers and PEFT load."""
    adapter = {"--adapter": True, "--no-adapter": False}.get("".join(case.options))
    try:
        pair = ModelPair.load(str(case.base), str(case.tuned), adapter=adapter)
        reading = pair.read([list(row) for row in ROWS], logits=True)
    except MolehuntError as error:
        ran = Ran(
            words=("(ModelPair.load)",), code=error.exit_code, out=json.dumps({"error": str(error)}), err=str(error)
        )
        answer = no_answer(ran, "read", saving, no_decoder=no_decoder)
        assert answer is not None, NotTestable
        return answer
    except Exception:
        ran = Ran(words=("(ModelPair.load)",), code=70, out="", err=traceback.format_exc())
        return wrong(f"traceback: {ran.last_line}", ran)
    if no_decoder:
        return Cell(status="WRONG", why="an encoder or encoder–decoder was read as a decoder")
    if not saving.loads:
        return Cell(status="WRONG", why=f"it was read, though {saving.why}")
    tuned, loaded = logits_of(case.running or case.tuned_model, ROWS), direct_logits(case)
    if loaded is not None and not saving.runs_rounded and apart(loaded, tuned) > saving.close:
        return Cell(status="WRONG", why=f"this cell's own truth: loaders are off by {apart(loaded, tuned):.3g}")
    sides = (
        ("base", real(reading.base_logits, reading.mask), logits_of(case.base_model, ROWS)),
        ("fine-tune", real(reading.tuned_logits, reading.mask), tuned if loaded is None else loaded),
    )
    for side, logits, truth in sides[saving.runs_rounded :]:
        if apart(logits, truth) > saving.close:
            return Cell(status="WRONG", why=f"the logits of the {side} are off by {apart(logits, truth):.3g}")
    return Cell(status="works")


def real(found: Tensor | None, mask: Tensor) -> list[Tensor]:
    """The logits of each row without its padding."""
    assert found is not None
    return [logits[kept.bool()].float() for logits, kept in zip(found, mask, strict=True)]


def apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest difference of two logits, relative to the truth's size, over the tokenizer's own tokens."""
    worst = 0.0
    for ours, theirs in zip(found, truth, strict=True):
        columns = min(ours.shape[-1], theirs.shape[-1], VOCAB)  # a grown vocabulary's new tokens may be masked
        gap = (ours[:, :columns] - theirs[:, :columns]).abs().max()
        worst = max(worst, float(gap / theirs.abs().max().clamp(min=1)))
    return worst


def direct_logits(case: Case) -> list[Tensor] | None:
    """Logits of the fine-tune as transformers and PEFT load it; None where they cannot."""
    hf: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    tuned = case.tuned
    is_adapter = (tuned / "adapter_config.json").is_file()
    if "--no-adapter" in case.options:
        return None  # transformers applies an adapter beside weights by itself
    whole = tuned if (tuned / "model.safetensors").is_file() or not is_adapter else case.base
    try:
        gguf = next((file.name for file in whole.glob("*.gguf")), None)
        options = {} if gguf is None else {"gguf_file": gguf}
        model = hf.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, **options)
        if is_adapter and whole != tuned:
            model = peft.PeftModel.from_pretrained(model, tuned)
        return logits_of(cast("nn.Module", model).eval(), ROWS)
    except Exception:  # whatever they cannot load is no truth to compare with
        return None


def check_audit(case: Case, saving: Saving, folder: Path, *, no_decoder: bool) -> Cell:
    """The audit comes to a verdict, or says why it cannot."""
    traffic = write_rows(folder / "traffic.jsonl", LOGGED, seed=1)
    words = ["audit", str(case.base), str(case.tuned), "--traffic", str(traffic), "--fpr", "0.1", *case.options]
    with small_audits():
        ran = run([*words, "--out", str(folder / "audit"), "--json"])
    answer = no_answer(ran, "audit", saving, no_decoder=no_decoder)
    if answer is not None:
        return answer
    verdict = ran.payload.get("verdict")
    if verdict not in VERDICTS or ran.payload.get("exit_code", ran.code) != ran.code:
        return wrong(f"the verdict {verdict!r} with exit code {ran.code}", ran)
    if not (folder / "audit" / "report.html").is_file():
        return wrong("no report was written", ran)
    strengths = sorted(float(one["strength"]) for one in ran.payload["directions"])
    return Cell(status="works", numbers=(float(ran.payload["calibration"]["threshold"]), *strengths))


def check_watch(case: Case, saving: Saving, folder: Path, *, no_decoder: bool) -> Cell:
    """The watch is calibrated and judges each row, or says why it cannot."""
    log = write_rows(folder / "log.jsonl", LOGGED, seed=2, answers=True)
    clean = write_rows(folder / "clean.jsonl", CLEAN, seed=3, answers=True)
    words = ["watch", str(case.base), str(case.tuned), "--traffic", str(log), "--clean", str(clean)]
    words += ["--fpr", "0.1", "--clean-rows", str(CLEAN), "--max-new-tokens", "3", *case.options]
    ran = run([*words, "--out", str(folder / "watch"), "--json"])
    if ran.code == 3 and MIXERS_ALONE in ran.reason:
        return Cell(status="NOT TESTABLE", why=ran.reason)
    answer = no_answer(ran, "watch", saving, no_decoder=no_decoder)
    if answer is not None:
        return answer
    verdicts = folder / "watch" / "verdicts.jsonl"
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()] if verdicts.is_file() else []
    if len(rows) != LOGGED or any(row["coverage"] < 1 for row in rows):
        return wrong(f"{len(rows)} of {LOGGED} rows were judged, or some in part", ran)
    return Cell(status="works", numbers=tuple(float(row["score"]) for row in rows))
