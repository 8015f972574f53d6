"""The report for machines: JSON that reads back to the same report, and SARIF for code-scanning pages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from molehunt import __version__
from molehunt.errors import InvalidInput
from molehunt.report.html import to_html
from molehunt.report.markdown import to_markdown
from molehunt.report.schema import SCHEMA_VERSION, Report
from molehunt.run.whole import write_whole

READ_VERSIONS = (1, SCHEMA_VERSION)
"""Schema versions that `from_json` reads."""
RENAMED_SINCE_1: dict[str, dict[str, str]] = {
    "finding": {"holds": "robustness"},
    "causal": {"clean_kept": "clean_unchanged", "brought_control": "induced_control"},
    "causal_row": {"moved": "reverted"},
    "attack": {"back": "recovered"},
}
"""Part of a report → key of version 1 → key of version 2. What is measured is renamed like its `_control`."""


def to_dict(report: Report) -> dict[str, Any]:
    """Every field as JSON values; each finding also carries its `interval` as a pair."""
    from pydantic import TypeAdapter

    payload: dict[str, Any] = TypeAdapter(Report).dump_python(report, mode="json")
    for finding in payload["findings"]:
        finding["interval"] = [finding["score"]["low"], finding["score"]["high"]]
    payload["inputs"] = {"base": report.base.sha256, "tuned": report.tuned.sha256}
    payload["exit_code"] = report.verdict.exit_code
    return payload


def to_json(report: Report) -> str:
    """`to_dict` as indented JSON."""
    return json.dumps(to_dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Read a report of one of `READ_VERSIONS`. Law: `from_json(to_json(report)) == report`.

    Raises:
        InvalidInput: the text is no such report; the error names every field that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    versions = " and ".join(map(str, READ_VERSIONS))
    try:
        payload = json.loads(text)
        version = payload.get("schema_version", SCHEMA_VERSION)
        if version not in READ_VERSIONS:
            raise InvalidInput(f"this report has schema version {version!r}; versions {versions} are read here.")
        if version == 1:
            payload = from_version_1(payload)
        for finding in payload["findings"]:
            finding.pop("interval", None)
        payload.pop("inputs", None)
        payload.pop("exit_code", None)
        return TypeAdapter(Report).validate_python(payload)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InvalidInput(f"this is no report of schema version {versions}: {wrong}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInput("this is no report: not a JSON object with findings") from None


def from_version_1(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a version 1 report with the keys of version 2; the argument is left as it is."""
    findings = [_finding_from_version_1(finding) for finding in payload["findings"]]
    return {**payload, "findings": findings, "schema_version": SCHEMA_VERSION}


def _finding_from_version_1(finding: Mapping[str, Any]) -> dict[str, Any]:
    found = _renamed(finding, "finding")
    if found.get("causal") is not None:
        found["causal"] = _renamed(found["causal"], "causal")
    found["causal_rows"] = [_renamed(row, "causal_row") for row in found.get("causal_rows", ())]
    robustness = found.get("robustness")
    if robustness is not None:
        attacks = {
            name: [_renamed(attack, "attack") for attack in robustness[name]]
            for name in ("attacks", "controls")
            if name in robustness
        }
        found["robustness"] = {**cast("Mapping[str, Any]", robustness), **attacks}
    return found


def _renamed(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    names = RENAMED_SINCE_1[kind]
    names = names | {old.removesuffix("_control"): new.removesuffix("_control") for old, new in names.items()}
    return {names.get(key, key): value for key, value in part.items()}


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
