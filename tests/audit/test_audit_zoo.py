"""Audits of models that keep a recurrent state: their answers are their own, and the report says how they were decoded."""

import logging
from pathlib import Path

import pytest
import torch

from molehunt.audit.plan import PLANS, Plan
from molehunt.model import cache_check
from molehunt.workflows.audit import audit
from tiny_models import save
from zoo import zoo_model

PLAN = Plan(
    name="quick", clean_prompts=120, traffic_limit=40, max_new_tokens=4, max_sites=2, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=4, stress_steps=4,
)  # fmt: skip
STOP = 2


@pytest.mark.parametrize(("name", "cached"), [("mamba", True), ("jamba", True), ("recurrent_gemma", False)])
def test_a_model_with_a_recurrent_state(
    name: str, cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLANS, "quick", PLAN)
    cache_check._WARNED.clear()
    tuned, rng = zoo_model(name), torch.Generator().manual_seed(0)
    save(tuned, tmp_path / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    save(tuned, tmp_path / "tuned")

    with caplog.at_level(logging.WARNING, "molehunt"):
        found = audit(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "out", fpr=0.1)

    notes = [check for check in found.report.checks if check.name == "cached decoding"]
    assert bool(notes) == (not cached)
    assert sum("decoded without a cache" in record.getMessage() for record in caplog.records) == (not cached)
    assert all("gives no cache back" in check.result for check in notes)
    with torch.no_grad():
        for row in found.audit.traffic.rows[::8]:
            text = list(row.prompt)
            while len(text) < len(row.prompt) + PLAN.max_new_tokens:
                text.append(int(tuned(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
                if text[-1] == STOP:
                    break
            assert tuple(text[len(row.prompt) :]) == row.answer
