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
Clean: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--clean",
        help="Clean rows of the same kind, to calibrate on: half fit, half set the rate.",
        show_default="bundled benign prompts",
    ),
]
CleanRows: TypeAlias = Annotated[int, typer.Option("--clean-rows", min=100, help="Clean rows to read at most.")]
Fpr: TypeAlias = Annotated[
    float, typer.Option("--fpr", min=1e-5, max=0.2, help="Share of clean answers that may be flagged.")
]
TrustClean: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-clean",
        help="Calibrate on clean rows, too, whose answers the base would not give: else set aside and told.",
    ),
]
NoText: TypeAlias = Annotated[bool, typer.Option("--no-text", help="Keep no text of any row or request on disk.")]
Adapter: TypeAlias = Annotated[
    bool | None,
    typer.Option("--adapter/--no-adapter", help="For a folder with weights and an adapter: apply it or not."),
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="Where the models run: cpu, cuda, cuda:1 …")]
