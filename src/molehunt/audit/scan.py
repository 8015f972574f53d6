"""Run traffic through both models once and keep what every later step reads.

For each row: the tuned model's answer, how differently the two models continue at each of its tokens, and both
models' activations at two positions, the decision (last prompt token) and the peak (where they disagree most), and
their mean over the generated tokens.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.answering import Answering, drawn_answers, most_surprising
from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import positions
from molehunt.detect.recipe import GROUP, detector_recipes, unfitted
from molehunt.detect.token_kl import AnswerLogRatio, TokenKL
from molehunt.model.batches import width_of
from molehunt.model.pair import ModelPair
from molehunt.run.catalog import installed
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.run.unit import Units, unit_key
from molehunt.site import Site
from molehunt.traffic.example import Example

KEPT = tuple(f"{model}.{position}" for model in ("tuned", "delta") for position in ("decision", "peak", "generated"))
"""Activations that are stored in bf16. Differences are taken before that: they are far smaller than what they differ in."""
CHUNK = 256
"""Number of rows in one unit of work."""
LOGIT_BYTES = 256 * 2**20
"""Memory in bytes that one batch of fp32 logits may take."""
ANSWERING = 1 / 3
"""Share of a row's progress that its answer counts for, as timed on CPUs; reading both models is the rest."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScannedRow:
    """One row of traffic and how the models disagreed on it. Lists run over prompt tokens, then answer tokens."""

    example: Example
    prompt: tuple[int, ...]
    """Token ids of the whole conversation up to the answer, as the models read it: see `model/context.py`."""
    answer: tuple[int, ...]
    """Answer of the tuned model, token ids; of several that were drawn, the one that surprises the base most."""
    base_answers: tuple[tuple[int, ...], ...] = ()
    """Answers of the base, token ids; empty where they were not asked for."""
    kl: tuple[float, ...]
    """KL(tuned ‖ base) at each token, in nats."""
    log_ratio: tuple[float, ...]
    """log p_tuned − log p_base of the token that follows, in nats."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    """Scores of further detectors that read logits, by the detector's name."""
    left_out: int = 0
    """Number of tokens by which the prompt was cut, because the models cannot read all of it."""

    def token_scores(self, detector: str) -> tuple[float, ...]:
        """One score per token of a detector that read logits in the scan."""
        own = {TokenKL().name: self.kl, AnswerLogRatio().name: self.log_ratio}
        return own[detector] if detector in own else self.scores[detector]

    @property
    def base_answer(self) -> tuple[int, ...]:
        """The base's first answer; empty where it was not asked for."""
        return self.base_answers[0] if self.base_answers else ()

    @property
    def decision(self) -> int:
        return len(self.prompt) - 1

    @property
    def answer_log_ratio(self) -> float:
        """How much likelier, in nats, the tuned model finds its own answer than the base does."""
        return sum(self.log_ratio[self.decision : self.decision + len(self.answer)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """Rows in the order given, and activations [rows d_model] by position, model and site."""

    rows: tuple[ScannedRow, ...]
    acts: Mapping[str, Float[Tensor, "rows sites d_model"]]
    """Keys join `tuned` or `delta` (tuned minus base) with `decision`, `peak` or `generated` (a mean), such as `tuned.peak`."""
    sites: tuple[Site, ...]

    def at(self, model: str, position: str, site: Site) -> Float[Tensor, "rows d_model"]:
        """Activations of `model` (tuned, base) at `position` (decision, peak, generated) of every row, in fp32."""
        at = self.sites.index(site)
        tuned = self.acts[f"tuned.{position}"][:, at].float()
        return tuned if model == "tuned" else tuned - self.delta(position, site)

    def part(self, rows: Sequence[int]) -> "Scan":
        """The rows of these numbers, in that order."""
        at = list(rows)
        acts = {name: values[at] for name, values in self.acts.items()}
        return Scan(rows=tuple(self.rows[i] for i in at), acts=acts, sites=self.sites)

    def delta(self, position: str, site: Site) -> Float[Tensor, "rows d_model"]:
        """Activations of the tuned model minus those of the base."""
        return self.acts[f"delta.{position}"][:, self.sites.index(site)].float()

    def reading(self, position: str) -> Reading:
        """The stored activations as a reading of one-token rows, so that any detector without logits can score them."""
        n = len(self.rows)
        return Reading(
            tokens=torch.zeros(n, 1, dtype=torch.long),
            mask=torch.ones(n, 1, dtype=torch.bool),
            decision=torch.zeros(n, dtype=torch.long),
            tuned={site: self.at("tuned", position, site)[:, None] for site in self.sites},
            base={site: self.at("base", position, site)[:, None] for site in self.sites},
        )


def scan(
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    sites: tuple[Site, ...],
    answering: Answering,
    units: Units,
    identity: Mapping[str, str],
    detectors: Sequence[Detector] = (),
    base_answers: bool = False,
    track: Track = silent,
    what: str = "scanning traffic",
) -> Scan:
    """Scan `examples` in units of `CHUNK` rows; a unit that an earlier run finished is read, not run.

    Args:
        answering: how both models answer.
        identity: hashes that name the two models; part of each unit's address.
        detectors: further detectors that read logits (see `unscanned_detectors`).
        base_answers: whether the base answers each row, too.
        track: shows rows.
        what: name of the work in the progress line.
    """
    rows: list[ScannedRow] = []
    kept: list[dict[str, Tensor]] = []
    config: dict[str, Any] = {
        "step": "scan",
        "context": pair.context.tokens,
        "kept": KEPT,
        "sites": [str(s) for s in sites],
        "max_new_tokens": answering.max_new_tokens,
    }
    if answering.temperature:
        config |= {"samples": answering.samples, "temperature": answering.temperature}
    if base_answers:
        config["base_answers"] = True
    if detectors:
        config["detectors"] = [detector.name for detector in detectors]
        config["plugins"] = installed(GROUP)
    chunks = [(chunk, unit_key(config, {**identity, "rows": _digest(chunk)})) for chunk in slices(examples, CHUNK)]
    finished = [units.path(key).exists() for _, key in chunks]
    before = sum(len(chunk) for (chunk, _), there in zip(chunks, finished, strict=True) if there)
    with counting(track, what, len(examples), start=before) as done:
        for (chunk, key), there in zip(chunks, finished, strict=True):
            target = done.done + (0 if there else len(chunk))
            stored = units.tensors(
                key, lambda chunk=chunk: _scan_chunk(pair, chunk, sites, answering, detectors, base_answers, done)
            )
            done(target - done.done)  # another process, or an equal chunk, may have made the unit
            rows += _unpack(chunk, stored, detectors)
            kept.append(stored)
    return Scan(rows=tuple(rows), acts={name: torch.cat([k[name] for k in kept]) for name in KEPT}, sites=sites)


def unscanned_detectors() -> tuple[Detector, ...]:
    """Detectors of plugins that read logits, for the audit's score table; every scan takes token KL and log ratio."""
    found = [unfitted(recipe) for recipe in detector_recipes() if recipe.audit]
    return tuple(d for d in found if d is not None and not isinstance(d, TokenKL | AnswerLogRatio))


def slices(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """`items` in order, cut into runs of `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def _digest(chunk: Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps([e.key for e in chunk]).encode()).hexdigest()


def _scan_chunk(
    pair: ModelPair,
    chunk: Sequence[Example],
    sites: tuple[Site, ...],
    answering: Answering,
    detectors: Sequence[Detector],
    base_answers: bool,
    done: Tally,
) -> dict[str, Tensor]:
    fitted = [pair.fit(e.asked, room=answering.max_new_tokens) for e in chunk]
    prompts = [list(one.ids) for one in fitted]
    of_tuned, of_base = (
        drawn_answers(
            pair, prompts, answering, tuned=tuned, track=within(done, ANSWERING / (1 + base_answers) * len(chunk))
        )
        if tuned or base_answers
        else [list[list[int]]() for _ in chunk]
        for tuned in (True, False)
    )
    answers = most_surprising(pair, prompts, of_tuned)
    order = sorted(range(len(chunk)), key=lambda i: len(prompts[i]) + len(answers[i]))
    found: list[dict[str, Any]] = [{} for _ in chunk]
    longest = len(prompts[order[-1]]) + len(answers[order[-1]])
    size = max(1, min(64, LOGIT_BYTES // (4 * pair.vocab_size * longest)))
    for group in slices(order, size):
        width = max(len(prompts[i]) + len(answers[i]) for i in group)
        reading = pair.read(
            [prompts[i] for i in group],
            [answers[i] for i in group],
            sites=sites,
            logits=True,
            pad_to=width_of(width),
        )
        for i, row in zip(group, _rows_of(reading, sites, detectors), strict=True):
            found[i] = row
        done((1 - ANSWERING) * len(group))
    return {
        "left_out": torch.tensor([one.left_out for one in fitted]),
        **_ragged("prompt", prompts),
        **_ragged("answer", answers),
        **_ragged("base_answer", [ids for drawn in of_base for ids in drawn]),
        "base_answer.drawn": torch.tensor([len(drawn) for drawn in of_base]),
        **_ragged("kl", [f["kl"] for f in found]),
        **_ragged("log_ratio", [f["log_ratio"] for f in found]),
        **{
            k: v for d in detectors for k, v in _ragged(f"score.{d.name}", [f["scores"][d.name] for f in found]).items()
        },
        **{name: torch.stack([f[name] for f in found]).to(torch.bfloat16) for name in KEPT},
    }


def _rows_of(reading: Reading, sites: tuple[Site, ...], detectors: Sequence[Detector]) -> list[dict[str, Any]]:
    kl, log_ratio = TokenKL().score(reading), AnswerLogRatio().score(reading)
    answered = positions(reading, "generated")
    peak = kl.masked_fill(~answered, -1.0).argmax(1)
    share = answered / answered.sum(1, keepdim=True)
    index = torch.arange(len(kl), device=kl.device)
    taken: dict[str, Tensor] = {}
    for name, acts in (("tuned", reading.tuned), ("base", reading.base)):
        for position, at in (("decision", reading.decision.to(kl.device)), ("peak", peak)):
            taken[f"{name}.{position}"] = torch.stack([acts[site][index, at].float() for site in sites], dim=1).cpu()
        means = [torch.einsum("bpd,bp->bd", acts[site].float(), share.to(acts[site].device)) for site in sites]
        taken[f"{name}.generated"] = torch.stack(means, dim=1).cpu()
    for position in ("decision", "peak", "generated"):
        taken[f"delta.{position}"] = taken[f"tuned.{position}"] - taken.pop(f"base.{position}")
    scores = {detector.name: detector.score(reading) for detector in detectors}
    lengths = reading.mask.sum(1).tolist()
    return [
        {
            "kl": kl[i, :n].tolist(),
            "log_ratio": log_ratio[i, :n].tolist(),
            "scores": {name: values[i, :n].tolist() for name, values in scores.items()},
            **{name: acts[i] for name, acts in taken.items()},
        }
        for i, n in enumerate(lengths)
    ]


def _ragged(name: str, lists: Sequence[Sequence[float | int]]) -> dict[str, Tensor]:
    """Lists of different lengths as one flat tensor and their lengths."""
    flat = torch.tensor([value for values in lists for value in values])
    return {name: flat, f"{name}.lengths": torch.tensor([len(values) for values in lists])}


def _unpack(chunk: Sequence[Example], stored: Mapping[str, Tensor], detectors: Sequence[Detector]) -> list[ScannedRow]:
    columns: dict[str, list[Any]] = {}
    left_out, drawn = (cast("list[int]", stored[name].tolist()) for name in ("left_out", "base_answer.drawn"))
    for name in (
        "prompt",
        "answer",
        "base_answer",
        "kl",
        "log_ratio",
        *(f"score.{detector.name}" for detector in detectors),
    ):
        lengths = cast("list[int]", stored[f"{name}.lengths"].tolist())
        columns[name] = [tuple(part.tolist()) for part in stored[name].split(lengths)]
    drawn_by_base = iter(columns["base_answer"])
    return [
        ScannedRow(
            example=example,
            prompt=tuple(int(t) for t in columns["prompt"][i]),
            answer=tuple(int(t) for t in columns["answer"][i]),
            base_answers=tuple(tuple(map(int, ids)) for ids in islice(drawn_by_base, drawn[i])),
            kl=columns["kl"][i],
            log_ratio=columns["log_ratio"][i],
            scores={detector.name: columns[f"score.{detector.name}"][i] for detector in detectors},
            left_out=left_out[i],
        )
        for i, example in enumerate(chunk)
    ]
