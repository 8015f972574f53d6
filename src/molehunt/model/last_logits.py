"""Logits of the last positions alone: those of a prompt cost as much as several blocks, and few steps need them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from molehunt.model.blocks import unwrapped
from molehunt.model.cache import takes
from molehunt.model.taps import live


@contextmanager
def last_logits(model: nn.Module, kept: int) -> Generator[dict[str, int], None, None]:
    """Inside the block a pass computes logits at the last `kept` positions only, where its head is a module of its own.

    What is yielded must be among the arguments of the pass. The head gets a contiguous input: of a slice, torch 2.13 makes a
    batched product on CPUs that copies the weights of the head for every row, two thirds of the time of a prompt.
    """
    inner: Any = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    given = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
    if not isinstance(head, nn.Module):
        yield given
        return

    def cut(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][:, -kept:].contiguous(), *inputs[1:]) if inputs and inputs[0].ndim == 3 else inputs

    handle = head.register_forward_pre_hook(live(cut))
    try:
        yield given
    finally:
        handle.remove()
