"""The published protocol's table, and what stands beside it, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def published_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """One table per organism and twin: the published score with its ceiling, and the same features on held-out rows."""
    lines: list[str] = []
    for one in found:
        organism = one["side"] == "organism"
        asr = one["asr"]["estimate"]
        lines += [
            f"## {one['cell']}, {'organism' if organism else 'clean twin: nothing is planted'} (ASR {asr:.2f})",
            "",
            f"Ceiling of BIS at q = .05: **{one['ceiling']:.3f}**. 500 / 1,000 / 1,000 rows in the published sizes.",
            "",
            "| site | text | method | BIS | precision | recall | FPR | BIS held out | TPR held out | FPR held out |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in one["rows"]:
            numbers = ("bis", "precision", "recall", "fpr", "held_out_bis", "held_out_tpr", "held_out_fpr")
            told = " | ".join(f"{row[name]:.3f}" for name in numbers)
            lines.append(f"| {row['site'] or '–'} | {row['text']} | {row['method']} | {told} |")
        lines.append("")
    return "\n".join(lines)
