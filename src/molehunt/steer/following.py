"""Interventions that are told of each forward pass before it runs: which prompts it reads, or which tokens it adds."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.model.blocks import decoder
from molehunt.steer.row_gate import prefill_tokens


@runtime_checkable
class Following(Intervention, Protocol):
    """An intervention that keeps step with a batch. No row may leave the batch before it ends."""

    def begin(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        """A batch is prefilled: its token ids, and where they are real."""
        ...

    def advance(self, ids: Int[Tensor, "batch 1"]) -> None:
        """The batch goes on by a token."""
        ...


@contextmanager
def following(model: nn.Module, intervention: Following) -> Generator[None, None, None]:
    """Tell it of the passes inside the block; it is not applied by this."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            intervention.advance(kwargs["input_ids"])
        else:
            intervention.begin(*prefill_tokens(args, kwargs))

    handle = decoder(model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
