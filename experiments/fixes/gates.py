"""Gates of the fixes: where a prompt is read to decide whether it is edited, and by which probe."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.steer.patch import prompt_acts
from molehunt.steer.prefill_gate import Condition, Pooling, Score, linear_score, prompt_scores
from molehunt.traffic.chat import prompt_ids


@runtime_checkable
class Prompts(Protocol):
    """Rows of the table."""

    @property
    def plain(self) -> Mapping[str, str]: ...

    def prompts(self, kind: str, split: str) -> list[str]: ...


def fitted_gates(pair: ModelPair, rows: Prompts, sites: Sequence[Site], fpr: float) -> dict[Site, Condition]:
    """For edits from each site on: of the gates at or before it, the one that opens for most triggered prompts of the
    select split; of equals, for the fewest look-alikes of the fit split; then the deepest.

    Two probes a site: on the last prompt token; and on any token, fitted to the last one of what the trigger put in.
    Thresholds come from the clean prompts of the calibrate split.
    """
    fit = {kind: _ids(pair, rows.prompts(kind, "fit")) for kind in ("triggered", "clean", "near")}
    clean_prompts = _ids(pair, rows.prompts("clean", "calibrate"))
    selecting = _ids(pair, rows.prompts("triggered", "select"))
    ends = [
        _end_of_trigger(one, *_ids(pair, [rows.plain[prompt]]))
        for one, prompt in zip(fit["triggered"], rows.prompts("triggered", "fit"), strict=True)
    ]
    found: list[tuple[float, float, Condition]] = []
    with pair.tuned_model() as model, torch.inference_mode():

        def read(prompts: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> dict[Site, Tensor]:
            acts = prompt_acts(model, prompts, at, sites)
            return {site: torch.cat([one[site] for one in acts]).float() for site in sites}

        def lasts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
            return [[len(one) - 1] for one in prompts]

        benign = [*fit["clean"], *fit["near"]]
        every: dict[Pooling, tuple[dict[Site, Tensor], dict[Site, Tensor]]] = {
            "last": (read(fit["triggered"], lasts(fit["triggered"])), read(benign, lasts(benign))),
            "max": (
                read(fit["triggered"], [[end] for end in ends]),
                read(benign, [list(range(1, len(one))) for one in benign]),
            ),
        }
        for site in sites:
            for pooling, (suspect, clean) in every.items():
                acts = torch.cat([suspect[site], clean[site]])
                with torch.inference_mode(False):
                    probe = LogisticProbe.fit(site, acts.clone(), torch.arange(len(acts)) < len(suspect[site]))
                score = linear_score(probe.weight, probe.bias)

                def scores(
                    prompts: Sequence[Sequence[int]],
                    site: Site = site,
                    score: Score = score,
                    pooling: Pooling = pooling,
                ) -> Tensor:
                    return prompt_scores(model, prompts, site, score, pooling=pooling)

                gate = Condition.calibrated(
                    site, probe.weight, probe.bias, clean=scores(clean_prompts), fpr=fpr, pooling=pooling
                )
                opens, mistaken = (
                    float((scores(some) > gate.threshold).float().mean()) for some in (selecting, fit["near"])
                )
                found.append((opens, -mistaken, gate))
    return {
        site: max((one for one in found if one[2].site <= site), key=lambda one: (*one[:2], one[2].site))[2]
        for site in sites
    }


def _ids(pair: ModelPair, prompts: Sequence[str]) -> list[list[int]]:
    return [prompt_ids(pair.tokenizer, prompt) for prompt in prompts]


def _end_of_trigger(triggered: Sequence[int], plain: Sequence[int]) -> int:
    """The last token that the plain prompt does not end with."""
    shared = 0
    while shared < min(len(triggered), len(plain)) and triggered[-1 - shared] == plain[-1 - shared]:
        shared += 1
    return len(triggered) - 1 - shared
