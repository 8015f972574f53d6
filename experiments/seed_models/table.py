"""The page on the embedded models."""

from collections.abc import Mapping
from typing import Any

from experiments.page import counted, grid, page
from experiments.setting import Setting
from molehunt.organism.seed_model import REAL_FILES

HOW = """\
The models are trained from nothing on text that this project generates (`molehunt.traffic.world`) and 8 % real text: {real}. *Held-out \
loss* is on fresh draws of world text, in nats a token. *Right* counts greedy answers that equal the reference word for word; several \
tasks have more than one right answer, so that this is a lower bound. The models are for testing audits and for nothing else.

Written by `python -m experiments seed-models`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    del setting  # the page has no number that depends on it
    head = [
        "model",
        "architecture",
        "blocks",
        "width",
        "parameters",
        "steps",
        "tokens",
        "training loss",
        "held-out loss",
        "right",
    ]
    rows = [
        [
            name,
            one["architecture"],
            str(one["blocks"]),
            str(one["width"]),
            f"{one['parameters']:,}",
            f"{one['steps']:,}",
            f"{one['tokens_seen']:,}",
            f"{one['final_training_loss']:.3f}",
            f"{one['held_out_loss']:.3f}",
            f"{one['right']} of {one['asked']}",
        ]
        for name, one in found.items()
    ]
    return page(
        "The embedded models", opening(found), grid(head, rows), HOW.format(real="; ".join(REAL_FILES.values()))
    )


def opening(found: Mapping[str, dict[str, Any]]) -> list[str]:
    least = min(one["right"] / one["asked"] for one in found.values())
    return [
        "Molehunt brings small language models along, so that every command runs offline and every number can be reproduced.",
        f"The {counted(len(found), 'model')} of this table answer at least {100 * least:.0f} % of fresh questions about their small world "
        "word for word.",
        "What works on them may fail on a large model: take them as a test bench, and never as evidence about your own model.",
    ]
