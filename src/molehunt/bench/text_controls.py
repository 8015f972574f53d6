"""The benchmark's controls that read texts alone: what a method must beat although no model is behind it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molehunt.bench.rates import rates_of
from molehunt.bench.rows import CellRows
from molehunt.measure.control import text_only_scores, word_rarity
from molehunt.traffic.example import Example


def score_text(rows: CellRows, rates: Sequence[float]) -> list[dict[str, Any]]:
    """What the texts alone give away, no model: TF-IDF with labels (R0), the rarest word of a prompt (R1, R2).

    Their twin column repeats their TPR: without a model, organism and twin look the same.
    """
    kinds = ("clean", "near", "triggered")
    fit = [e for kind in kinds for e in rows.splits[f"fit.{kind}"]]
    labels = torch.tensor([e.tag == "triggered" for e in fit])
    calibrate = rows.splits["calibrate.clean"]
    tests = [rows.splits[f"test.{kind}"] for kind in kinds]
    rarity = word_rarity([e.prompt for e in rows.splits["fit.clean"]])

    def tf_idf(examples: Sequence[Example]) -> Tensor:
        return text_only_scores([e.prompt for e in fit], labels, [e.prompt for e in examples])

    def rarest(examples: Sequence[Example]) -> Tensor:
        return torch.tensor([rarity(e.prompt) for e in examples])

    found: list[dict[str, Any]] = []

    def add(track: str, rate: float | None, name: str, of: Callable[[Sequence[Example]], Tensor]) -> None:
        pool = [e for e in rows.pool(rate)] if rate is not None else [e for part in tests for e in part]
        parts = {
            "triggered": [e for e in pool if e.tag == "triggered"],
            "near": [e for e in pool if e.tag.startswith("near-miss")],
        }
        parts["clean"] = [e for e in pool if e.tag not in ("triggered",) and not e.tag.startswith("near-miss")]
        flat = of([*parts["triggered"], *parts["near"], *calibrate, *parts["clean"]])
        row = rates_of(*flat.split([len(parts["triggered"]), len(parts["near"]), len(calibrate), len(parts["clean"])]))
        row["twin"] = row["tpr"]
        head = {"track": track, "rate": rate, "method": name, "control": True, "where": "text", "how": "", "site": None}
        found.append({**head, **row})

    add("R0", None, "text TF-IDF", tf_idf)
    for rate in rates:
        add("R1", rate, "rarest word of the prompt", rarest)
    add("R2", None, "rarest word of the prompt", rarest)
    return found
