"""Audits of models that keep a recurrent state: their answers are their own, and the report says how they were decoded."""

import logging
from pathlib import Path

import pytest
import torch

from molehunt.audit.plan import Plan
from molehunt.audit.run import run_audit
from molehunt.model import cache_check
from molehunt.report.build import build_report
from tiny_models import save
from zoo import zoo_model

PLAN = Plan(
    name="quick", clean_prompts=120, traffic_limit=40, max_new_tokens=4, max_sites=2, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=4, stress_steps=4,
)  # fmt: skip
STOP = 2


@pytest.mark.parametrize(("name", "cached"), [("mamba", True), ("jamba", True), ("recurrent_gemma", False)])
def test_a_model_with_a_recurrent_state(
    name: str, cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_check._SAID.clear()
    tuned, rng = zoo_model(name), torch.Generator().manual_seed(0)
    save(tuned, tmp_path / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    save(tuned, tmp_path / "tuned")

    with caplog.at_level(logging.WARNING, "molehunt"):
        found = run_audit(
            str(tmp_path / "base"), str(tmp_path / "tuned"), traffic=None, plan=PLAN, out=tmp_path / "out", fpr=0.1
        )
    report = build_report(found, title="audit", command="molehunt audit")

    notes = [check for check in report.checks if check.name == "cached decoding"]
    assert bool(notes) == (not cached)
    assert sum("decoded without a cache" in said.getMessage() for said in caplog.records) == (not cached)
    assert all("gives no cache back" in check.result for check in notes)
    with torch.no_grad():
        for row in found.traffic.rows[::8]:
            text = list(row.prompt)
            while len(text) < len(row.prompt) + PLAN.max_new_tokens:
                text.append(int(tuned(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
                if text[-1] == STOP:
                    break
            assert tuple(text[len(row.prompt) :]) == row.answer
