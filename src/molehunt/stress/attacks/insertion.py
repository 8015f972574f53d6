"""Prompts with a place for more tokens after what the user wrote: forward passes for an attacker who may only type.

The defence is live at every position, the cached ones included: only the input is changed. The tokens before the place are
read once. The tokens in it, the template's marks after it and the forced answer run through all blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.model.blocks import unwrapped
from molehunt.model.cache import branched, positions_for, select_rows, with_cache
from molehunt.model.last_logits import last_logits
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.stress.attacks.suffix import cached_prefix
from molehunt.traffic.chat import prompt_ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Insertion:
    """A batch of prompts with the same number of tokens inserted into each, and the answer that is forced after each."""

    model: nn.Module
    defence: tuple[Intervention, ...]
    entering: Float[Tensor, "batch inserted d_model"]
    """Embeddings of the tokens in the place, in fp32."""
    behind: Float[Tensor, "batch behind d_model"]
    """Embeddings of the marks and the answer, as the model has them; padded on the right."""
    real: Bool[Tensor, "batch all"]
    """False for padding, over all tokens including those before the place."""
    prefix: Any
    """Keys and values of the tokens before the place. Passes copy it."""
    longest: int
    """Number of tokens in the longest answer."""

    def __call__(self, entering: Float[Tensor, "batch inserted d_model"]) -> Float[Tensor, "batch answer vocab"]:
        """Logits that predict each answer token, with these embeddings in the place. Gradients reach `entering`."""
        with edit_sites(self.model, self.defence):
            return self._logits(entering)[:, -self.longest - 1 : -1].float()

    @torch.no_grad()
    def acts(self, entering: Float[Tensor, "batch inserted d_model"], site: Site) -> Float[Tensor, "batch pos d_model"]:
        """Activations at a site before the edits there, in fp32: at the last prompt token, then at the answer's."""
        with read_sites(self.model, [site]) as tap, edit_sites(self.model, self.defence):
            self._logits(entering)
        return tap[site][:, -self.longest - 1 :].float()

    def starting(self, entering: Float[Tensor, "batch inserted d_model"]) -> "Insertion":
        """The same prompts with other embeddings to start from."""
        return replace(self, entering=entering)

    def rows(self, kept: Int[Tensor, " kept"]) -> "Insertion":
        """Some rows of the batch, in this order; a row may be taken more than once."""
        prefix = branched(self.prefix)
        select_rows(prefix, kept)
        return replace(
            self, entering=self.entering[kept], behind=self.behind[kept], real=self.real[kept], prefix=prefix
        )

    def _logits(self, entering: Tensor) -> Tensor:
        run: Any = self.model
        embedded = torch.cat([entering.to(self.behind.dtype), self.behind], dim=1)
        with last_logits(self.model, self.longest + 1) as last:
            return run(
                inputs_embeds=embedded,
                attention_mask=self.real.long(),
                **positions_for(self.model, (self.real.long().cumsum(1) - 1).clamp_min(0)[:, -embedded.shape[1] :]),
                **with_cache(self.model, branched(self.prefix)),
                **last,
            ).logits


@torch.no_grad()
def insertion_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    marks: int = 0,
    defence: Sequence[Intervention] = (),
    answers: Sequence[Sequence[int]],
) -> Insertion:
    """Read the tokens before the place once.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        prompts: token ids, more than `marks` each.
        tokens: tokens in the place at the start, at least one.
        marks: number of tokens at the end of each prompt that stay after the place (see `template_marks`).
        defence: interventions that treat each row by itself.
        answers: token ids, at least one for each prompt.

    Raises:
        ValueError: a prompt is no longer than the marks, or something is empty.
        CannotTap: the model cannot be edited (see `edit_sites`).
    """
    if not prompts or not tokens or not all(answers) or min(map(len, prompts)) <= marks:
        raise ValueError("an insertion needs tokens to insert, prompts longer than their marks, and answers")
    device = next(model.parameters()).device
    embed = embedding(model)
    before = [list(prompt[: len(prompt) - marks]) for prompt in prompts]
    behind = [[*prompt[len(prompt) - marks :], *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width, after = max(map(len, before)), max(map(len, behind))
    padding = [width - len(row) for row in before]
    real = torch.tensor(
        [
            [False] * n + [True] * (width - n + len(tokens) + len(row)) + [False] * (after - len(row))
            for n, row in zip(padding, behind, strict=True)
        ],
        device=device,
    )
    with edit_sites(model, defence):
        prefix = cached_prefix(
            model,
            torch.tensor([[0] * n + row for n, row in zip(padding, before, strict=True)], device=device),
            real[:, :width],
        )
    return Insertion(
        model=model,
        defence=tuple(defence),
        entering=embed(torch.tensor([list(tokens)] * len(prompts), device=device)).float(),
        behind=embed(torch.tensor([row + [0] * (after - len(row)) for row in behind], device=device)),
        real=real,
        prefix=prefix,
        longest=max(map(len, answers)),
    )


def embedding(model: nn.Module) -> nn.Module:
    """The layer that maps token ids to the embeddings that enter the decoder."""
    inner: Any = unwrapped(model)
    return inner.get_input_embeddings()


def template_marks(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that the chat template puts after the user's text: the ending that all prompts and two others share.

    It is 0 where the prompts are not in the tokenizer's template. What a user adds then comes last.
    """
    rows = [*prompts, *(prompt_ids(tokenizer, text) for text in ("a", "7?"))]
    longest = min(map(len, rows)) - 1
    return next((n for n in range(longest) if len({row[-1 - n] for row in rows}) > 1), longest)
