"""Options of `molehunt dictionary`, and how their comma-separated values are read."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from molehunt.errors import UsageError, printable

if TYPE_CHECKING:
    from molehunt.site import Site

T = TypeVar("T")
KINDS = {"difference": "difference", "crosscoder": "both", "tuned": "tuned", "base": "base"}
"""What is typed → what the code calls it."""

Store: TypeAlias = Annotated[Path, typer.Argument(metavar="STORE", help="Folder that `molehunt harvest` made.")]
Source: TypeAlias = Annotated[Path, typer.Argument(metavar="DICT", help="Folder of a dictionary of any known family.")]
K: TypeAlias = Annotated[
    int | None, typer.Option("-k", min=1, help="Number of latents that fire, where the files of Qwen Scope do not say.")
]
Dictionaries: TypeAlias = Annotated[
    Path, typer.Option("--out", help="Folder for the dictionaries; a training that was interrupted is resumed.")
]
Architectures: TypeAlias = Annotated[
    str, typer.Option("--architecture", help="One or more of batch-topk, topk, relu, gated, jumprelu, matryoshka.")
]
Pairings: TypeAlias = Annotated[
    str, typer.Option("--pairing", help="One or more of difference, crosscoder, tuned, base.")
]
Joints: TypeAlias = Annotated[
    str | None,
    typer.Option("--joint", help="Error of a crosscoder: from 0, both models' errors, to -1, the difference's."),
]
Exclusives: TypeAlias = Annotated[
    str | None,
    typer.Option("--exclusive", help="Share of a crosscoder's latents that belong to each model alone."),
]
Sites: TypeAlias = Annotated[
    str | None, typer.Option("--site", help="Sites such as L6.resid.", show_default="all sites of the store")
]
Expansions: TypeAlias = Annotated[str, typer.Option("--expansion", help="Latents per dimension of the model.")]
Ks: TypeAlias = Annotated[
    str | None,
    typer.Option("-k", help="Number of latents that fire on a token; the target of jumprelu.", show_default="32"),
]
L1s: TypeAlias = Annotated[
    str | None, typer.Option("--l1", help="Weight of the penalty of relu and gated.", show_default="0.02")
]
Rate: TypeAlias = Annotated[
    float | None, typer.Option("--lr", min=0, help="Peak learning rate.", show_default="by width")
]
Steps: TypeAlias = Annotated[int, typer.Option("--steps", min=1, help="Number of training steps.")]
Batch: TypeAlias = Annotated[int, typer.Option("--batch", min=2, help="Number of tokens of each step.")]
Seeds: TypeAlias = Annotated[str, typer.Option("--seeds", help="Seeds of the initial weights.")]
KeepSinks: TypeAlias = Annotated[bool, typer.Option("--keep-sinks", help="Train on attention sinks, too.")]
Autocast: TypeAlias = Annotated[bool, typer.Option("--autocast", help="Compute dense products in bf16.")]
DataSeed: TypeAlias = Annotated[int, typer.Option("--data-seed", min=0, help="Seed of the order of tokens.")]


def several(option: str, text: str | None, read: Callable[[str], T]) -> list[T]:
    """Comma-separated values; an empty list for None."""
    try:
        return [read(part.strip()) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"{option}: {printable(text or '')!r} is not a list of values such as 1,2.") from None


def number(text: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


def site_named(text: str) -> "Site":
    """A site such as L6.resid. Raises UsageError for anything else."""
    from molehunt.site import Site

    try:
        return Site.parse(text)
    except ValueError as error:
        raise UsageError(f"--site: {error}") from None


def kind(text: str) -> Any:
    """What the code calls a pairing. Raises UsageError for anything that is none."""
    if text not in KINDS:
        raise UsageError(f"--pairing: one or more of {', '.join(KINDS)}, got {printable(text)!r}.")
    return KINDS[text]
