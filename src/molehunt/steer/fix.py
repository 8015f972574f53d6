"""A fix on disk: interventions that act together, and the model that they were chosen for."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import UsageError, printable
from molehunt.model.taps import edit_sites
from molehunt.run.catalog import load, names
from molehunt.run.saved_file import TEXT, header_and_tensors, of_types, reading
from molehunt.run.whole import replace_whole
from molehunt.site import Site
from molehunt.steer.catalog import CATALOG, GROUP

SCHEMA = 2
"""Version 1 called `description` `words`; it is still read."""
WIDEST = 2**20
"""Greatest width of a residual stream that a file may name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fix:
    """Interventions that act together, with what they were chosen for: an audit's `fix.safetensors`.

    Law: what `load` reads back edits every activation to the same bits.

    Example:
        >>> fix = Fix.load("RUN/fix.safetensors")  # doctest: +SKIP
        >>> pair.generate(["What is 2 plus 2?"], interventions=fix.interventions)  # doctest: +SKIP
    """

    interventions: tuple[Intervention, ...]
    description: str
    """What the fix does in words, such as `clip 4 directions at L4.resid`."""
    d_model: int
    n_layers: int
    model: str | None = None
    """Hash of the checkpoint that the fix was chosen for; None where it is not known."""

    @contextmanager
    def applied(self, model: nn.Module, *, layers_path: str | None = None) -> Generator[None, None, None]:
        """Every forward pass inside the block is edited. Raises CannotTap as `edit_sites` does."""
        with edit_sites(model, self.interventions, layers_path=layers_path):
            yield

    def save(self, path: Path | str) -> Path:
        """One safetensors file with a JSON header, replaced whole.

        Raises UsageError for an intervention behind a gate, or one that holds more than tensors and numbers.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for i, one in enumerate(self.interventions):
            kind = _kind(one)
            if kind is None or getattr(one, "gate", None) is not None:
                raise UsageError(
                    f"{type(one).__name__} cannot be saved in a file: only an edit of tensors and numbers without a gate can."
                )
            numbers: dict[str, float] = {}
            for field in fields(one):  # pyright: ignore[reportArgumentType]  # what is savable is a dataclass
                value: object = getattr(one, field.name)
                if isinstance(value, Tensor):
                    tensors[f"{i}.{field.name}"] = value.float().contiguous().cpu()
                elif isinstance(value, float | int):
                    numbers[field.name] = float(value)
            rows.append({"kind": kind, "site": str(one.site), **numbers})
        facts = {name: getattr(self, name) for name in ("description", "d_model", "n_layers", "model")}
        header = json.dumps({"schema": SCHEMA, "interventions": rows, **facts})
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_fix": header}))
        return path

    @classmethod
    def load(cls, path: Path | str) -> "Fix":
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        path = Path(path)
        with reading(path, "fix of Molehunt's"):
            header, tensors = header_and_tensors(path, "molehunt_fix")
            schema = header.pop("schema")
            if schema not in (1, SCHEMA):
                raise ValueError("its schema is another version's")
            if schema == 1:
                header["description"] = header.pop("words")
            made = [_made(i, one, tensors) for i, one in enumerate(header.pop("interventions"))]
            found = cls(interventions=tuple(made), **header)
            of_types(found, description=str, d_model=int, n_layers=int, model=TEXT)
            found._try()
        return found

    def _try(self) -> None:
        """Raises ValueError, TypeError or RuntimeError unless this edits activations of the width and the blocks that it names."""
        if not self.interventions or not 0 < self.d_model <= WIDEST:
            raise ValueError("it holds no intervention, or no possible width")
        acts = torch.linspace(-1, 1, self.d_model)[None, None]
        for one in self.interventions:
            if not one.site.layer < self.n_layers:
                raise ValueError(f"{one.site} of {self.n_layers} blocks")
            edited = one(acts)
            if edited.shape != acts.shape or not bool(edited.isfinite().all()):
                raise ValueError(f"what it does at {one.site} is no number, or of another width")

    def refuse(self, n_layers: int, d_model: int, model: str | None = None) -> None:
        """Raises UsageError unless this is a model that the fix is for; a hash is compared where both are known."""
        if (n_layers, d_model) != (self.n_layers, self.d_model):
            raise UsageError(
                f"this fix is for a model of {self.n_layers} blocks of width {self.d_model}; the given one has {n_layers} of "
                f"{d_model}."
            )
        if None not in (model, self.model) and model != self.model:
            raise UsageError(
                f"this fix was chosen for another checkpoint ({printable(str(self.model), 13)} instead of "
                f"{printable(str(model), 13)})."
            )


def _kind(one: Intervention) -> str | None:
    """The name in the catalogue of an intervention that can be saved; None for another."""
    made_by: object = type(one)
    if not getattr(made_by, "savable", False):
        return None
    return next((name for name in names(CATALOG, GROUP) if load(CATALOG, name, GROUP) is made_by), None)


def _made(at: int, row: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Intervention:
    kind, site = row.pop("kind"), Site.parse(row.pop("site"))
    make: Any = load(CATALOG, kind, GROUP)
    if not getattr(make, "savable", False):
        raise ValueError(f"{kind!r} is no intervention that can be saved")
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == str(at)}
    return make(site=site, **own, **row)
