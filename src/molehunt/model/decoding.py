"""A batch of rows that decode together. Between two steps, rows may join or leave the batch.

The rows share one cache. A model whose cache is not reliable (see `cache_check`) decodes without one: each step then runs
the whole text again, and hooks see that the pass continues a batch.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from molehunt.errors import CannotTap
from molehunt.model.cache import Uncached, announced, holds_keys, left_by, positions_for, select_rows, with_cache
from molehunt.model.last_logits import last_logits


class DecodingBatch:
    """A batch that is being decoded. Rows are padded on the left, so that all of them continue at the same column."""

    def __init__(self, model: nn.Module, *, cached: bool = True, filler: int = 0) -> None:
        """Make an empty batch, which `begin` fills.

        Args:
            model: a causal language model, with or without a PEFT wrapper.
            cached: whether to decode on the model's cache.
            filler: the token id of padding; no answer may depend on it.
        """
        self._model = model
        self._cached = cached
        self._filler = filler
        self._device = next(model.parameters()).device
        self._cache: Any = None  # the model's cache, or an Uncached
        self._tokens = torch.zeros(0, 0, dtype=torch.long, device=self._device)  # tokens of all columns, if uncached
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._positions = torch.zeros(0, 1, dtype=torch.long, device=self._device)

    def __len__(self) -> int:
        return len(self._mask)

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]], *, width: int | None = None) -> Float[Tensor, "batch vocab"]:
        """Prefill an empty batch and return the logits of each row's first answer token.

        Args:
            prompts: token ids of each prompt, which must not be empty.
            width: number of columns; by default the length of the longest prompt.

        Raises:
            ValueError: a prompt is empty.
        """
        if not all(prompts):
            raise ValueError("a prompt without tokens has nothing to continue")
        width = width or max(map(len, prompts))
        tokens = torch.tensor([[self._filler] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        lengths = torch.tensor([len(p) for p in prompts], device=self._device)[:, None]
        self._mask = (torch.arange(width, device=self._device) >= width - lengths).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        return self._forward(tokens, self._positions, kept=1)[:, -1].float()

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Feed each row its newest token, and return the logits of the next one."""
        return self.extend(tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool))[:, -1]

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Feed each row its next tokens, padded on the right, and return the logits after each of them."""
        self._mask = torch.cat([self._mask, real.long()], dim=1)
        n = tokens.shape[1]
        positions = self._positions[:, -1:] + 1 + torch.arange(n, device=self._device)
        return self._forward(tokens, positions, kept=n)[:, -n:].float()

    def _forward(self, tokens: Tensor, positions: Tensor, *, kept: int) -> Tensor:
        begins = self._cache is None
        inputs: dict[str, Any] = {}
        mask = self._mask
        if self._cached:
            inputs |= with_cache(self._model, self._cache)
            if not begins and not holds_keys(self._cache):
                mask = mask[:, -tokens.shape[1] :]  # a recurrent state needs the mask of the new tokens only
            self._positions = positions[:, -1:]
        else:
            if begins:
                self._cache, self._positions = Uncached(tokens.shape[1]), positions
            else:
                tokens = torch.cat([self._tokens, tokens], dim=1)
                self._positions = torch.cat([self._positions, positions], dim=1)
            self._tokens, positions = tokens, self._positions
            inputs["use_cache"] = False
        inputs |= positions_for(self._model, positions)
        uncached = None if self._cached else self._cache
        with (
            announced(self._model, begins=begins, uncached=uncached, ids=tokens, mask=mask),
            last_logits(self._model, kept) as given,
        ):
            out: Any = self._model(input_ids=tokens, attention_mask=mask, **given, **inputs)
        if self._cached:
            self._cache = left_by(out)
            if self._cache is None:
                raise CannotTap("the model gives no cache back to continue on.")
        return cast("Tensor", out.logits)

    @property
    def can_join(self) -> bool:
        """Whether rows may join: not if a block stores a window or a recurrent state instead of every key."""
        return self._cache is None or (
            type(self._cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self._cache.layers)
        )

    def join(self, others: "DecodingBatch") -> None:
        """Append the rows of another batch, which must not be used afterwards. Raises ValueError unless `can_join`."""
        if not len(self):
            self._cache, self._mask, self._positions = others._cache, others._mask, others._positions
            self._tokens = others._tokens
            return
        if not (self.can_join and others.can_join):
            raise ValueError("the key-value cache of this model is not of the kind that rows can join")
        width = max(self._mask.shape[1], others._mask.shape[1])
        for mine, theirs in zip(self._cache.layers, others._cache.layers, strict=True):
            mine.keys = torch.cat([_widened(mine.keys, width), _widened(theirs.keys, width)])
            mine.values = torch.cat([_widened(mine.values, width), _widened(theirs.values, width)])
        masks = [pad(batch._mask, (width - batch._mask.shape[1], 0)) for batch in (self, others)]
        self._mask = torch.cat(masks)
        self._positions = torch.cat([self._positions, others._positions])

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Reduce the batch to these rows, and remove columns that none of them uses."""
        if not len(rows):
            self.__init__(self._model, cached=self._cached, filler=self._filler)
            return
        select_rows(self._cache, rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        if not self._cached:
            self._tokens = self._tokens[rows]
            return
        unused = int((self._mask.amax(0) == 0).sum())
        if unused and self.can_join:
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
            self._mask = self._mask[:, unused:]


def _widened(states: Float[Tensor, "batch heads pos d_head"], width: int) -> Float[Tensor, "batch heads width d_head"]:
    return pad(states, (0, 0, width - states.shape[2], 0))
