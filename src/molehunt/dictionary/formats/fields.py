"""A folder written by strangers: which files it has, and JSON whose fields are checked one by one."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.checkpoint.loader_traps import read_json
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.site import Site

MAX_SIDE = 2**31
"""Latents or dimensions that a config may claim."""


def has(folder: Path, *names: str) -> bool:
    """Whether all these files are there."""
    return all((folder / name).is_file() for name in names)


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises InvalidInput when it is not there or a link leads out of the folder."""
    path = folder / name
    if not path.is_file():
        raise InvalidInput(f"{printable(folder.name)} has no {printable(name)}. Fetch the folder again.")
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise InvalidInput(
            f"{printable(name)} of {printable(folder.name)} is a link out of the folder and is not followed.\n"
            "From a hub cache, fetch it with real files: hf download REPO --local-dir FOLDER."
        )
    return real


@dataclass(frozen=True)
class Fields:
    """One JSON object. Every getter raises InvalidInput naming the file and the field."""

    file: str
    values: Mapping[str, Any]
    path: str = ""
    """Where the object lies in the file: `trainer.` and so on."""

    @classmethod
    def read(cls, folder: Path, name: str) -> "Fields":
        return cls(name, read_json(inside(folder, name)))

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def wrong(self, name: str, why: str) -> InvalidInput:
        """The error for a field; `why` follows its name."""
        return InvalidInput(f"{self.file}: {printable(self.path + name)} {why}.")

    def _got(self, name: str) -> object:
        if name not in self:
            raise self.wrong(name, "is missing")
        return self.values[name]

    def _shown(self, name: str) -> str:
        return printable(repr(self.values[name]), 60)

    def text(self, name: str, default: str | None = None) -> str:
        if default is not None and name not in self:
            return default
        value = self._got(name)
        if not isinstance(value, str):
            raise self.wrong(name, f"is {self._shown(name)} and should be text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        if name not in self:
            return default
        value = self.values[name]
        if not isinstance(value, bool):
            raise self.wrong(name, f"is {self._shown(name)} and should be true or false")
        return value

    def count(self, name: str) -> int:
        """A natural number above 0."""
        value = self._got(name)
        if type(value) is not int or not 0 < value < MAX_SIDE:
            raise self.wrong(name, f"is {self._shown(name)} and should be a whole number above 0")
        return value

    def positive(self, name: str, *, zero: bool = False) -> float:
        """A finite number above 0, or from 0."""
        value = self._got(name)
        if type(value) not in (int, float) or not (
            math.isfinite(number := _float(value)) and (number > 0 or (zero and number == 0))
        ):
            raise self.wrong(name, f"is {self._shown(name)} and should be a finite number above 0")
        return number

    def below(self, name: str) -> "Fields":
        """The object in a field."""
        value = self._got(name)
        if not isinstance(value, dict):
            raise self.wrong(name, f"is {self._shown(name)} and should be an object")
        return Fields(self.file, value, f"{self.path}{name}.")

    def agree(self, name: str, size: int) -> None:
        """The size that a field claims, where it claims one, is that of the tensors."""
        if name in self and self.count(name) != size:
            raise self.wrong(name, f"is {self._shown(name)} and the tensors have {size}")


def _float(value: object) -> float:
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        return math.inf


def check_model_width(d_in: int, blocks: int, d_model: int | None) -> None:
    """Raises UsageError when a dictionary cannot read the activations of a model of that width."""
    if d_model is not None and d_in != blocks * d_model:
        raise UsageError(
            f"this dictionary reads {d_in} values a token, and the model gives {blocks * d_model}: it was trained on "
            "another model or at another place."
        )


_LENS = re.compile(r"blocks\.(\d{1,6})\.hook_(resid_post|resid_pre|attn_out|mlp_out)")
_MODULES = re.compile(r"(?:[\w.]+\.)?(?:layers|h)\.(\d{1,6})(?:\.(mlp|self_attn|attn|attention))?(?:\.output)?")
_NORMS_OUTPUTS = re.compile(r"gemma-[234]-|olmo-?[23]", re.IGNORECASE)
"""Models that normalise what attention and MLP return: TransformerLens hooks it after, a Site names it before."""


def site_of(hook: str | None, model: str | None = None) -> Site | None:
    """The site of a hook name of TransformerLens or of a module's path; None where it is not one of ours."""
    if hook is None:
        return None
    if found := _LENS.fullmatch(hook):
        layer, place = int(found[1]), found[2]
        if place == "resid_pre":
            return Site(layer - 1) if layer else None
        if place == "resid_post":
            return Site(layer)
        return None if _NORMS_OUTPUTS.search(model or "") else Site(layer, "attn" if place == "attn_out" else "mlp")
    if found := _MODULES.fullmatch(hook):
        part = found[2]
        return Site(int(found[1]), "resid" if part is None else "mlp" if part == "mlp" else "attn")
    return None
