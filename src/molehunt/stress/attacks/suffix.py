"""Forward passes that run only what an attack can change: the tokens from the anchor on, in the blocks above its site.

All before that is constant and computed once, with the defence live: keys and values of the tokens before the anchor, and
the activations that enter the first block above the site. This is exact and no approximation: a test compares the logits
with those of a full forward pass.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.blocks import decoder_blocks
from molehunt.model.cache import branched, left_by, positions_for, select_rows, with_cache
from molehunt.model.cache_check import must_extend
from molehunt.model.taps import edit_sites, live, read_sites
from molehunt.site import Site


@dataclass(frozen=True, eq=False, kw_only=True)
class Suffix:
    """A batch of left-padded prompts, each followed by the answer that is forced after it.

    Position 0 is the anchor: the last token of each prompt. Position p > 0 is answer token p − 1, so that logits at p
    predict answer token p.
    """

    model: nn.Module
    site: Site
    """Where activations may be changed: the output of a block."""
    defence: tuple[Intervention, ...]
    """Interventions that are live in every pass. Those at the site act before the perturbation enters there."""
    entering: Float[Tensor, "batch pos d_model"]
    """Activations at the site from the anchor on, after the defence, in fp32."""
    tokens: Int[Tensor, "batch pos"]
    """Token ids from the anchor on."""
    real: Bool[Tensor, "batch all"]
    """False for padding, over all tokens including those before the anchor."""
    prefix: Any
    """Keys and values of the tokens before the anchor; None where every prompt is one token. Passes copy it."""
    as_tuple: bool
    """Whether this model's blocks put out a tuple."""

    @property
    def answered(self) -> Bool[Tensor, "batch pos"]:
        """Positions from the anchor on that are no padding."""
        return self.real[:, -self.tokens.shape[1] :]

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """Logits with these activations at the site. Gradients reach `entering`."""
        above = [edit for edit in self.defence if edit.site.layer > self.site.layer]
        given = entering.to(next(self.model.parameters()).dtype)
        with (
            edit_sites(self.model, above),
            _bypassed(self.model, self.site, (given,) if self.as_tuple else given),
        ):
            return _forward(self.model, self.tokens, self.real, branched(self.prefix)).float()

    def rows(self, kept: Int[Tensor, " kept"]) -> "Suffix":
        """Some rows of the batch, in this order. Defences must treat each row by itself."""
        prefix = branched(self.prefix)
        if prefix is not None:
            select_rows(prefix, kept)
        return replace(
            self, entering=self.entering[kept], tokens=self.tokens[kept], real=self.real[kept], prefix=prefix
        )


@torch.no_grad()
def suffix_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    site: Site,
    *,
    defence: Sequence[Intervention] = (),
    answers: Sequence[Sequence[int]] | None = None,
) -> Suffix:
    """Read prompts, and the answers forced after them, once.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        prompts: token ids, at least one each.
        site: the output of a block.
        defence: interventions that treat each row by itself, such as a `Clamp`.
        answers: token ids, one list for each prompt; without them, no answer is forced.

    Raises:
        UsageError: the site is no block output, a prompt is empty, or the numbers of rows differ.
        CannotTap: the model cannot be read or edited (see `edit_sites`).
    """
    forced = _checked_answers(prompts, site, answers)
    device = next(model.parameters()).device
    tokens, real = _padded(prompts, forced, device)
    anchor = max(map(len, prompts)) - 1
    shapes: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        shapes.append(isinstance(output, tuple))

    looking = decoder_blocks(model)[site.layer].register_forward_hook(live(look))
    try:
        with edit_sites(model, defence), read_sites(model, [site]) as tap:
            prefix = cached_prefix(model, tokens[:, :anchor], real[:, :anchor]) if anchor else None
            _forward(model, tokens[:, anchor:], real, branched(prefix))
    finally:
        looking.remove()
    return Suffix(
        model=model,
        site=site,
        defence=tuple(defence),
        entering=tap[site].float(),
        tokens=tokens[:, anchor:],
        real=real,
        prefix=prefix,
        as_tuple=shapes[-1],
    )


def _checked_answers(
    prompts: Sequence[Sequence[int]], site: Site, answers: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """An answer for each prompt, empty where none is forced. Raises UsageError as `suffix_of` does."""
    if site.stream != "resid":
        raise UsageError(
            f"an attack enters at a block's output, and {site} is none; give a site such as L{site.layer}.resid."
        )
    if not prompts or not all(prompts):
        raise UsageError("an attack needs prompts, with a token or more each.")
    forced = [[] for _ in prompts] if answers is None else answers
    if len(forced) != len(prompts):
        raise UsageError(
            f"there are {len(prompts)} prompts and {len(forced)} answers; give one answer for each prompt."
        )
    return forced


def _padded(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch all"], Bool[Tensor, "batch all"]]:
    """Prompts padded on the left and answers padded on the right, and which tokens are no padding."""
    before, after = max(map(len, prompts)), max(map(len, answers))
    rows = [
        [0] * (before - len(prompt)) + [*prompt, *answer] + [0] * (after - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    at = torch.arange(before + after, device=device)
    first = torch.tensor([before - len(prompt) for prompt in prompts], device=device)[:, None]
    end = torch.tensor([before + len(answer) for answer in answers], device=device)[:, None]
    return torch.tensor(rows, device=device), (at >= first) & (at < end)


def cached_prefix(model: nn.Module, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Any:
    """Keys and values of left-padded tokens. Raises NotTestable for a model whose cache cannot be extended."""
    must_extend(model)
    run: Any = model
    out = run(
        input_ids=tokens,
        attention_mask=real.long(),
        **positions_for(model, (real.long().cumsum(1) - 1).clamp_min(0)),
        **with_cache(model, None),
    )
    return left_by(out)


def _forward(model: nn.Module, tokens: Tensor, real: Tensor, cache: Any) -> Tensor:
    """Logits of the last tokens of rows. `cache` contains the tokens before them, and is written to."""
    run: Any = model
    positions = (real.long().cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    cached = {"use_cache": False} if cache is None else with_cache(model, cache)
    return run(input_ids=tokens, attention_mask=real.long(), **positions_for(model, positions), **cached).logits


@contextmanager
def _bypassed(model: nn.Module, site: Site, output: Any) -> Generator[None, None, None]:
    """Inside the block, every decoder block up to the site's returns this output and computes nothing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    skipped = list(decoder_blocks(model))[: site.layer + 1]
    own = [block.__dict__.get("forward") for block in skipped]  # such as that of a model spread over devices
    try:
        for block in skipped:
            block.__dict__["forward"] = forward
        yield
    finally:
        for block, before in zip(skipped, own, strict=True):
            del block.__dict__["forward"]
            if before is not None:
                block.__dict__["forward"] = before
