"""Completions of the target while one block's output is replaced throughout, in the prompt and at every decoding step."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.activation.identity import tokenizer_hash
from molehunt.activation.scale import sinks
from molehunt.contracts import TransferMap
from molehunt.errors import UsageError
from molehunt.model.blocks import decoder
from molehunt.model.cache import left_by, positions_for, with_cache
from molehunt.model.cache_check import must_extend
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.taps import read_sites
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.following import following
from molehunt.transfer.alignment import Aligned

CUT_OFF = "\ufffd"
"""What decoding gives for the first bytes of a character."""


@dataclass(frozen=True, eq=False)
class Speaker:
    """A causal language model and its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


def replaced_answers(
    source: Speaker,
    target: Speaker,
    prompts: Sequence[Aligned],
    map: TransferMap | Site | None,
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> list[str]:
    """Greedy answers of the target, the output of one block replaced at all positions that have a partner.

    The source reads the prompt once, and after each token of the target's the whole answer so far in its own tokens: the
    cost is quadratic in the answer's length. Attention sinks of either model and first tokens keep their own.

    Args:
        source: whose activations are mapped.
        target: who answers. It must be another module than the source.
        prompts: aligned prompts.
        map: what replaces; a site asks for mean ablation there (by the mean over the prompt's positions), None for
            the target's own answers.
        max_new_tokens: of an answer.
        track: shown rows.

    Raises:
        UsageError: source and target are one module.
        CannotTap: a model cannot be read or edited (see `edit_sites`), or the target decodes without a cache.
        NotTestable: the source cannot continue a cached prompt by several tokens at once.
    """
    if decoder(source.model) is decoder(target.model):
        raise UsageError(
            "one module cannot be source and target at the same time.\nLoad the pair apart (`ModelPair.apart`)."
        )
    known = {prompt.target: prompt for prompt in prompts}
    if map is None:
        replacing = None
    elif isinstance(map, Site):
        replacing = _MeanAblated(map, known)
    else:
        replacing = _Mapped(map, known, source, answer_in_tokens_of(source, target))
    stops = stop_ids(target.model, target.tokenizer)
    with nullcontext() if replacing is None else following(target.model, replacing):
        generated = generate(
            target.model,
            target.tokenizer,
            [prompt.target for prompt in prompts],
            max_new_tokens=max_new_tokens,
            interventions=[] if replacing is None else [replacing],
            stop=(),  # no row leaves its batch, so the source keeps step with it
            track=track,
        )
    return [str(target.tokenizer.decode(before_stop(answer, stops), skip_special_tokens=True)) for answer in generated]


def _prompts_of(
    known: Mapping[tuple[int, ...], Aligned], ids: Tensor, real: Tensor
) -> tuple[list[Aligned], Int[Tensor, " paired"], Int[Tensor, " paired"], Int[Tensor, " paired"]]:
    """The prompts of a batch, and row, source position and column of each pair."""
    prompts = [known[tuple(row[there].tolist())] for row, there in zip(ids, real, strict=True)]
    first = real.long().argmax(1).tolist()
    pairs = [(r, i, j + first[r]) for r, prompt in enumerate(prompts) for i, j in prompt.pairs]
    r, i, column = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3).mT
    return prompts, r, i, column


