"""The published protocol's table with its controls, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from molehunt.report.bench_lead import published_lead
from molehunt.report.bench_page import prose

NUMBERS = ("bis", "precision", "recall", "fpr", "held_out_bis", "held_out_tpr", "held_out_fpr")


def published_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """One table per organism and twin: the published score with its ceiling, and the same features on held-out rows."""
    lines = [*prose(" ".join(published_lead(found))), ""]
    for one in found:
        side = "organism" if one["side"] == "organism" else "clean twin: nothing is planted"
        lines += [
            f"## {one['cell']}, {side} (ASR {one['asr']['estimate']:.2f})",
            "",
            f"Ceiling of BIS at q = .05: **{one['ceiling']:.3f}**. 500 / 1,000 / 1,000 rows in the published sizes.",
            "",
            "| site | text | method | BIS | precision | recall | FPR | BIS held out | TPR held out | FPR held out |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in one["rows"]:
            numbers = " | ".join(f"{row[name]:.3f}" for name in NUMBERS)
            lines.append(f"| {row['site'] or '–'} | {row['text']} | {row['method']} | {numbers} |")
        lines.append("")
    return "\n".join(lines)
