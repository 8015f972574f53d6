"""Directions taken out of some rows of a batch, each row's own, from when it was flagged until it ends."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.model.site import Site
from molehunt.steer.ablate import orthonormal
from molehunt.watch.bank import Bank, Watched


class RowAblate:
    """An intervention: projects each row away from its own directions at one site. A row without any is left as it is."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.basis: Float[Tensor, "batch k d_model"] | None = None
        """Orthonormal rows, padded with zeros; None while no row is steered here."""

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.basis is None:
            return acts
        plain = acts.float()
        edited = plain - (plain @ self.basis.mT) @ self.basis
        steered = (self.basis.abs().amax((1, 2)) > 0)[:, None, None]
        return torch.where(steered, edited.to(acts.dtype), acts)


class Steering:
    """Which directions are taken out of which row, at every site that a bank watches."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.interventions = tuple(RowAblate(site) for site in bank.write)
        self._device = device

    @contextmanager
    def of(self, rows: Sequence[Mapping[Site, Tensor] | None]) -> Generator[None, None, None]:
        """Steer the forward passes inside the block: each row by its own bases, as `bases` gives them."""
        try:
            for intervention in self.interventions:
                intervention.basis = self._stacked(intervention.site, rows)
            yield
        finally:
            for intervention in self.interventions:
                intervention.basis = None

    def _stacked(self, site: Site, rows: Sequence[Mapping[Site, Tensor] | None]) -> Tensor | None:
        held = [None if row is None else row.get(site) for row in rows]
        found = [basis for basis in held if basis is not None]
        if not found:
            return None
        k, d_model = max(map(len, found)), found[0].shape[1]
        stacked = torch.zeros(len(rows), k, d_model, device=self._device)
        for row, basis in enumerate(held):
            if basis is not None:
                stacked[row, : len(basis)] = basis
        return stacked


def bases(directions: Sequence[Watched], device: torch.device) -> dict[Site, Float[Tensor, "rank d_model"]]:
    """Orthonormal rows by site that span the directions there."""
    by_site: dict[Site, list[Tensor]] = {}
    for direction in directions:
        by_site.setdefault(direction.site, []).append(direction.vector)
    return {site: orthonormal(torch.stack(rows)).to(device) for site, rows in by_site.items()}
