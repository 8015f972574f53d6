"""Calibrate a watch: fit a monitor on half of the clean rows, and set its false-alarm rate on the other half."""

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

import numpy as np
import torch

from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.traffic.split import Calibrate, Fit
from molehunt.traffic.stream import Conversation
from molehunt.watch.alert import Extreme
from molehunt.watch.bank import Bank
from molehunt.watch.drift import DriftMartingale, reference_margin
from molehunt.watch.judge import read_answers
from molehunt.watch.monitor import Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.state import WatchState
from molehunt.watch.suspects import Suspect, Suspects, answer_log_ratios, suspicious

DRIFT_LEVEL = 0.01
"""Chance of ever calling unchanged traffic changed."""
EXTREMES = 16
"""Number of the top-scoring calibration rows, and of suspicious rows, that are remembered to compare alerts with."""
LONGEST_TEXT = 400
"""Characters of such a row that are kept at most."""


def calibrate(
    pair: ModelPair,
    bank: Bank,
    clean: Sequence[Conversation],
    *,
    fpr: float,
    identity: Mapping[str, str],
    max_new_tokens: int,
    seed: int,
    trust: bool = False,
    no_text: bool = False,
    track: Track = silent,
) -> WatchState:
    """Fit a monitor on half of the clean rows and set its rate on the other half.

    Args:
        identity: what the state depends on, see `state.identify`.
        trust: calibrate also on rows whose answers the base would not give; else these are excluded (see
            `watch.suspects`).
        no_text: whether the state remembers nothing of what the rows say.

    Raises:
        NotTestable: too few clean rows for `fpr`: the monitor abstains rather than guess.
    """
    rows = list(clean)
    Random(seed).shuffle(rows)
    read = read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what="clean")
    found = [profile for _, _, profile in read]
    ratios = answer_log_ratios(pair, [prompt.ids for prompt, _, _ in read], [a for _, a, _ in read], track=track)

    def text(i: int) -> str:
        return "" if no_text else rows[i].turns[-1].text[:LONGEST_TEXT]

    with_all = _fitted(found, (), fpr)
    strata = with_all[0].strata.of(torch.stack([one.prompt for one in found]))
    limits, excluded = suspicious(ratios, strata)
    without = _fitted(found, set(excluded), fpr) if excluded else with_all
    monitor, rate_rows = with_all if trust else without
    scores = monitor.scores([found[i] for i in rate_rows])
    return WatchState(
        identity=identity,
        monitor=monitor,
        extremes=tuple(
            Extreme(score=float(scores[i]), text=text(rate_rows[i]))
            for i in scores.argsort(descending=True)[:EXTREMES].tolist()
        ),
        suspects=Suspects(
            n=len(excluded),
            clean=len(found),
            limits=limits,
            trusted=trust,
            flagged_without=_flagged(without[0], found, excluded),
            flagged_with=_flagged(with_all[0], found, excluded),
            rows=_remembered(rows, ratios, excluded, text),
        ),
        drift=_drift(int((scores <= monitor.threshold).sum())),
        rng=np.random.default_rng(seed),
    )


def _fitted(found: Sequence[Profile], excluded: Collection[int], fpr: float) -> tuple[Monitor, list[int]]:
    """A monitor of all rows but the excluded ones, and the indices of the rows that set its rate."""
    half = len(found) // 2
    fit, rate_rows = ([i for i in part if i not in excluded] for part in (range(half), range(half, len(found))))
    fit_split, calibrate_split = Fit(tuple(found[i] for i in fit)), Calibrate(tuple(found[i] for i in rate_rows))
    return Monitor.fit(fit_split, calibrate_split, fpr=fpr), rate_rows


def _flagged(monitor: Monitor, found: Sequence[Profile], rows: Sequence[int]) -> int:
    return int((monitor.scores([found[i] for i in rows]) > monitor.threshold).sum())


def _remembered(
    rows: Sequence[Conversation], ratios: Sequence[float], excluded: Sequence[int], text: Callable[[int], str]
) -> tuple[Suspect, ...]:
    return tuple(Suspect(line=rows[i].line, nats=ratios[i], text=text(i)) for i in excluded[:EXTREMES])


def _drift(unflagged: int) -> DriftMartingale:
    """A drift test against a reference of so many unflagged calibration rows."""
    return DriftMartingale(level=DRIFT_LEVEL / 2, margin=reference_margin(unflagged, DRIFT_LEVEL / 2))
