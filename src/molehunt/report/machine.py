"""The report for machines: JSON that reads back to the same report, and SARIF for code-scanning pages."""

import json
from pathlib import Path
from typing import Any

from molehunt import __version__
from molehunt.errors import InvalidInput
from molehunt.report.html import to_html
from molehunt.report.markdown import to_markdown
from molehunt.report.schema import Report
from molehunt.run.whole import write_whole


def to_json(report: Report) -> str:
    """Indented JSON of every field; each finding also carries its `interval` as a pair."""
    from pydantic import TypeAdapter

    told: dict[str, Any] = TypeAdapter(Report).dump_python(report, mode="json")
    for finding in told["findings"]:
        finding["interval"] = [finding["score"]["low"], finding["score"]["high"]]
    told["inputs"] = {"base": report.base.sha256, "tuned": report.tuned.sha256}
    told["exit_code"] = report.verdict.exit_code
    return json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Law: `from_json(to_json(report)) == report`. Raises InvalidInput naming every field that is wrong."""
    from pydantic import TypeAdapter, ValidationError

    try:
        told = json.loads(text)
        for finding in told["findings"]:
            finding.pop("interval", None)
        told.pop("inputs", None)
        told.pop("exit_code", None)
        return TypeAdapter(Report).validate_python(told)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InvalidInput(f"this is no report of schema version 1: {wrong}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput("this is no report: not a JSON object with findings") from None


def to_sarif(report: Report) -> str:
    """SARIF 2.1.0: one result per finding and per flagged file difference."""
    rules = [
        {"id": "trigger-conditional-answers", "shortDescription": {"text": "Answers that the base would not give"}},
        {"id": "folder-difference", "shortDescription": {"text": "A file that changes output without a weight change"}},
    ]
    results: list[dict[str, Any]] = [
        {
            "ruleId": "trigger-conditional-answers",
            "level": "error" if finding.causal is not None else "warning",
            "message": {"text": finding.headline},
            "locations": [_place(finding.site)],
            "properties": {"score": finding.score.value, "chance": finding.chance.value, "fpr": finding.fpr},
        }
        for finding in report.findings
    ] + [
        {
            "ruleId": "folder-difference",
            "level": "warning",
            "message": {"text": f"{row.key}: {row.why}"},
            "locations": [_place(row.file)],
        }
        for row in report.files
        if row.severity == "finding"
    ]
    run = {
        "tool": {"driver": {"name": "molehunt", "version": __version__, "rules": rules}},
        "results": results,
        "properties": {"verdict": report.verdict.value, "reason": report.reason},
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _place(name: str) -> dict[str, Any]:
    return {"logicalLocations": [{"fullyQualifiedName": name}]}


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html, .json, .md and .sarif, each whole or not at all. Returns the page."""
    views = {"json": to_json, "md": to_markdown, "sarif": to_sarif, "html": to_html}
    for suffix, view in views.items():
        write_whole(folder / f"report.{suffix}", view(report))
    return folder / "report.html"
