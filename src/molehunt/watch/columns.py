"""Scores of every token against every watched direction: one matmul per place, or one for all places of a width."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from molehunt.errors import NotTestable, printable
from molehunt.model.blocks import modules_named
from molehunt.model.taps import live, observe_sites
from molehunt.watch.bank import Bank


@dataclass(frozen=True, eq=False)
class _Place:
    """A place in the model at which some of the columns are scored."""

    turned: Float[Tensor, "width k"]
    """The directions of the place, one a column, on the model's device."""
    cosine: bool
    """Whether the activation's own length is divided out."""

    def score(self, acts: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos k"]:
        return _scored(acts.float(), self.turned, cosine=self.cosine)


@dataclass(frozen=True, eq=False)
class _PlaceGroup:
    """Places of one side and width that one product scores; empty directions pad them to one number of columns."""

    at: tuple[int, ...]
    turned: Float[Tensor, "places width k"]
    cosine: bool

    def score(self, steps: Sequence[Sequence[Tensor]]) -> Float[Tensor, "tokens columns"]:
        """Scores of the newest tokens of every row in several steps: row by row, then step by step."""
        acts = torch.stack([torch.cat([step[place] for step in steps], dim=1).flatten(0, 1) for place in self.at])
        return _scored(acts.float(), self.turned, cosine=self.cosine).transpose(0, 1).flatten(1)


def _scored(acts: Tensor, turned: Tensor, *, cosine: bool) -> Tensor:
    columns = acts @ turned
    return columns / acts.norm(dim=-1, keepdim=True).clamp_min(1e-12) if cosine else columns


class Columns:
    """The columns of the last forward pass, or of several cached steps, whose activations are queued for one product.

    A pass over many tokens is scored where it runs, so that no activation outlives its block. A step of one token a row
    is a few kilobytes: there the calls cost more than the arithmetic, so all places are scored together.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places
        self._groups, self._order = _grouped(places)
        self.device = self._order.device
        self._parts: list[Tensor | None] = [None] * len(places)
        self._steps: list[list[Tensor]] = []
        self._positions: Int[Tensor, "batch pos"] | None = None
        self.rows = 1
        """Number of rows of the batch that is running."""
        self.passed = 0
        """Number of tokens of each row, padding included, that reached the watched places in the last pass."""

    @contextmanager
    def only(self, positions: Int[Tensor, "batch pos"]) -> Generator[None, None, None]:
        """Score some tokens of the passes inside the block, counted through all rows of a pass, and no others."""
        self._positions = positions.to(self.device)
        try:
            yield
        finally:
            self._positions = None

    def take(self) -> Float[Tensor, "batch pos columns"]:
        """Every column of the last pass, in the bank's order, in fp32; each pass can be taken once.

        Raises:
            RuntimeError: a place was not reached since the last take.
        """
        parts = self._reached()
        if self._at_once(parts[0]):
            return self._together([parts])
        return torch.cat(parts, dim=-1)

    def queue(self) -> None:
        """Queue the last pass, a step of one token a row. Raises as `take`; ValueError for another kind of pass."""
        parts = self._reached()
        if not self._at_once(parts[0]):
            raise ValueError("only a step of one token a row can be queued")
        self._steps.append(parts)

    @property
    def queued(self) -> int:
        """Number of queued steps."""
        return len(self._steps)

    def take_queued(self) -> Float[Tensor, "batch steps columns"]:
        """Columns of all queued steps, which one batch made. Raises RuntimeError where there are none."""
        if not self._steps:
            raise RuntimeError("no step is queued")
        steps, self._steps = self._steps, []
        return self._together(steps)

    def forget(self) -> None:
        """Drop all activations: the batch that they belong to is gone."""
        self._parts, self._steps = [None] * len(self._parts), []

    def see(self, place: int, acts: Float[Tensor, "batch _ width"] | Float[Tensor, "tokens width"]) -> None:
        """Take the activations that a forward pass computed at a place."""
        if acts.ndim == 2:  # OPT hands its MLP the tokens of all rows in one dimension, row after row
            acts = acts.unflatten(0, (self.rows, -1))
        self.passed = acts.shape[1]
        if self._positions is not None:
            acts = acts.flatten(0, 1).index_select(0, self._positions.flatten()).unflatten(0, self._positions.shape)
        self._parts[place] = acts if self._at_once(acts) else self._places[place].score(acts)

    @staticmethod
    def _at_once(acts: Tensor) -> bool:
        return acts.shape[1] == 1

    def _reached(self) -> list[Tensor]:
        parts = [part for part in self._parts if part is not None]
        if len(parts) < len(self._parts):
            raise RuntimeError("a watched place was not reached by this forward pass: its tokens are not covered")
        self._parts = [None] * len(self._parts)
        return parts

    def _together(self, steps: Sequence[Sequence[Tensor]]) -> Float[Tensor, "batch steps columns"]:
        columns = torch.cat([group.score(steps) for group in self._groups], dim=1)
        return columns.index_select(1, self._order).unflatten(0, (-1, len(steps)))


def _grouped(places: Sequence[_Place]) -> tuple[list[_PlaceGroup], Int[Tensor, " columns"]]:
    """Places of one side and width together; and where each column of the bank lies among what the groups give."""
    by_width: dict[tuple[bool, int], list[int]] = {}
    for at, place in enumerate(places):
        by_width.setdefault((place.cosine, len(place.turned)), []).append(at)
    groups: list[_PlaceGroup] = []
    starts: dict[int, int] = {}
    width = 0
    for (cosine, _), members in by_width.items():
        most = max(places[at].turned.shape[1] for at in members)
        turned = torch.stack([pad(places[at].turned, (0, most - places[at].turned.shape[1])) for at in members])
        groups.append(_PlaceGroup(tuple(members), turned, cosine))
        starts |= {at: width + i * most for i, at in enumerate(members)}
        width += most * len(members)
    order = [starts[at] + column for at, place in enumerate(places) for column in range(place.turned.shape[1])]
    return groups, torch.tensor(order, device=places[0].turned.device)


@contextmanager
def watched(model: nn.Module, bank: Bank, *, layers_path: str | None = None) -> Generator[Columns, None, None]:
    """Score every forward pass inside the block against the directions of `bank`.

    Write side: cos(h, u) at each block's output (arXiv 2508.00161 §3). Read side: σ·(v·a) at each changed matrix's
    input a, the coordinates of what the fine-tune adds to its output; ‖σVᵀa‖ is their length. Activations stay on
    the model's device.

    Raises:
        NotTestable: the model has no such matrix.
        CannotTap: hooks cannot see its blocks (see `taps`).
    """
    device = next(model.parameters()).device
    written = [_Place(rows.to(device).mT.contiguous(), cosine=True) for rows in bank.write.values()]
    read = [_Place(rows.to(device).mT.contiguous(), cosine=False) for rows in bank.read.values()]
    found = Columns([*written, *read])

    def at_output(place: int) -> Callable[[Tensor], None]:
        return lambda acts: found.see(place, acts)

    def at_input(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: found.see(place, args[0])

    def count_rows(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.rows = len(args[0])

    handles = [cast("Any", model).get_input_embeddings().register_forward_pre_hook(live(count_rows))]
    try:
        for place, name in enumerate(bank.read, len(bank.write)):
            named = modules_named(model, name)
            if len(named) != 1:
                raise NotTestable(
                    f"This model has {len(named) or 'no'} {printable(name)}: the directions are of another model."
                )
            handles.append(named[0].register_forward_pre_hook(live(at_input(place))))
        with observe_sites(
            model, {site: at_output(place) for place, site in enumerate(bank.write)}, layers_path=layers_path
        ):
            yield found
    finally:
        for handle in handles:
            handle.remove()
