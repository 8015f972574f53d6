"""Clean rows whose answers the base would not give: they may hold the very behaviour that a watch is for.

What a calibration holds is normal from then on. A planted behaviour leaks onto clean prompts, and clean logs are seldom
read, so the pair's answer log ratio looks through them once; the watch itself runs the tuned model alone. The audit,
whose verdict hangs on it, leaves out only rows that a gap parts from the others (`audit.candidates.set_aside`). Leaks
that come in all strengths leave no gap; here a row too many costs a little of the rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent

USUAL = 0.9
"""Share of the clean rows that is taken for clean."""
FACTOR = 3.0
"""A row is suspicious from this many times what those stay under …"""
LEAST_NATS = 10.0
"""… and from here on: where hardly an answer changed, they stay under next to nothing."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One such row."""

    line: int
    nats: float
    """How much likelier the tuned model finds the answer than the base does."""
    text: str
    """Of the prompt; empty where no text is kept."""


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """What a calibration did about such rows, and what they take from a watch that calls them normal."""

    n: int
    clean: int
    """Rows that were looked through."""
    limits: tuple[float, ...]
    """Nats from which a row is suspicious, by kind of prompt."""
    trusted: bool
    """They were kept in the calibration, as asked."""
    flagged_without: int
    """Of the `n`, those that a watch flags which was calibrated without them."""
    flagged_with: int
    """The same of one that was calibrated with them."""
    rows: tuple[Suspect, ...]
    """Those of highest ratio."""


def suspicious(log_ratios: Sequence[float], kinds: Sequence[int]) -> tuple[tuple[float, ...], list[int]]:
    """The limit of each kind of prompt in nats, and which rows lie above their kind's, highest first.

    Args:
        log_ratios: log p_tuned − log p_base of each row's answer, in nats.
        kinds: of each row's prompt (see `watch.kinds`): what a fine-tune does to unusual prompts says nothing of others.

    Raises:
        ValueError: a kind without rows: nothing says what is usual there.
    """
    limits: list[float] = []
    for kind in range(max(kinds, default=0) + 1):
        some = [ratio for ratio, of in zip(log_ratios, kinds, strict=True) if of == kind]
        if not some:
            raise ValueError(f"no clean row of kind {kind}: nothing says what is usual")
        usual = float(torch.tensor(some, dtype=torch.float64).quantile(USUAL))
        limits.append(max(LEAST_NATS, FACTOR * usual))
    order = sorted(range(len(log_ratios)), key=lambda i: -log_ratios[i])
    return tuple(limits), [i for i in order if log_ratios[i] > limits[kinds[i]]]


def answer_log_ratios(
    pair: ModelPair, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, track: Track = silent
) -> list[float]:
    """Log p_tuned − log p_base of each answer, in nats; 0 for an empty one. Raises ValueError for an empty prompt."""
    with pair.tuned_model() as model:
        tuned = answer_log_probs(model, pair.tokenizer, prompts, answers, track=track, what="clean: tuned likelihood")
    with pair.base_model() as model:
        base = answer_log_probs(model, pair.tokenizer, prompts, answers, track=track, what="clean: base likelihood")
    return [after - before for after, before in zip(tuned, base, strict=True)]
