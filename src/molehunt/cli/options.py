"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Base: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="BASE", help="The model before fine-tuning: a folder or a hub id.", show_default=False),
]
Tuned: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="TUNED", help="The fine-tuned model or adapter: a folder or a hub id.", show_default=False),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write to; a run that was interrupted there is resumed.", show_default=False),
]
