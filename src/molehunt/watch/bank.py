"""The watched directions: the singular directions of every matrix that a fine-tune changed. They need no data.

Source: WeightWatch, arXiv 2508.00161 §3 (there the write side of the two matrices that write to the residual stream).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.direction.direction import Directions
from molehunt.errors import NotTestable
from molehunt.measure.control import random_directions
from molehunt.model.blocks import module_role
from molehunt.site import Site

EXPERT = re.compile(r"\.(?:experts|block_sparse_moe)\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class WatchedDirection:
    """One watched direction by name: what an alert names and an intervention ablates."""

    name: str
    """Name such as `L3 down #0`."""
    site: Site
    vector: Float[Tensor, " d_model"]
    """Unit length; what the change writes to the residual stream."""
    column: int
    """Column of its cosine."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Bank:
    """Directions by where they are scored: a matmul at each block's output, and at each writing matrix's input."""

    write: Mapping[Site, Float[Tensor, "_ d_model"]]
    """Unit rows: what the changed matrices of a block write to the residual stream."""
    read: Mapping[str, Float[Tensor, "_ _"]]
    """Rows σ·v of each matrix: their product with its input is the size of each singular component of the change."""
    write_names: Mapping[Site, tuple[str, ...]]
    """Names such as `L3 down #0`, in the order of the rows."""
    read_names: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, changes: Iterable[Directions], model_type: str, *, k: int = 8) -> "Bank":
        """The `k` strongest directions of every change to a matrix that writes to the residual stream.

        Args:
            changes: each with the directions above its noise floor; one without any is left out, and so are matrices
                that write elsewhere.
            model_type: as in `config.json`.
            k: rows per matrix at most.

        Raises:
            NotTestable: no such matrix changed measurably, so there is nothing to watch.
        """
        write: dict[Site, list[tuple[str, Tensor]]] = {}
        read: dict[str, Tensor] = {}
        names: dict[str, tuple[str, ...]] = {}
        for change in changes:
            role = module_role(change.name, model_type)
            kept = min(k, len(change.strength))
            if role is None or not role.writes or not kept:
                continue
            module = change.name.removesuffix(".weight")
            expert = EXPERT.search(module)
            part = f"{role.part} of expert {expert[1]}" if expert else role.part
            names[module] = tuple(f"L{role.layer} {part} #{i}" for i in range(kept))
            if expert is None:  # an expert sees the tokens that are routed to it alone, and is no module of its own
                read[module] = (change.read * change.strength[:, None])[:kept].float().contiguous()
            rows = write.setdefault(Site(role.layer), [])
            rows += zip(names[module], change.write[:kept].float(), strict=True)
        if not write:
            raise NotTestable(
                "No matrix that writes to the residual stream changed by more than rounding explains, so there is no "
                "direction to watch.\nIf the fine-tune was merged into 8-bit or 4-bit weights, give the adapter or the "
                "unquantised release."
            )
        return cls(
            write={site: torch.stack([row for _, row in rows]) for site, rows in sorted(write.items())},
            read=read,
            write_names={site: tuple(name for name, _ in rows) for site, rows in sorted(write.items())},
            read_names={module: names[module] for module in read},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each column: write side by site, then read side by matrix."""
        write = (f"{name} written" for names in self.write_names.values() for name in names)
        read = (f"{name} read" for names in self.read_names.values() for name in names)
        return (*write, *read)

    @property
    def written(self) -> int:
        """Number of columns that are write-side cosines; those after them are read-side coordinates."""
        return sum(map(len, self.write.values()))

    def direction(self, column: int) -> WatchedDirection:
        """The direction behind a column, or behind its negative: see `Profile`."""
        each = [
            (name, site, row)
            for site, rows in self.write.items()
            for name, row in zip(self.write_names[site], rows, strict=True)
        ]
        written = [WatchedDirection(name, site, row, i) for i, (name, site, row) in enumerate(each)]
        name = self.names[column % len(self.names)].rpartition(" ")[0]
        return next(one for one in written if one.name == name)

    def sha256(self) -> str:
        """Hash of all directions and their places, by which a saved state knows its bank."""
        digest = hashlib.sha256()
        for key, rows in [*self.write.items(), *self.read.items()]:
            digest.update(f"{key}\0{tuple(rows.shape)}\0".encode())
            digest.update(rows.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def random(self, seed: int) -> "Bank":
        """A control bank: as many random orthonormal directions at the same places, with the same lengths."""
        write = {
            site: random_directions(min(rows.shape), rows.shape[1], seed + i)
            for i, (site, rows) in enumerate(self.write.items())
        }
        read = {
            name: random_directions(rows.shape[0], rows.shape[1], seed + 10_000 + i) * rows.norm(dim=1, keepdim=True)
            for i, (name, rows) in enumerate(self.read.items())
        }
        return Bank(
            write=write,
            read=read,
            write_names={site: self.write_names[site][: len(rows)] for site, rows in write.items()},
            read_names=self.read_names,
        )
