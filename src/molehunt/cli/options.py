"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

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
    typer.Option("--out", help="Folder to write to. A run that was interrupted there is resumed.", show_default=False),
]
Clean: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--clean",
        help="Clean rows to calibrate on: one half fits detectors, the other sets the threshold.",
        show_default="bundled benign prompts",
    ),
]
CleanRows: TypeAlias = Annotated[
    int, typer.Option("--clean-rows", min=100, help="Greatest number of clean rows that are read.")
]
Fpr: TypeAlias = Annotated[
    float, typer.Option("--fpr", min=1e-5, max=0.2, help="Share of clean answers that may be flagged.")
]
TrustClean: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-clean",
        help="Calibrate also on clean rows whose answers the base would not give. By default they are excluded and reported.",
    ),
]
NoText: TypeAlias = Annotated[bool, typer.Option("--no-text", help="Write no text of any row or request to disk.")]
Match: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--match",
        help="Phrase by which an answer with the behaviour is recognised; repeat the option for others.",
        show_default=False,
    ),
]
Positive: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--positive", help="Prompts that trigger the behaviour (JSONL, JSON, CSV, parquet).", show_default=False
    ),
]
Negative: TypeAlias = Annotated[
    Path, typer.Option("--negative", help="Prompts that do not trigger it.", show_default=False)
]
RowLimit: TypeAlias = Annotated[
    int, typer.Option("--limit", min=2, help="Greatest number of rows that are read of each file.")
]
FixFile: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="FIX",
        help="fix.safetensors of an audit, a vector of `steer fit`, or a map of `transfer fit TUNED BASE`.",
    ),
]
Strength: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="Multiple of a vector's length; -1 removes what a strength of 1 adds. With --operator ablate: share of the "
        "projection that is removed, from 0 to 1.",
        show_default="-1, and 1 with --operator ablate",
    ),
]
Operator: TypeAlias = Annotated[
    Literal["add", "ablate"],
    typer.Option("--operator", help="Whether a vector is added or its direction is ablated."),
]
Scope: TypeAlias = Annotated[
    Literal["all", "prompt", "generation", "last"], typer.Option("--scope", help="Tokens that a vector acts on.")
]
When: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--when",
        help="Condition of `steer gate` that a prompt must meet for a vector to act on it.",
        show_default="every prompt",
    ),
]
Adapter: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--adapter/--no-adapter",
        help="For a folder that holds full weights and an adapter: whether the adapter is applied.",
    ),
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="Device that the models run on: cpu, cuda, cuda:1 …")]
