"""Are `molehunt files` and `molehunt directions` right about a pair of folders?"""

import re
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from experiments.what_is_read.case import Case, Saving
from experiments.what_is_read.cell import Cell, no_answer, wrong
from experiments.what_is_read.command import Ran, run
from experiments.what_is_read.planted import Change, changes

TINY = 1e-6
"""Norm of a change of small biases that rounding to fp16 explains: its spacing is constant below 6e-5."""


def check_files(case: Case, saving: Saving, *, no_decoder: bool) -> Cell:
    """No finding where only weights differ, and none for the copy; a finding or a refusal where loaders read nothing."""
    found: Cell | None = None
    for tuned in filter(None, (case.tuned, case.copy)):
        ran = run(["files", str(case.base), str(tuned), *case.options, "--json"])
        answer = no_answer(ran, "files", saving, no_decoder=no_decoder)
        if answer is None:
            answer = _judged(ran, saving, changed=tuned == case.tuned)
        if answer.status == "WRONG":
            return answer
        found = found or answer
    assert found is not None
    return found


def _judged(ran: Ran, saving: Saving, *, changed: bool) -> Cell:
    rows: list[Mapping[str, Any]] = ran.payload.get("rows", [])
    findings = [row for row in rows if row["severity"] == "finding"]
    said = [" ".join(str(row[key]) for key in ("file", "key", "why")) for row in findings]
    if bool(findings) != (ran.code == 1):
        return wrong(f"{len(findings)} findings and exit code {ran.code}", ran)
    if not saving.loads and changed and not findings:
        return wrong(f"NO FINDING, though {saving.why}", ran)
    strange = [text for text in said if not saving.finding or not re.search(saving.finding, text)]
    if strange:
        return wrong(f"{'a finding' if changed else 'the unchanged copy is a finding'}: {strange[0]}", ran)
    return Cell(status="works", why=f"finding: {said[0]}" if said else "")


def check_directions(case: Case, saving: Saving, *, no_decoder: bool) -> Cell:
    """The changed matrices and no others, each with its singular value; nothing for the copy."""
    ran = run(["directions", str(case.base), str(case.tuned), *case.options, "--all-matrices", "--json"])
    answer = no_answer(ran, "directions", saving, no_decoder=no_decoder)
    if answer is not None:
        return answer if answer.status == "WRONG" else _same_of_copy(case, saving, answer, no_decoder)
    truth = [
        one for one in changes(case.base_model, case.tuned_model) if one.rel_norm > saving.rounding and one.sigma > TINY
    ]
    payload = ran.payload
    rows: list[Mapping[str, Any]] = [*payload["matrices"], *payload["others"]]
    fault = differs(truth, rows, saving)
    if fault:
        return wrong(fault, ran)
    named = [row for row in rows if row["why"] and (row["status"] == "not testable" or row["rel_norm"] == 0)]
    why = f"named: {named[0]['tensor']}: {named[0]['why']}" if named else ""
    return _same_of_copy(case, saving, Cell(status="works", why=why), no_decoder)


def differs(truth: Sequence[Change], rows: Sequence[Mapping[str, Any]], saving: Saving) -> str:
    """Where rows and truth part; empty where they agree."""
    left = [row for row in rows if row["status"] == "changed"]
    for change in truth:
        row = next((row for row in left if fits(change, row, saving.tolerance)), None)
        if row is None:
            said = [f"{one['tensor']} {one['status']} {list(one['strengths'])[:1]}" for one in rows if of(change, one)]
            return f"missed {change.name} (σ {change.sigma:.4g}); it says {said[:3]}"
        left.remove(row)
    more = [row for row in left if beyond(row, saving)]
    if more:
        return f"says that {more[0]['tensor']} changed (‖ΔW‖/‖W‖ {more[0]['rel_norm']}), which it did not"
    return ""


def beyond(row: Mapping[str, Any], saving: Saving) -> bool:
    """Whether a row claims a change that rounding does not explain; added rows of a vocabulary are none of the shared ones."""
    rel = row["rel_norm"]
    return not (rel == 0 and row["why"]) and (rel is None or rel > saving.rounding)


def fits(change: Change, row: Mapping[str, Any], tolerance: float) -> bool:
    """Whether a row is this change: by its largest singular value, or by its norm where it has no singular values."""
    if row["layer"] is not None and row["layer"] != change.layer:
        return False
    if row["strengths"]:
        return abs(row["strengths"][0] - change.sigma) <= tolerance * change.sigma
    rel = row["rel_norm"]
    if change.rel_norm == inf:  # of zeros in the base
        return of(change, row) and rel is None
    return of(change, row) and rel is not None and abs(rel - change.rel_norm) <= tolerance * change.rel_norm


def of(change: Change, row: Mapping[str, Any]) -> bool:
    """Whether a row's name can be the change's: the same block and the same last part."""
    ours, theirs = (name.removesuffix(".weight").rpartition(".")[2] for name in (change.name, row["tensor"]))
    layer = re.search(r"\.(\d+)\.", row["tensor"])
    return ours == theirs and (int(layer[1]) if layer else None) == change.layer


def _same_of_copy(case: Case, saving: Saving, answer: Cell, no_decoder: bool) -> Cell:
    """The answer for the changed folder, if the unchanged copy is called unchanged, too."""
    if case.copy is None:
        return answer
    ran = run(["directions", str(case.base), str(case.copy), *case.options, "--all-matrices", "--json"])
    refused = no_answer(ran, "directions", saving, no_decoder=no_decoder)
    if refused is not None:
        same = refused.status == answer.status
        return answer if same else wrong(f"the unchanged copy: {refused.why}", ran)
    rows: list[Mapping[str, Any]] = [*ran.payload["matrices"], *ran.payload["others"]]
    changed = [row for row in rows if row["status"] == "changed" and beyond(row, saving)]
    if changed:
        return wrong(f"the unchanged copy changed in {changed[0]['tensor']}", ran)
    if not saving.rounding and ran.code == 3 and not answer.why:
        return wrong(f"the unchanged copy: {ran.payload.get('why')}", ran)
    return answer
