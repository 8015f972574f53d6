"""Which tokens an intervention acts on: all, the prompt's, the answer's, the last of the prompt, a trigger's."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from molehunt.model.cache import DecoderCall, on_decoder_calls

Choose = Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]
"""From the token ids of a prefill, and where they are real, to where to act."""


class TokenGate:
    """Open at chosen tokens of the prompts that were prefilled last, and at all or none of their answers'."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, *, generation: bool) -> None:
        self.generation = generation
        self.chosen: Bool[Tensor, "batch pos"] | None = None
        """The chosen tokens of the pass that runs, where it reads prompts; None in cached steps."""

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        if self.chosen is None:
            return torch.full(acts.shape[:2], self.generation, device=acts.device)
        return self.chosen.to(acts.device)


@contextmanager
def token_scope(model: nn.Module, choose: Choose, *, generation: bool = False) -> Generator[TokenGate, None, None]:
    """A gate for the passes inside the block: `choose` says where it is open in each prompt.

    Right under padding on either side, in batches, and in decoding with a cache or without, whatever leaves the batch. A
    pass without cached tokens is a prefill. What continues on a cache counts as answer: a further turn of a conversation,
    and, where another program prefills in chunks, every chunk but the first. Prefill prompts whole.

    Raises CannotTap in a forward pass: a prefill whose token ids cannot be seen.
    """
    gate = TokenGate(generation=generation)

    def before(call: DecoderCall) -> None:
        if call.begins:
            gate.chosen = choose(*call.tokens())
        elif call.again:  # the prompt runs again in every step, and the answer behind it
            ids, real = call.tokens()
            chosen = choose(ids[:, : call.again], real[:, : call.again])
            answer = torch.full_like(ids[:, call.again :], gate.generation, dtype=torch.bool)
            gate.chosen = torch.cat([chosen, answer], dim=1)
        else:
            gate.chosen = None

    with on_decoder_calls(model, before):
        yield gate


def whole_prompt(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Every token of the prompt."""
    return real


def none_of_it(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """No token of the prompt: with `generation` this is the answer alone."""
    return torch.zeros_like(real)


def last_of_prompt(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The decision position: what the model puts out there is the first token of its answer."""
    return real & (real.flip(1).cumsum(1).flip(1) == 1)


def occurrences(of: Sequence[Sequence[int]]) -> Choose:
    """The tokens of every place where one of these id sequences stands; raises ValueError for an empty one."""
    if not all(of):
        raise ValueError("a trigger without tokens stands nowhere")

    def choose(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        found = torch.zeros_like(real)
        for wanted in of:
            n = len(wanted)
            if n > ids.shape[1]:
                continue
            windows = ids.unfold(1, n, 1) == torch.tensor(wanted, device=ids.device)
            starts = windows.all(-1) & real.unfold(1, n, 1).all(-1)
            for i in range(n):
                found[:, i : i + starts.shape[1]] |= starts
        return found

    return choose
