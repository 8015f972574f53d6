"""Removes the top-scoring directions of a flagged answer in its row alone, from the flag until the answer ends."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.site import Site
from molehunt.steer.ablate import orthonormal
from molehunt.watch.bank import Bank, WatchedDirection
from molehunt.watch.monitor import Judgement, Monitor
from molehunt.watch.quarantine import top_scoring

Edit = Literal["project", "clip"]
"""Project the directions out, or clip their cosines to where the tails of clean answers begin. Source: arXiv 2508.00161."""
STEEPEST = 0.999
"""Largest cosine that a clip leaves: at 1 nothing else would be left of the activation."""


@dataclass(frozen=True, eq=False)
class CosineBounds:
    """Bounds of the cosines of one row with several directions at one site."""

    units: Float[Tensor, "k d_model"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]


class RowClamp:
    """An intervention that clips each row's cosines with its own directions to its own bounds, at one site.

    Directions act one after the other, and what is orthogonal to one is left as it is. Tokens inside all bounds, and
    rows without directions, keep every bit.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.bounds: tuple[Float[Tensor, "batch k d_model"], Float[Tensor, "batch k"], Float[Tensor, "batch k"]] | None
        self.bounds = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.bounds is None:
            return acts
        units, low, high = self.bounds
        plain = acts.float()
        for j in range(units.shape[1]):
            unit = units[:, None, j]
            along = (plain * unit).sum(-1, keepdim=True)
            cosine = along / plain.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            wanted = cosine.maximum(low[:, None, j, None]).minimum(high[:, None, j, None])
            rest = plain - along * unit
            moved = rest + unit * rest.norm(dim=-1, keepdim=True) * wanted / (1 - wanted.square()).sqrt()
            plain = torch.where(wanted == cosine, plain, moved)
        return plain.to(acts.dtype)


class Steering:
    """The directions that are removed in each row, at every site that a bank watches."""

    def __init__(self, bank: Bank, monitor: Monitor, device: torch.device, edit: Edit = "project") -> None:
        self.interventions = tuple(RowClamp(site) for site in bank.write)
        self._bank = bank
        self._monitor = monitor
        self._device = device
        self._edit: Edit = edit

    def against(self, judged: Judgement) -> dict[Site, CosineBounds]:
        """The bounds for the row of a flagged answer: its top-scoring directions, by site."""
        by_site: dict[Site, list[WatchedDirection]] = {}
        for direction in top_scoring(self._bank, judged):
            by_site.setdefault(direction.site, []).append(direction)
        make = self._projected if self._edit == "project" else self._clipped
        return {site: make(directions, judged) for site, directions in by_site.items()}

    @contextmanager
    def of(self, rows: Sequence[Mapping[Site, CosineBounds] | None]) -> Generator[None, None, None]:
        """Steer the forward passes inside the block: each row by what `against` gave for it."""
        try:
            for intervention in self.interventions:
                intervention.bounds = self._stacked(intervention.site, rows)
            yield
        finally:
            for intervention in self.interventions:
                intervention.bounds = None

    def _projected(self, directions: Sequence[WatchedDirection], judged: Judgement) -> CosineBounds:
        basis = orthonormal(torch.stack([direction.vector for direction in directions])).to(self._device)
        zero = torch.zeros(len(basis), device=self._device)
        return CosineBounds(basis, zero, zero)

    def _clipped(self, directions: Sequence[WatchedDirection], judged: Judgement) -> CosineBounds:
        columns = [direction.column for direction in directions]
        low, high = self._monitor.clean_tails(judged.stratum, columns)
        units = torch.stack([direction.vector for direction in directions])
        ends = (end.clamp(-STEEPEST, STEEPEST).to(self._device) for end in (low, high))
        return CosineBounds(units.to(self._device), *ends)

    def _stacked(
        self, site: Site, rows: Sequence[Mapping[Site, CosineBounds] | None]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [(row, bounds[site]) for row, bounds in enumerate(rows) if bounds is not None and site in bounds]
        if not found:
            return None
        k, d_model = max(len(one.units) for _, one in found), found[0][1].units.shape[1]
        units = torch.zeros(len(rows), k, d_model, device=self._device)
        low = torch.full((len(rows), k), -1.0, device=self._device)
        high = -low
        for row, one in found:
            n = len(one.units)
            units[row, :n], low[row, :n], high[row, :n] = one.units, one.low, one.high
        return units, low, high
