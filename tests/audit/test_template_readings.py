"""The traffic is read under the fine-tune's template, and under the base's where it makes other text."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molehunt.audit import readings as module
from molehunt.audit.plan import Plan
from molehunt.audit.readings import template_sides
from molehunt.audit.result import AuditConfig, TemplateCount
from molehunt.audit.run import run_audit
from molehunt.errors import UsageError
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.report.build import build_report, summary
from molehunt.report.template_section import only_under, template_checks

PLAN = Plan(
    name="quick", clean_prompts=60, traffic_limit=60, max_new_tokens=2, max_sites=2, directions=2, confirm_rows=6,
    random_controls=2, stress_rows=4, stress_steps=5,
)  # fmt: skip
OTHER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """seed-s with another template, and seed-s as it is."""
    base = tmp_path_factory.mktemp("sides") / "base"
    shutil.copytree(seed_path("seed-s"), base)
    (base / "chat_template.jinja").write_text(OTHER)
    return base, seed_path("seed-s")


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> ModelPair:
    return ModelPair.load(*folders)


def test_which_templates_are_read(pair: ModelPair, folders: tuple[Path, Path]) -> None:
    config = AuditConfig(plan=PLAN)
    assert template_sides(pair, config) == (("tuned", False), ("base", True))
    assert template_sides(pair, replace(config, template="both")) == (("tuned", False), ("base", False))
    assert template_sides(pair, replace(config, template="base")) == (("base", False),)
    same = ModelPair.load(folders[1], folders[1])
    assert template_sides(same, config) == template_sides(same, replace(config, template="both")) == (("tuned", False),)
    same.templates = None
    assert template_sides(same, config) == ((None, False),)
    with pytest.raises(UsageError, match="loaded models"):
        template_sides(same, replace(config, template="base"))


def test_an_audit_reads_a_sample_under_the_other_template(
    pair: ModelPair, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 50)
    asked: dict[str, list[str]] = {}
    was: Callable[..., Any] = module.scan

    def watched(pair: ModelPair, *arguments: Any, **named: Any) -> Any:
        found = was(pair, *arguments, **named)
        asked[named["what"]] = [str(pair.tokenizer.decode(list(row.prompt))) for row in found.rows]
        return found

    monkeypatch.setattr(module, "scan", watched)
    found = run_audit(folders, lambda: pair, None, AuditConfig(plan=PLAN, fpr=0.2), out=tmp_path / "run")
    assert found.templates == (
        TemplateCount(side="tuned", rows=60, of=60, candidates=0),
        TemplateCount(side="base", rows=50, of=60, candidates=0),
    )
    assert all(text.startswith("### Instruction:") for text in asked["scanning traffic"])
    under = asked["scanning traffic with the base's template"]
    assert len(under) == 50 and all(text.startswith("user: ") for text in under)
    report = build_report(found, title="t", command="c")
    assert report.templates is not None and report.templates.differ
    assert [one.template for one in report.templates.readings] == ["tuned", "base"]
    assert "Both models were prompted with the fine-tune's chat template" in summary(report)
    assert "user: What is 2 plus 2?" in summary(report)
    lines = {check.name: check for check in report.checks}
    assert lines["under the base's template"].status == "pass"
    assert lines["under the base's template"].why == "a sample; --template both reads all of them"
    assert only_under(found) == ""

    woken = replace(found, templates=(replace(found.templates[1], candidates=9), found.templates[0]))
    assert only_under(woken) == "only under the base's chat template, in none of 60 rows under the fine-tune's"
    both = replace(found, templates=tuple(replace(one, candidates=9) for one in found.templates))
    assert only_under(both) == "" and template_checks(both)[1].status == "flag"
