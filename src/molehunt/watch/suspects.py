"""Clean rows whose answers the base would not give: they may contain the very behaviour that a watch is for.

Whatever is calibrated on is normal from then on. A planted behaviour leaks onto clean prompts, and clean logs are seldom
read, so the pair's answer log ratio is computed for them once; the watch itself runs the tuned model alone. The audit,
whose verdict hangs on it, leaves out only rows that a gap parts from the others (`audit.candidates`). Leaks
that come in all strengths leave no gap; here a row too many costs a little of the rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent

CLEAN_QUANTILE = 0.9
"""Share of the clean rows that is assumed to be clean."""
FACTOR = 3.0
"""A row is suspicious above this many times the log ratio at that quantile …"""
LEAST_NATS = 10.0
"""… and above this log ratio: where hardly an answer changed, the quantile is close to 0."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One suspicious clean row."""

    line: int
    nats: float
    """Log ratio of the answer's probability under the tuned model and under the base."""
    text: str
    """Text of the prompt; empty where no text is kept."""


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """The suspicious clean rows of a calibration, and the effect of calibrating on them."""

    n: int
    """Number of suspicious rows."""
    clean: int
    """Number of clean rows that were checked."""
    limits: tuple[float, ...]
    """Log ratio in nats above which a row is suspicious, for each stratum of prompts."""
    trusted: bool
    """Whether they were calibrated on all the same, as `--trust-clean` requests."""
    flagged_without: int
    """Number of the `n` rows that a watch flags if it is calibrated without them."""
    flagged_with: int
    """Number of the `n` rows that a watch flags if it is calibrated with them."""
    rows: tuple[Suspect, ...]
    """The rows of highest log ratio."""


def suspicious(log_ratios: Sequence[float], strata: Sequence[int]) -> tuple[tuple[float, ...], list[int]]:
    """The limit of each stratum in nats, and the rows above the limit of their stratum, highest first.

    Args:
        log_ratios: log p_tuned − log p_base of each row's answer, in nats.
        strata: stratum of each row's prompt (see `watch.strata`): fine-tunes change unusual prompts differently.

    Raises:
        ValueError: a stratum has no rows.
    """
    limits: list[float] = []
    for stratum in range(max(strata, default=0) + 1):
        some = [ratio for ratio, of in zip(log_ratios, strata, strict=True) if of == stratum]
        if not some:
            raise ValueError(f"no clean row of stratum {stratum}: its limit is unknown")
        clean = float(torch.tensor(some, dtype=torch.float64).quantile(CLEAN_QUANTILE))
        limits.append(max(LEAST_NATS, FACTOR * clean))
    order = sorted(range(len(log_ratios)), key=lambda i: -log_ratios[i])
    return tuple(limits), [i for i in order if log_ratios[i] > limits[strata[i]]]


def answer_log_ratios(
    pair: ModelPair, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, track: Track = silent
) -> list[float]:
    """Log p_tuned − log p_base of each answer, in nats; 0 for an empty one. Raises ValueError for an empty prompt.

    An end of answers that only the fine-tune's vocabulary has is left out: the base cannot say it.
    """
    answers = [pair.vocabulary.without_end(answer) for answer in answers]
    with pair.tuned_model() as model:
        tuned = answer_log_probs(model, pair.tokenizer, prompts, answers, track=track, what="clean: tuned likelihood")
    with pair.base_model() as model:
        base = answer_log_probs(model, pair.tokenizer, prompts, answers, track=track, what="clean: base likelihood")
    return [after - before for after, before in zip(tuned, base, strict=True)]
