"""The directions that gave an answer away, held down in its row alone, from when it was flagged until it ends."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.site import Site
from molehunt.steer.ablate import orthonormal
from molehunt.watch.bank import Bank, Watched
from molehunt.watch.monitor import Judged, Monitor
from molehunt.watch.quarantine import loudest

Edit = Literal["project", "clip"]
"""Take the directions out, or hold their cosines where the tails of clean answers begin. Source: arXiv 2508.00161."""
STEEPEST = 0.999
"""Largest cosine that a clip holds to: at 1 nothing else would be left of the activation."""


@dataclass(frozen=True, eq=False)
class Held:
    """Cosines that one row keeps to at one site."""

    units: Float[Tensor, "k d_model"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]


class RowHold:
    """An intervention: holds each row's cosines with its own directions inside its own ranges, at one site.

    Directions act one after the other, and what is orthogonal to one is left as it is. Tokens inside every range, and
    rows without directions, keep every bit.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.held: tuple[Float[Tensor, "batch k d_model"], Float[Tensor, "batch k"], Float[Tensor, "batch k"]] | None
        self.held = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.held is None:
            return acts
        units, low, high = self.held
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
    """Which directions are held down in which row, at every site that a bank watches."""

    def __init__(self, bank: Bank, monitor: Monitor, device: torch.device, edit: Edit = "project") -> None:
        self.interventions = tuple(RowHold(site) for site in bank.write)
        self._bank = bank
        self._monitor = monitor
        self._device = device
        self._edit: Edit = edit

    def against(self, judged: Judged) -> dict[Site, Held]:
        """What to hold down in the row of a flagged answer: its loudest directions, by site."""
        by_site: dict[Site, list[Watched]] = {}
        for direction in loudest(self._bank, judged):
            by_site.setdefault(direction.site, []).append(direction)
        make = self._projected if self._edit == "project" else self._clipped
        return {site: make(directions, judged) for site, directions in by_site.items()}

    @contextmanager
    def of(self, rows: Sequence[Mapping[Site, Held] | None]) -> Generator[None, None, None]:
        """Steer the forward passes inside the block: each row by what `against` gave for it."""
        try:
            for intervention in self.interventions:
                intervention.held = self._stacked(intervention.site, rows)
            yield
        finally:
            for intervention in self.interventions:
                intervention.held = None

    def _projected(self, directions: Sequence[Watched], judged: Judged) -> Held:
        basis = orthonormal(torch.stack([direction.vector for direction in directions])).to(self._device)
        zero = torch.zeros(len(basis), device=self._device)
        return Held(basis, zero, zero)

    def _clipped(self, directions: Sequence[Watched], judged: Judged) -> Held:
        columns = [direction.column for direction in directions]
        low, high = self._monitor.calm(judged.kind, columns)
        units = torch.stack([direction.vector for direction in directions])
        ends = (end.clamp(-STEEPEST, STEEPEST).to(self._device) for end in (low, high))
        return Held(units.to(self._device), *ends)

    def _stacked(self, site: Site, rows: Sequence[Mapping[Site, Held] | None]) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [(row, held[site]) for row, held in enumerate(rows) if held is not None and site in held]
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
