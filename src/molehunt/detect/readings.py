"""Both models' activations and scores on a set of rows, held in memory for many detectors to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.activation.shuffle import PairBatch
from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import How, Where, pool, positions
from molehunt.detect.reads import Reads, acts_of
from molehunt.detect.recipe import logit_detectors
from molehunt.model.batches import width_of
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.site import Site
from molehunt.traffic.example import Example

BATCH = 64
GENERATED_AT_ONCE = 256
"""Rows of one decoding batch: a step of a small model costs little more for 256 rows than for 64."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Readings:
    """Rows in the order given; activations in bf16, in batches of like length."""

    examples: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    """Greedy answers of the tuned model."""
    batches: tuple[Reading, ...]
    scores: Mapping[str, tuple[Float[Tensor, "_ _"], ...]]
    """Name of a logit detector → its scores, batch by batch: [batch, pos] of unlike sizes."""
    order: Int[Tensor, " rows"]
    """Row i of the batches, end to end, is row order[i]."""

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, n: int) -> "Readings":
        """The first `n` rows alone."""
        batches: list[Reading] = []
        scores: dict[str, list[Tensor]] = {name: [] for name in self.scores}
        order: list[Tensor] = []
        start = 0
        for i, reading in enumerate(self.batches):
            placed = self.order[start : start + len(reading.tokens)]
            start += len(reading.tokens)
            first = placed < n
            if not first.any():
                continue
            order.append(placed[first])
            batches.append(
                Reading(
                    tokens=reading.tokens[first],
                    mask=reading.mask[first],
                    decision=reading.decision[first],
                    tuned={site: acts[first] for site, acts in reading.tuned.items()},
                    base={site: acts[first] for site, acts in reading.base.items()},
                )
            )
            for name, values in self.scores.items():
                scores[name].append(values[i][first])
        return Readings(
            examples=self.examples[:n],
            prompts=self.prompts[:n],
            answers=self.answers[:n],
            batches=tuple(batches),
            scores={name: tuple(values) for name, values in scores.items()},
            order=torch.cat(order),
        )

    def pooled(self, detector: Detector, where: Where, how: How) -> Float[Tensor, " rows"]:
        """One score per row, in the order given."""
        stored = self.scores.get(detector.name)
        per_batch = [
            pool(stored[i] if stored is not None else detector.score(reading), reading, where, how)
            for i, reading in enumerate(self.batches)
        ]
        return self._in_order(torch.cat(per_batch))

    def acts(self, site: Site, reads: Reads, where: Where) -> Float[Tensor, "rows d_model"]:
        """Mean activation of each row over the positions that `where` names."""
        found: list[Tensor] = []
        for reading in self.batches:
            at = positions(reading, where).float()
            values = torch.einsum("bpd,bp->bd", acts_of(reading, site, reads), at)
            found.append(values / at.sum(1, keepdim=True).clamp_min(1))
        return self._in_order(torch.cat(found))

    def tokens(self, site: Site) -> PairBatch:
        """Both models' activations at every token but each row's first, which is a sink."""
        base: list[Tensor] = []
        tuned: list[Tensor] = []
        for reading in self.batches:
            at = reading.mask.clone()
            at[:, 0] = False  # rows are padded on the right
            base.append(reading.base[site][at])
            tuned.append(reading.tuned[site][at])
        return PairBatch(base=torch.cat(base), tuned=torch.cat(tuned))

    def _in_order(self, values: Tensor) -> Tensor:
        placed = torch.empty_like(values)
        placed[self.order] = values
        return placed


@torch.inference_mode()
def read_rows(
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    sites: Sequence[Site],
    max_new_tokens: int,
    detectors: Sequence[Detector] | None = None,
    track: Track = silent,
    what: str = "reading rows",
) -> Readings:
    """Let the tuned model answer each row greedily, then read both models over prompt and answer.

    Args:
        pair: the two models.
        examples: the rows.
        sites: where activations are stored.
        max_new_tokens: greatest number of tokens of an answer; 0 reads the prompts alone.
        detectors: detectors that read logits, which are too large to store: they score while the models run. By
            default those of the catalogue.
        track: shows rows.
        what: name of the work in the progress line.
    """
    chosen = logit_detectors() if detectors is None else detectors
    with counting(track, what, len(examples)) as done:
        return _readings(pair, examples, sites, max_new_tokens, chosen, done)


def _answers(pair: ModelPair, prompts: Sequence[list[int]], max_new_tokens: int, done: Tally) -> list[list[int]]:
    """Greedy answers of the tuned model; a row counts half for its answer."""
    if not max_new_tokens:
        done(len(prompts) / 2)
        return [[] for _ in prompts]
    with pair.tuned_model() as model:
        return generate(
            model,
            pair.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=GENERATED_AT_ONCE,
            track=within(done, len(prompts) / 2),
        )


def _readings(
    pair: ModelPair,
    examples: Sequence[Example],
    sites: Sequence[Site],
    max_new_tokens: int,
    detectors: Sequence[Detector],
    done: Tally,
) -> Readings:
    """The rows as `read_rows` gives them; a row counts half for its answer and half for its reading."""
    prompts = pair.tokenize([example.asked for example in examples], room=max_new_tokens)
    answers = _answers(pair, prompts, max_new_tokens, done)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    order = sorted(range(len(examples)), key=lambda i: lengths[i])
    batches: list[Reading] = []
    scores: dict[str, list[Tensor]] = {detector.name: [] for detector in detectors}
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        width = width_of(max(lengths[i] for i in group))
        reading = pair.read(
            [prompts[i] for i in group],
            [answers[i] for i in group],
            sites=sites,
            logits=bool(detectors),
            pad_to=width,
        )
        for detector in detectors:
            scores[detector.name].append(detector.score(reading).cpu())
        batches.append(
            Reading(
                tokens=reading.tokens.cpu(),
                mask=reading.mask.cpu(),
                decision=reading.decision.cpu(),
                tuned={site: acts.to("cpu", torch.bfloat16) for site, acts in reading.tuned.items()},
                base={site: acts.to("cpu", torch.bfloat16) for site, acts in reading.base.items()},
            )
        )
        done(len(group) / 2)
    return Readings(
        examples=tuple(examples),
        prompts=tuple(map(tuple, prompts)),
        answers=tuple(map(tuple, answers)),
        batches=tuple(batches),
        scores={name: tuple(values) for name, values in scores.items()},
        order=torch.tensor(order),
    )
