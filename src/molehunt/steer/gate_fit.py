"""Fit the condition under which a prompt is steered: a probe on half of the prompts, its threshold on the other half."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.measure.interval import Interval, proportion
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.contrast import last_token_acts
from molehunt.steer.prefill_gate import Condition, linear_score, prompt_scores
from molehunt.traffic.chat import Text


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedGate:
    """A condition, and how often it opens for prompts that did not fit it."""

    condition: Condition
    opens: Interval
    """Share of held-out prompts with the behaviour that the condition opens for."""


def fit_gate(
    pair: ModelPair,
    positive: Sequence[Text],
    negative: Sequence[Text],
    site: Site,
    *,
    fpr: float,
    seed: int = 0,
    track: Track = silent,
) -> FittedGate:
    """Fit a condition that opens for prompts with the behaviour, and for a share `fpr` of clean prompts at most.

    Args:
        pair: its tuned model is read.
        positive: prompts that trigger the behaviour. Half of them fit the probe; the other half say how often it opens.
        negative: clean prompts. Half of them fit the probe; the other half set the threshold.
        site: where prompts are read, at their last token.
        fpr: share of clean prompts that may be steered.
        seed: seed of the halves.
        track: shows progress.

    Raises:
        NotTestable: too few clean prompts for this rate.
        CannotTap: the model has no such site.
    """
    rng = Random(seed)
    halves = [rng.sample(rows, len(rows)) for rows in (list(positive), list(negative))]
    (fit_positive, test_positive), (fit_clean, held_out) = (
        (rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in halves
    )
    suspect, clean = (last_token_acts(pair, rows, [site], track=track)[site] for rows in (fit_positive, fit_clean))
    labels = torch.arange(len(suspect) + len(clean)) < len(suspect)
    probe = LogisticProbe.fit(site, torch.cat([suspect, clean]), labels)
    score = linear_score(probe.weight, probe.bias)
    with pair.tuned_model() as model:
        clean_scores, triggered_scores = (
            prompt_scores(
                model, pair.tokenize(rows), site, score, pooling="last", layers_path=pair.layers_path, track=track
            )
            for rows in (held_out, test_positive)
        )
    condition = Condition.calibrated(site, probe.weight, probe.bias, clean=clean_scores, fpr=fpr, pooling="last")
    opened = int((triggered_scores > condition.threshold).sum())
    return FittedGate(condition=condition, opens=proportion(opened, len(triggered_scores)))
