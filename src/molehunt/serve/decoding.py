"""Rows that decode together on one dense key-value cache; others may join them, and any may leave, between two steps."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from molehunt.model.generate import keeps_last_logits


class DecodingBatch:
    """A batch in the middle of its answers. Rows are padded on the left, so that all of them continue at one column."""

    def __init__(self, model: nn.Module) -> None:
        """An empty batch: `begin` fills it."""
        self._model = model
        self._device = next(model.parameters()).device
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps_last_logits(model) else {}
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._positions = torch.zeros(0, 1, dtype=torch.long, device=self._device)

    def __len__(self) -> int:
        return len(self._mask)

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        """Prefill an empty batch; logits of each row's first answer token. Raises ValueError for an empty prompt."""
        if not all(prompts):
            raise ValueError("a prompt without tokens has nothing to continue")
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        lengths = torch.tensor([len(p) for p in prompts], device=self._device)[:, None]
        self._mask = (torch.arange(width, device=self._device) >= width - lengths).long()
        self._positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        return self._forward(tokens)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Feed each row its newest token; logits of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(tokens[:, None])

    def _forward(self, tokens: Int[Tensor, "batch pos"]) -> Tensor:
        out: Any = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        self._cache = out.past_key_values
        self._positions = self._positions[:, -1:]
        return cast("Tensor", out.logits[:, -1].float())

    @property
    def can_join(self) -> bool:
        """Whether rows may join: not where a block keeps a window or a recurrent state instead of every key."""
        return self._cache is None or (
            type(self._cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self._cache.layers)
        )

    def join(self, others: "DecodingBatch") -> None:
        """Go on with these rows, too, behind those of this batch; `others` is used up. Raises ValueError unless `can_join`."""
        if not len(self):
            self._cache, self._mask, self._positions = others._cache, others._mask, others._positions
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
        """Go on with these rows alone, and without the columns that no row of them uses."""
        if not len(rows):
            self.__init__(self._model)
            return
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        unused = int((self._mask.amax(0) == 0).sum())
        if unused and self.can_join:
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
            self._mask = self._mask[:, unused:]


def _widened(states: Float[Tensor, "batch heads pos d_head"], width: int) -> Float[Tensor, "batch heads width d_head"]:
    return pad(states, (0, 0, width - states.shape[2], 0))
