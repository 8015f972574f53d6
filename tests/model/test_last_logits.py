"""Logits of the last positions: those of a whole pass, from a head that reads nothing else."""

from typing import Any

import pytest
import torch

from molehunt.model.blocks import unwrapped
from molehunt.model.last_logits import last_logits
from tiny_models import ARCHITECTURES, prompts, tiny_model, with_lora

ROWS = torch.tensor(prompts(lengths=(9, 9, 9)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_they_are_those_of_the_whole_pass(architecture: str, kept: int) -> None:
    model = tiny_model(architecture)
    with torch.no_grad():
        whole = model(ROWS, use_cache=False).logits
        with last_logits(model, kept) as given:
            found = model(ROWS, use_cache=False, **given).logits
        again = model(ROWS, use_cache=False).logits
    torch.testing.assert_close(found, whole[:, -kept:], atol=1e-5, rtol=1e-5)
    assert torch.equal(again, whole), "the head is itself again behind the block"


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_head_reads_a_contiguous_part(wrapped: bool) -> None:
    """Of a slice torch copies the head's weights for every row, on CPUs."""
    model: Any = with_lora(tiny_model("llama"), "llama") if wrapped else tiny_model("llama")
    read: list[torch.Tensor] = []
    head: Any = unwrapped(model)
    head.get_output_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    with torch.no_grad(), last_logits(model, 2) as given:
        model(input_ids=ROWS, use_cache=False, **given)
    (one,) = read
    assert one.shape[:2] == (3, 2) and one.is_contiguous()


def test_an_error_inside_leaves_no_hook() -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(RuntimeError, match="inside"), last_logits(model, 1):
        raise RuntimeError("inside")
    assert not model.get_output_embeddings()._forward_pre_hooks
