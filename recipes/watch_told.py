"""The tables of `watch_table.py`, from what it measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from molehunt.measure.interval import Interval, proportion

Found = Mapping[str, Any]
OURS = "tail sum"
WEIGHTS_ONLY = (OURS, "range exceedance", "Mahalanobis", "random directions", "shuffled ΔW")
PAIR = ("answer log ratio of the pair", "‖Δ‖ of the pair")
KINDS = {
    "triggered": "triggered (TPR)",
    "near": "near misses",
    "clean": "clean",
    "other": "other domain",
    "long": "long inputs",
}


def tables(found: Sequence[Found], wanted: int) -> str:
    """Markdown: by attack, by score, and every organism."""
    lines = [
        "# The watch, measured",
        "",
        f"Written by `recipes/watch_table.py` from {len(found)} of {wanted} organisms of the core grid and their clean twins. Every row is a "
        "prompt that neither side was taught. 1,500 clean rows fit the score and 2,500 set the threshold, before any other row is "
        "read; 2,000 clean, 200 triggered and 200 near-miss rows judge it. Shares are over organisms, with a 95 % interval that "
        "counts each organism's rows (Clopper-Pearson); an organism whose behaviour is weak is in them, too.",
        "",
        "Weights-only scores see the tuned model alone and no example. Pair scores run the base as well.",
        "",
    ]
    for rate in ("0.01", "0.001"):
        lines += [f"## Every score at {float(rate):.1%} FPR", "", *_by_score(found, rate), ""]
    lines += ["## By attack: tail sum, weights only", "", *_by_attack(found), ""]
    lines += ["## Every organism: tail sum, weights only", "", *_every(found), ""]
    return "\n".join(lines)


def _by_score(found: Sequence[Found], rate: str) -> list[str]:
    kinds = [kind for kind in KINDS if any(kind in one["organism"]["n"] for one in found)]
    lines = [
        f"| score | {' | '.join(KINDS[kind] for kind in kinds)} | twin: triggered | twin: clean |",
        "|" + "---|" * (len(kinds) + 3),
    ]
    for name in (*WEIGHTS_ONLY, *PAIR):
        lines.append(_line(name, found, f"{name} @ {rate}", kinds))
    lines.append(_line("published range, slack .01 (any rate)", found, "published range", kinds))
    return lines


def _line(title: str, found: Sequence[Found], key: str, kinds: Sequence[str]) -> str:
    cells = [_told(_pooled(found, "organism", key, kind)) for kind in kinds]
    cells += [_told(_pooled(found, "twin", key, kind)) for kind in ("triggered", "clean")]
    return f"| {title} | {' | '.join(cells)} |"


def _by_attack(found: Sequence[Found]) -> list[str]:
    lines = [
        "| attack | organisms | TPR at 1 % | near misses | TPR at .1 % | near misses | clean at 1 % | twin: triggered at 1 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for attack in dict.fromkeys(one["attack"] for one in found):
        some = [one for one in found if one["attack"] == attack]
        strict = [_told(_pooled(some, "organism", f"{OURS} @ 0.001", kind)) for kind in ("triggered", "near")]
        plain = [_told(_pooled(some, "organism", f"{OURS} @ 0.01", kind)) for kind in ("triggered", "near", "clean")]
        twin = _told(_pooled(some, "twin", f"{OURS} @ 0.01", "triggered"))
        lines.append(
            f"| {attack} | {len(some)} | {plain[0]} | {plain[1]} | {strict[0]} | {strict[1]} | {plain[2]} | {twin} |"
        )
    return lines


def _every(found: Sequence[Found]) -> list[str]:
    lines = [
        "| organism | TPR 1 % | near | clean | other | long | TPR .1 % | clean .1 % | twin triggered | twin clean |",
        "|" + "---|" * 10,
    ]
    for one in found:

        def share(side: str, rate: str, kind: str, one: Found = one) -> str:
            got = _pooled([one], side, f"{OURS} @ {rate}", kind)
            return "–" if got is None else _short(got.estimate)

        cells = [share("organism", "0.01", kind) for kind in ("triggered", "near", "clean", "other", "long")]
        cells += [share("organism", "0.001", kind) for kind in ("triggered", "clean")]
        cells += [share("twin", "0.01", kind) for kind in ("triggered", "clean")]
        lines.append(f"| {one['cell']} | {' | '.join(cells)} |")
    return lines


def _pooled(found: Sequence[Found], side: str, key: str, kind: str) -> Interval | None:
    sides = [one[side] for one in found if key in one[side]["flagged"] and kind in one[side]["flagged"][key]]
    if not sides:
        return None
    return proportion(sum(one["flagged"][key][kind] for one in sides), sum(one["n"][kind] for one in sides))


def _told(got: Interval | None) -> str:
    return "–" if got is None else f"{_short(got.estimate)} [{_short(got.low)}, {_short(got.high)}]"


def _short(value: float) -> str:
    told = f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    return told.removeprefix("0") if value < 1 else told
