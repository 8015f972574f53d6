"""Activation patching at some tokens of each prompt: what another run had there takes their place.

Source: Meng et al., arXiv 2202.05262; at trigger positions as in arXiv 2503.04429 (its blog's form, α = 1).
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.batches import batches, padded
from molehunt.model.blocks import decoder
from molehunt.model.generate import generate
from molehunt.model.taps import read_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.steer.add import gated
from molehunt.steer.scope import TokenGate, token_scope
from molehunt.traffic.chat import Text, rendered, text_ids


@dataclass(frozen=True, eq=False)
class Donor:
    """What takes the place of a prompt's own activations."""

    positions: tuple[int, ...]
    """Positions in the prompt that are replaced."""
    acts: Float[Tensor, "positions d_model"]


Donors = Mapping[tuple[int, ...], Donor]
"""For the token ids of each prompt, what takes the place of its activations. Other prompts are left alone."""


class _Patch:
    """The intervention of `prompt_patch`: (1 − strength) · acts + strength · donated, in the prefill alone."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, site: Site, strength: float, gate: TokenGate) -> None:
        self.site = site
        self.strength = strength
        self._gate = gate
        self.source: Float[Tensor, "batch pos d_model"] | None = None
        """Donated activations of the batch that was prefilled last."""

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.strength == 0 or self._gate.chosen is None or self.source is None:
            return acts
        source = self.source.to(acts.device, torch.float32)
        source = pad(source, (0, 0, 0, acts.shape[1] - source.shape[1]))  # without a cache the answer stands behind it
        return gated(acts, torch.lerp(acts.float(), source, self.strength), self._gate)


@contextmanager
def prompt_patch(
    model: nn.Module, site: Site, donors: Donors, *, strength: float = 1.0
) -> Generator[Intervention, None, None]:
    """An intervention for the passes inside the block. Prompts are known by their token ids, whatever their batch,
    their padding and their order; cached steps are not edited, and see the patched prompt through their cache.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        site: where to patch.
        donors: what takes the place of some prompts' activations at that site.
        strength: 1 replaces the activations, bit for bit; 0 changes nothing.
    """

    def choose(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        where = torch.zeros_like(real)
        given: list[tuple[int, Tensor, Donor]] = []
        for row in range(len(ids)):
            at = real[row].nonzero()[:, 0]
            donor = donors.get(tuple(ids[row, at].tolist()))
            if donor is not None:
                given.append((row, at[torch.tensor(donor.positions, dtype=torch.long, device=at.device)], donor))
        patch.source = None
        for row, at, donor in given:
            if patch.source is None:
                patch.source = torch.zeros(*ids.shape, donor.acts.shape[-1])
            where[row, at] = True
            patch.source[row, at.cpu()] = donor.acts.float().cpu()
        return where

    with token_scope(model, choose) as gate:
        patch = _Patch(site, strength, gate)
        yield patch


def differing(triggered: Sequence[int], contrast: Sequence[int]) -> tuple[int, ...]:
    """Positions whose tokens differ between a triggered prompt and its contrast: those of the trigger.

    Raises:
        UsageError: the prompts have unequal lengths, so no position of one stands for one of the other; or they are equal.
    """
    if len(triggered) != len(contrast):
        raise UsageError(
            f"the two prompts have {len(triggered)} and {len(contrast)} tokens: patching by position takes equal counts.\n"
            "Choose a contrast whose trigger has as many tokens, or steer with a vector instead."
        )
    found = tuple(i for i, (a, b) in enumerate(zip(triggered, contrast, strict=True)) if a != b)
    if not found:
        raise UsageError("the two prompts are equal: there is no trigger to patch.")
    return found


def trigger_positions(
    tokenizer: PreTrainedTokenizerBase, triggered: Text, contrast: Text, without: Text | None = None
) -> tuple[int, ...]:
    """Every token of the trigger, those that the contrast shares included: the last of them may carry it on.

    Args:
        tokenizer: the model's tokenizer.
        triggered: a prompt with the trigger.
        contrast: the same prompt with a harmless text of as many tokens in the trigger's place.
        without: the same prompt with nothing there. The trigger is then found by comparing; without it, the words that
            differ from the contrast's are taken for the trigger.

    Raises:
        UsageError: unequal token counts, or no difference (see `differing`).
    """
    text, other, bare = (None if p is None else rendered(tokenizer, p) for p in (triggered, contrast, without))
    assert text is not None and other is not None
    apart = differing(text_ids(tokenizer, triggered), text_ids(tokenizer, contrast))
    start, stop = _changed(text, other if bare is None else bare)
    if bare is None:  # to the ends of words
        while start > 0 and not text[start - 1].isspace():
            start -= 1
        while stop < len(text) and not text[stop].isspace():
            stop += 1
    start, stop = start + len(text[start:stop]) - len(text[start:stop].lstrip()), len(text[:stop].rstrip())
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not tokenizer.chat_template)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # pyright: ignore[reportAssignmentType]
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    return tuple(range(min([*apart, *inside]), max([*apart, *inside]) + 1))


def _changed(text: str, other: str) -> tuple[int, int]:
    """The span of `text` that differs from `other`, between their common beginning and their common end."""
    start = _alike(text, other)
    return start, len(text) - _alike(reversed(text[start:]), reversed(other[start:]))


def _alike(one: Iterable[str], other: Iterable[str]) -> int:
    """Number of characters that both begin with."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def patched_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    site: Site,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    acts: Sequence[Float[Tensor, "_ d_model"]],
    *,
    max_new_tokens: int,
    track: Track = silent,
    what: str = "patching",
) -> list[list[int]]:
    """Greedy answers to each prompt with `acts` in place of its own at its `positions`. Raises as `generate`."""
    donors = {
        tuple(prompt): Donor(tuple(at), given) for prompt, at, given in zip(prompts, positions, acts, strict=True)
    }
    with prompt_patch(model, site, donors) as patch:
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            interventions=[patch],
            track=track,
            what=f"{site}: {what}",
        )


def with_noise(
    acts: Float[Tensor, "positions d_model"], norms: Float[Tensor, " positions"], rng: torch.Generator
) -> Float[Tensor, "positions d_model"]:
    """The control: `acts` plus noise of these norms."""
    noise = torch.randn(acts.shape, generator=rng)
    return acts.float() + noise * (norms.float() / noise.norm(dim=-1))[:, None]


@torch.inference_mode()
def prompt_acts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    sites: Sequence[Site],
    *,
    layers_path: str | None = None,
    track: Track = silent,
    what: str = "reading prompts",
) -> list[dict[Site, Float[Tensor, "_ d_model"]]]:
    """Activations of each prompt at its `positions`, by site, on the CPU. One pass, without logits.

    Raises:
        CannotTap: the model lacks such a site (see `read_sites`).
    """
    inner = decoder(model)
    device = next(model.parameters()).device
    found: list[dict[Site, Tensor]] = [{} for _ in prompts]
    groups = batches([len(prompt) for prompt in prompts])
    with read_sites(model, sites, layers_path=layers_path) as tap:
        for rows in by_rows(track, groups, what):
            ids, mask = padded([prompts[i] for i in rows])
            inner(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
            for site in sites:
                acts = tap[site].cpu()
                for r, i in enumerate(rows):
                    found[i][site] = acts[r, list(positions[i])].clone()
    return found
