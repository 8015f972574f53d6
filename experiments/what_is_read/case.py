"""One pair of folders with its truth: what a way of saving writes, and what a reader of it must say."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from experiments.what_is_read.alphabet import tokenizer
from experiments.what_is_read.planted import plant_, plants
from experiments.what_is_read.zoo import zoo_model

COMMANDS = ("files", "directions", "read", "audit", "watch")
"""The columns: `read` is `ModelPair.load`, with which audit, watch, serve and stress load their models."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The folders of one cell."""

    base: Path
    tuned: Path
    copy: Path | None
    """The base saved in the same way as the fine-tune, without any change; None where no such folder exists."""
    base_model: nn.Module
    tuned_model: nn.Module
    """What the folders hold, in memory; an adapter merged."""
    running: nn.Module | None = None
    """An adapter that is not merged, which differs from the merged one where embedding and head are one."""
    options: tuple[str, ...] = ()
    """What every command is given besides, such as `--adapter`."""
    cache: Path | None = None
    """The hub's cache, where base and fine-tune are given by their hub ids."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """One way of saving a fine-tune."""

    name: str
    what: str
    """What is written, for the page."""
    make: Callable[[str, Path], Case]
    """Writes the folders of an architecture into an empty folder."""
    on: tuple[str, ...] | None = None
    """Architectures that it exists for; None for all."""
    rounding: float = 0.0
    """‖ΔW‖/‖W‖ up to which a change may be rounding of the format; 0 where an unchanged copy has the very numbers of the base."""
    tolerance: float = 1e-3
    """Relative error of a singular value that the format itself explains."""
    finding: str = ""
    """What a finding of `files` has to mention, where the folder must or may give one."""
    may: tuple[str, ...] = ()
    """Commands that may answer NOT TESTABLE or refuse, since the way of saving gives them no choice; see `why`."""
    why: str = ""
    loads: bool = True
    """Whether loaders find the weights. Where they do not, a command that gives a result without a finding is wrong."""
    close: float = 2e-3
    """Difference of two logits, relative to the largest one, that the order of sums and the format explain."""
    like_single: bool = False
    """Whether the weights are those of the way `single`, number by number, so that audit and watch measure the same."""
    runs_rounded: bool = False
    """Whether the loaded model computes in another way than the weights in memory, such as with rounded activations."""

    def applies(self, architecture: str) -> bool:
        return self.on is None or architecture in self.on


def save(model: nn.Module, folder: Path, **options: object) -> Path:
    """Model and tokenizer, as transformers writes them."""
    cast("Any", model).save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def pair_in_memory(architecture: str, **changed: Any) -> tuple[nn.Module, nn.Module]:
    """A base, and the same with the planted changes."""
    base = zoo_model(architecture, **changed)
    tuned = copy.deepcopy(base)
    plant_(tuned, plants(tuned))
    return base, tuned


def whole(write: Callable[[nn.Module, Path], object], **changed: Any) -> Callable[[str, Path], Case]:
    """A case whose base is one plain file and whose fine-tune is written by `write`, whole."""

    def make(architecture: str, folder: Path) -> Case:
        base, tuned = pair_in_memory(architecture, **changed)
        save(base, folder / "base")
        for name, model in (("tuned", tuned), ("copy", base)):
            write(copy.deepcopy(model), folder / name)
        return Case(
            base=folder / "base", tuned=folder / "tuned", copy=folder / "copy", base_model=base, tuned_model=tuned
        )

    return make


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
