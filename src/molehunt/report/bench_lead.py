"""Three plain sentences that open each results page of the benchmark, for a reader who has to decide something."""

from collections.abc import Mapping, Sequence
from typing import Any

from molehunt.bench.rates import FPR
from molehunt.report.bench_text import Board, Row, attacks, groups, name, num, percent, worst

TRUSTED_MARGIN = 0.5
"""Margin over look-alikes and the clean twin from which a method without labels is worth its alarms."""


def board_lead(board: Board) -> tuple[str, str, str]:
    """What a leaderboard means: with examples of the behaviour, without any, and how far to trust it."""
    return _with_examples(board), _without_examples(board), _trust(board)


def _with_examples(board: Board) -> str:
    found = attacks(board)
    if not found:
        return "This benchmark ran no attack, so it supports no decision about hidden behaviour."
    solved = [one for one in found if not one.open]
    return (
        f"Whoever has examples of a hidden behaviour can build a detector for it: on {len(solved)} of {len(found)} "
        "attacks at least one method found nearly every use of the trigger and rarely flagged prompts that only look "
        "like it."
    )


def _without_examples(board: Board) -> str:
    best = [row for group in groups(board) if group.track in ("R1", "R2") if (row := _best(group.rows)) is not None]
    if not best:
        return "No method was tried without examples, which is the usual case."
    rates = [(num(row["tpr"]) or 0.0, worst(row) or 0.0) for row in best]
    methods = list(dict.fromkeys(name(row["method"]) for row in best))
    named = methods[0] if len(methods) == 1 else f"{', '.join(methods[:-1])} or {methods[-1]}"
    lowest = min(rate for rate, _ in rates)
    highest = max(rate for _, rate in rates)
    advice = (
        f"use {named} first"
        if min(num(row["margin"]) or 0.0 for row in best) >= TRUSTED_MARGIN
        else f"no method is reliable there, and {named} does best"
    )
    return (
        f"Without any example, {advice}: at thresholds that flag {percent(FPR)} of ordinary prompts it found at least "
        f"{lowest:.0%} of the uses of a trigger, and it flagged at most {highest:.0%} of the prompts that look like one."
    )


def _trust(board: Board) -> str:
    found = attacks(board)
    shadowed = sum(bool(one.controls) for one in found)
    organisms = len(board["cells"])
    warning = (
        f"on {shadowed} of {len(found)} attacks a simple control that knows nothing of the fine-tune does as well at "
        "some position, so compare every row with the controls at the same position"
        if shadowed
        else "no control reaches the level that counts as solved"
    )
    return (
        f"These numbers come from {organisms} small models in which the behaviour was planted on purpose, and hold for "
        f"such models only; {warning}."
    )


def _best(rows: Sequence[Row]) -> Row | None:
    rated = [row for row in rows if not row["control"] and num(row.get("margin")) is not None]
    return max(rated, key=lambda row: num(row["margin"]) or 0.0) if rated else None


def published_lead(results: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """What the published protocol's table means: its ceiling, what reaches it, and what to use instead."""
    rows = [(result, row) for result in results for row in result["rows"] if row.get("text", "whole") == "whole"]
    top = max((result["ceiling"] for result in results), default=0.0)
    reach = [(result, row) for result, row in rows if row["bis"] >= 0.99 * result["ceiling"]]
    empty = [(result, row) for result, row in reach if result["side"] == "twin" or _untrained(row)]
    held = max((row["held_out_bis"] for _, row in rows), default=0.0)
    return (
        f"Do not choose a method by the published score (BIS): with its threshold it cannot exceed {top:.2f}, however "
        "good a method is.",
        f"{len(reach)} of {len(rows)} rows reach that limit, and {len(empty)} of these were measured on a model in which "
        "nothing is planted, on an untrained or random dictionary, or without any model.",
        f"The columns called “held out” can distinguish methods, because feature and threshold are chosen on other rows; "
        f"there the best row has {held:.2f} of 1.",
    )


def _untrained(row: Mapping[str, Any]) -> bool:
    return str(row["method"]).startswith(("no model", "untrained", "one random"))