class _MeanAblated:
    """Each token's activation replaced by the mean over the prompt's positions."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, site: Site, known: Mapping[tuple[int, ...], Aligned]) -> None:
        self.site = site
        self._known = known
        self._prefill: tuple[Tensor, Tensor] | None = None
        """Where to replace, and where tokens are real; None in decoding steps."""
        self._mean = torch.zeros(0)

    def begin(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        where = torch.zeros_like(real)
        _, r, _, column = _prompts_of(self._known, ids, real)
        where[r, column] = True
        self._prefill = where, real

    def advance(self, ids: Int[Tensor, "batch 1"]) -> None:
        self._prefill = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self._prefill is None:
            return self._mean.to(acts.dtype).expand_as(acts).clone()
        where = (self._prefill[0] & ~sinks(acts, self._prefill[1]))[..., None]
        self._mean = (acts.float() * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp_min(1)
        return torch.where(where, self._mean.to(acts.dtype), acts)


class _Mapped:
    """Each token's activation replaced by what a map makes of the source's."""

    follows_batch: ClassVar[bool] = True

    def __init__(
        self,
        map: TransferMap,
        known: Mapping[tuple[int, ...], Aligned],
        source: Speaker,
        tokens_of: Callable[[Sequence[int]], list[int]],
    ) -> None:
        self.site = map.target
        self._map = map
        self._known = known
        self._reading = _Reading(source.model, map.source)
        self._tokens_of = tokens_of
        self._answers: list[list[int]] = []
        self._real: Tensor | None = None
        self._where = self._given = torch.zeros(0)

    def begin(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        prompts, r, i, column = _prompts_of(self._known, ids, real)
        acts, sink = self._reading.prompts([prompt.source for prompt in prompts])
        ordinary = ~sink[r, i]
        r, i, column = r[ordinary], i[ordinary], column[ordinary]
        mapped = self._map(acts[r, i]).to(ids.device)
        self._where = torch.zeros_like(real)
        self._where[r, column] = True
        self._given = mapped.new_zeros(*ids.shape, mapped.shape[-1])
        self._given[r, column] = mapped
        self._answers = [[] for _ in prompts]
        self._real = real

    def advance(self, ids: Int[Tensor, "batch 1"]) -> None:
        for answer, token in zip(self._answers, ids[:, 0].tolist(), strict=True):
            answer.append(token)
        tokens = [self._tokens_of(answer) for answer in self._answers]
        self._where = torch.tensor([[bool(some)] for some in tokens], device=ids.device)
        self._given = self._map(self._reading.last_of_answers([some or [0] for some in tokens]))[:, None].to(ids.device)
        self._real = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        where = self._where if self._real is None else self._where & ~sinks(acts, self._real)
        return torch.where(where[..., None], self._given.to(acts.dtype), acts)


class _Reading:
    """The source, which reads a batch of prompts once and their answers anew at every step."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        must_extend(model)
        self._model = model
        self._site = site
        self._device = next(model.parameters()).device
        self._mask = torch.zeros(0)
        self._cache: Any = None

    def prompts(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "batch pos d_source"], Bool[Tensor, "batch pos"]]:
        """Activations at the site, position by position of each prompt, and which are sinks."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self._device)
        pads = torch.tensor([width - len(row) for row in rows], device=self._device)[:, None]
        real = torch.arange(width, device=self._device) >= pads
        self._mask, self._cache = real, None
        acts = self._read(ids, real, copy_cache=False)
        sink = sinks(acts, real)
        shifted = (torch.arange(width, device=self._device) + pads).clamp_max(width - 1)
        return acts.gather(1, shifted[..., None].expand_as(acts)).cpu(), sink.gather(1, shifted).cpu()

    def last_of_answers(self, answers: Sequence[Sequence[int]]) -> Float[Tensor, "batch d_source"]:
        """Activation at the last token of each answer, after its prompt."""
        width = max(map(len, answers))
        ids = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in answers], device=self._device)
        last = torch.tensor([len(answer) - 1 for answer in answers], device=self._device)
        real = torch.arange(width, device=self._device) <= last[:, None]
        acts = self._read(ids, torch.cat([self._mask, real], 1), copy_cache=True)
        return acts[torch.arange(len(answers), device=self._device), last].cpu()

    def _read(self, ids: Tensor, mask: Tensor, *, copy_cache: bool) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with read_sites(self._model, [self._site]) as tap:
            inner = decoder(self._model)
            out: Any = inner(
                input_ids=ids,
                attention_mask=mask.long(),
                **positions_for(inner, positions),
                **with_cache(inner, copy.deepcopy(self._cache) if copy_cache else None),
            )
        if not copy_cache:
            self._cache = left_by(out)
        return tap[self._site].float()


def answer_in_tokens_of(source: Speaker, target: Speaker) -> Callable[[Sequence[int]], list[int]]:
    """An answer so far in the source's tokens; none where it ends inside a character, or is empty."""
    if tokenizer_hash(source.tokenizer) == tokenizer_hash(target.tokenizer):
        return list

    def encoded(answer: Sequence[int]) -> list[int]:
        text = str(target.tokenizer.decode(list(answer)))
        return [] if text.endswith(CUT_OFF) else list(source.tokenizer.encode(text, add_special_tokens=False))

    return encoded
