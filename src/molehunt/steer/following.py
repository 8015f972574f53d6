"""Interventions that are informed of each forward pass before it runs: which prompts it reads, or which tokens it adds."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import CannotTap
from molehunt.model.cache import DecoderCall, on_decoder_calls


@runtime_checkable
class Following(Intervention, Protocol):
    """An intervention that keeps step with a batch. No row may leave the batch before it ends."""

    follows_batch: ClassVar[bool] = True

    def begin(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        """A batch is prefilled: its token ids, and where they are real."""
        ...

    def advance(self, ids: Int[Tensor, "batch 1"]) -> None:
        """The batch goes on by a token."""
        ...


@contextmanager
def following(model: nn.Module, intervention: Following) -> Generator[None, None, None]:
    """Inform an intervention of the passes inside the block. This does not apply it.

    Raises CannotTap in a forward pass: the model decodes without a cache, or continues by more than one token.
    """

    def before(call: DecoderCall) -> None:
        if call.begins:
            intervention.begin(*call.tokens())
        elif call.again:
            raise CannotTap(
                f"{type(intervention).__name__} keeps step with a cache, token by token, and this model decodes without "
                "one.\nIt cannot be used on this model."
            )
        elif call.ids is None or call.ids.shape[1] != 1:
            raise CannotTap(
                f"{type(intervention).__name__} keeps step token by token, and this pass continues a batch by embeddings "
                "or by several tokens.\nPrefill each prompt whole, and decode token by token."
            )
        else:
            intervention.advance(call.ids)

    with on_decoder_calls(model, before):
        yield
