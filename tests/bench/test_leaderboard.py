"""The table from hand-made cells: every number is worked out here by hand."""

import csv
import io
import json
from typing import Any

import pytest

from molehunt.bench.leaderboard import leaderboard, to_csv


def rate(share: float | None) -> dict[str, Any] | None:
    return None if share is None else {"estimate": share, "low": 0.0, "high": 1.0, "n": 10}


def row(method: str, tpr: float, near: float | None = 0.0, twin: float | None = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "track": "R0", "rate": None, "method": method, "control": False, "where": "decision", "how": "max", "site": None,
        "tpr": rate(tpr), "tpr_strict": None, "near": rate(near), "clean": rate(0.01), "auroc": 0.9, "ap": 0.8, **more,
        **({} if twin is None else {"twin": rate(twin)}),
    }  # fmt: skip


def cell(name: str, *rows: dict[str, Any], attack: str = "refusal", causal: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {
        "cell": {"name": name, "attack": attack, "base": "seed-s", "regime": "full", "seed": 0},
        "asr": rate(0.9), "worst_near_miss": 0.1, "clean_loss_change": 0.2, "rows": list(rows), "causal": list(causal),
        "unit": f"units/{name}",
    }  # fmt: skip


def by_method(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {reported["method"]: reported for reported in board["rows"]}


def test_the_margin_subtracts_the_worse_of_look_alikes_and_twin_cell_by_cell() -> None:
    board = leaderboard("g", [cell("a", row("m", 0.9, 0.1, 0.4)), cell("b", row("m", 1.0, 0.2, 0.0))])
    (reported,) = board["rows"]
    assert reported["margin"]["estimate"] == pytest.approx((0.5 + 0.8) / 2) and reported["margin"]["n"] == 2
    assert reported["tpr"]["estimate"] == pytest.approx(0.95) and reported["near"]["estimate"] == pytest.approx(0.15)
    assert (reported["margin"]["low"], reported["margin"]["high"]) == pytest.approx((0.5, 0.8))
    assert reported["tpr_strict"] is None and reported["cells"] == 2


def test_what_was_not_measured_subtracts_nothing_and_is_no_zero() -> None:
    (reported,) = leaderboard("g", [cell("a", row("m", 0.7, None, None)), cell("b", row("m", 0.5, 0.1, None))])["rows"]
    assert reported["margin"]["estimate"] == pytest.approx((0.7 + 0.4) / 2)
    assert (
        reported["near"]["estimate"] == pytest.approx(0.1) and reported["near"]["n"] == 1 and reported["twin"] is None
    )


def test_ranks_follow_margins_and_their_intervals_hold_them() -> None:
    cells = [
        cell(str(i), row("best", 0.9), row("second", 0.8 + 0.11 * (i == 0)), row("last", 0.2, 0.1)) for i in range(6)
    ]
    board = leaderboard("g", cells)
    assert [reported["method"] for reported in board["rows"]] == ["best", "second", "last"]
    ranks = {method: reported["rank"] for method, reported in by_method(board).items()}
    assert [ranks[m]["estimate"] for m in ("best", "second", "last")] == [1, 2, 3]
    assert ranks["last"] == {"estimate": 3, "low": 3, "high": 3}
    for rank in ranks.values():
        assert rank["low"] <= rank["estimate"] <= rank["high"]


def test_methods_that_trade_places_share_their_rank_interval() -> None:
    cells = [cell(str(i), row("odd", float(i % 2)), row("even", float(i % 2 == 0))) for i in range(6)]
    for reported in leaderboard("g", cells)["rows"]:
        assert (reported["rank"]["low"], reported["rank"]["high"]) == (1, 2)


def test_tracks_are_ranked_apart_and_frequent_rates_come_first() -> None:
    rows = [
        row("m", 0.5), row("m", 0.4, track="R1", rate=0.001), row("m", 0.6, track="R1", rate=0.01),
        row("n", 0.1, track="R1", rate=0.01), row("m", 0.3, None, track="R2"),
    ]  # fmt: skip
    board = leaderboard("g", [cell("a", *rows)])
    reported = [(r["track"], r["rate"], r["method"], r["rank"]["estimate"]) for r in board["rows"]]
    assert reported == [
        ("R0", None, "m", 1),
        ("R1", 0.01, "m", 1),
        ("R1", 0.01, "n", 2),
        ("R1", 0.001, "m", 1),
        ("R2", None, "m", 1),
    ]


def test_an_attack_is_open_until_a_method_that_is_no_control_passes() -> None:
    solved = cell("a", row("m", 0.96, 0.04), row("c", 1.0, control=True), attack="solved")
    near = cell("b", row("m", 1.0, 0.2), row("c", 0.99, control=True), attack="near")
    weak = cell("c", row("m", 0.9), row("c", 0.1, control=True), attack="weak")
    reported = {one["attack"]: one for one in leaderboard("g", [solved, near, weak])["attacks"]}
    assert {attack: one["open"] for attack, one in reported.items()} == {"solved": False, "near": True, "weak": True}
    assert reported["solved"]["passing"] == {"decision": ["m (max)"], "generated": []}
    assert (
        reported["near"]["controls_passing"]["decision"]
        == ["c (max)"]
        == reported["solved"]["controls_passing"]["decision"]
    )
    assert reported["near"]["best"]["method"] == "m, decision max" and reported["near"]["best"]["tpr"] == 1.0


def test_a_pass_counts_on_the_mean_over_an_attacks_organisms() -> None:
    cells = [cell("a", row("m", 1.0)), cell("b", row("m", 0.92)), cell("x", row("m", 0.0), attack="other")]
    reported = {one["attack"]: one for one in leaderboard("g", cells)["attacks"]}
    assert not reported["refusal"]["open"] and reported["other"]["open"]


def test_causal_rows_are_averaged_and_sorted_by_what_is_left() -> None:
    def took(method: str, after: float) -> dict[str, Any]:
        return {"method": method, "site": "L0.resid", "directions": 2, "asr_before": rate(1.0), "asr_after": rate(after),
                "clean_loss_rise": 0.5}  # fmt: skip

    cells = [
        cell("a", row("m", 1), causal=(took("random", 0.9), took("m", 0.0))),
        cell("b", row("m", 1), causal=(took("m", 0.2),)),
    ]
    reported = leaderboard("g", cells)["causal"]
    assert [(one["method"], one["asr_after"]["estimate"], one["asr_after"]["n"]) for one in reported] == [
        ("m", 0.1, 2), ("random", 0.9, 1),
    ]  # fmt: skip


def test_layers_are_told_by_relative_depth() -> None:
    cells = [cell("a", row("m", 1, by_site=[0.0, 1.0])), cell("b", row("m", 1, by_site=[0.2, 0.4, 0.6, 0.8]))]
    reported = {one["depth"]: (one["tpr"], one["cells"]) for one in leaderboard("g", cells)["layers"]}
    assert reported == {0.25: (0.2, 1), 0.5: (0.2, 2), 0.75: (0.6, 1), 1.0: (0.9, 2)}


def test_the_board_is_json_and_csv_and_does_not_change() -> None:
    cells = [cell("a", row("m", 0.5), row('n, "x"', 0.4)), cell("b", row("m", 0.25))]
    board = leaderboard("g", cells)
    assert json.dumps(board, allow_nan=False) == json.dumps(leaderboard("g", cells))
    assert board["cells"][0]["folder"] == "organisms/a" and board["cells"][1]["unit"] == "units/b"
    rows = list(csv.DictReader(io.StringIO(to_csv(board))))
    found = {r["method"]: r for r in rows}
    assert found["m"]["tpr"] == "0.375" and found["m"]["tpr_low"] == "0.25" and found["m"]["tpr_strict"] == ""
    assert found['n, "x"']["cells"] == "1" and found['n, "x"']["rank"] == "1"
