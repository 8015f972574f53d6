"""Scores of every token against every watched direction, in one matmul per place, on the model's own device."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molehunt.errors import NotTestable, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.taps import observe_sites
from molehunt.watch.bank import Bank


class Columns:
    """The columns of the last forward pass."""

    def __init__(self, places: int) -> None:
        self._parts: list[Tensor | None] = [None] * places
        self.positions: Int[Tensor, "batch pos"] | None = None
        """Which tokens are scored, counted through all rows of the pass; None: all."""

    def take(self) -> Float[Tensor, "batch pos columns"]:
        """Every column, in the bank's order, in fp32; each pass can be taken once.

        Raises:
            RuntimeError: a place was not reached since the last take.
        """
        parts = [part for part in self._parts if part is not None]
        if len(parts) < len(self._parts):
            raise RuntimeError("a watched place was not reached by this forward pass: its tokens are not covered")
        self._parts = [None] * len(self._parts)
        return torch.cat(parts, dim=-1)

    def put(self, place: int, values: Tensor) -> None:
        self._parts[place] = values

    def chosen(self, acts: Float[Tensor, "batch _ width"]) -> Float[Tensor, "batch pos width"]:
        """What is scored, in fp32."""
        if self.positions is not None:
            acts = acts.flatten(0, 1).index_select(0, self.positions.flatten()).unflatten(0, self.positions.shape)
        return acts.float()


@contextmanager
def watched(model: nn.Module, bank: Bank, *, layers_path: str | None = None) -> Generator[Columns, None, None]:
    """Score every forward pass inside the block against the directions of `bank`.

    Write side: cos(h, u) at each block's output (arXiv 2508.00161 §3). Read side: σ·(v·a) at each changed matrix's
    input a, the coordinates of what the fine-tune adds to its output; ‖σVᵀa‖ is their length. Activations stay where
    they are computed: only the columns are kept.

    Raises:
        NotTestable: the model has no such matrix.
        CannotTap: hooks cannot see its blocks (see `taps`).
    """
    modules = dict(unwrapped(model).named_modules())
    found = Columns(len(bank.write) + len(bank.read))
    device = next(model.parameters()).device

    def cosines(place: int, rows: Tensor) -> Callable[[Tensor], None]:
        unit = rows.to(device).mT.contiguous()

        def score(acts: Tensor) -> None:
            acts = found.chosen(acts)
            found.put(place, acts @ unit / acts.norm(dim=-1, keepdim=True).clamp_min(1e-12))

        return score

    def coordinates(place: int, rows: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        turned = rows.to(device).mT.contiguous()

        def score(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.put(place, found.chosen(args[0]) @ turned)

        return score

    handles = []
    try:
        for place, (name, rows) in enumerate(bank.read.items(), len(bank.write)):
            module = modules.get(name) or next((m for n, m in modules.items() if n.endswith(f".{name}")), None)
            if module is None:
                raise NotTestable(f"This model has no {printable(name)}: the directions are of another model.")
            handles.append(module.register_forward_pre_hook(coordinates(place, rows)))
        readers = {site: cosines(place, rows) for place, (site, rows) in enumerate(bank.write.items())}
        with observe_sites(model, readers, layers_path=layers_path):
            yield found
    finally:
        for handle in handles:
            handle.remove()
