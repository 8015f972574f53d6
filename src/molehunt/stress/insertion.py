"""Prompts with a place for more tokens behind what the user wrote: forward passes for an attacker who may only type.

The defence is live at every position, the cached ones included: nothing is changed but the input. What comes before the
place is read once; the tokens in it, the template's marks behind it and the forced answer run through all blocks.
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
from molehunt.model.cache import branched, positions_for, select_rows, takes, with_cache
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.stress.suffix import cached_prefix
from molehunt.traffic.chat import prompt_ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Insertion:
    """A batch of prompts with as many tokens put into each, and the answer that each is made to read."""

    model: nn.Module
    defence: tuple[Intervention, ...]
    entering: Float[Tensor, "batch inserted d_model"]
    """Embeddings of the tokens in the place, in fp32."""
    behind: Float[Tensor, "batch behind d_model"]
    """Embeddings of the marks and the answer, as the model has them; padded on the right."""
    real: Bool[Tensor, "batch all"]
    """Of every token, those before the place included: False is padding."""
    prefix: Any
    """Keys and values of the tokens before the place. Passes copy it."""
    longest: int
    """Tokens of the longest answer."""

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
        """The same with other embeddings to begin at."""
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
        last: dict[str, Any] = {"logits_to_keep": self.longest + 1} if takes(self.model, "logits_to_keep") else {}
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
    """Read what comes before the place once.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        prompts: token ids, more than `marks` each.
        tokens: what is in the place to begin with, a token at least.
        marks: tokens at the end of each prompt that stay behind the place (see `template_marks`).
        defence: interventions that treat each row by itself.
        answers: token ids, for each prompt one at least.

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
    held = [width - len(row) for row in before]
    real = torch.tensor(
        [
            [False] * n + [True] * (width - n + len(tokens) + len(row)) + [False] * (after - len(row))
            for n, row in zip(held, behind, strict=True)
        ],
        device=device,
    )
    with edit_sites(model, defence):
        prefix = cached_prefix(
            model,
            torch.tensor([[0] * n + row for n, row in zip(held, before, strict=True)], device=device),
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
    """From token ids to the embeddings that enter the decoder."""
    inner: Any = unwrapped(model)
    return inner.get_input_embeddings()


def template_marks(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens the chat template puts behind the user's text: as many as all prompts and two others end in.

    0 where the prompts are not in the tokenizer's template: what a user adds then comes last.
    """
    told = [*prompts, *(prompt_ids(tokenizer, text) for text in ("a", "7?"))]
    most = min(map(len, told)) - 1
    return next((n for n in range(most) if len({row[-1 - n] for row in told}) > 1), most)
