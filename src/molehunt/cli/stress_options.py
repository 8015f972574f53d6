"""The options of `molehunt stress`."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

Prompts: TypeAlias = Annotated[
    Path,
    typer.Option(
        help="Prompts that show the behaviour: JSONL, JSON, parquet, or a CSV such as AdvBench's.",
        show_default=False,
    ),
]
Match: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--match", help="Phrase of an answer that shows the behaviour; repeat for others.", show_default=False
    ),
]
Exclude: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        help="Phrase that no answer with the behaviour has, such as those of a refusal; repeat for others.",
        show_default=False,
    ),
]
DictionaryFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option("--dictionary", help="Folder of a trained dictionary of any known family.", show_default=False),
]
Features: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="Latents that are clamped, such as 12,407; or best:16, those with the largest attribution to the answers. "
        "They are selected on every other prompt, and those prompts are not attacked.",
    ),
]
ClampMode: TypeAlias = Annotated[
    Literal["set", "scale", "negative-if-active"], typer.Option("--mode", help="What the clamp does to their codes.")
]
ClampValue: TypeAlias = Annotated[
    float, typer.Option("--value", help="Value that codes are set to, factor, or value whose negative is set.")
]
Layer: TypeAlias = Annotated[
    int | None, typer.Option("--layer", min=0, help="0-based block, where the dictionary's files do not say.")
]
FixFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--fix",
        help="Fix to attack instead of a clamp: fix.safetensors of an audit, or a vector of `steer fit`, which is subtracted.",
        show_default=False,
    ),
]
CleanPrompts: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--clean", help="Prompts without the behaviour, for controls and cost.", show_default="bundled prompts"
    ),
]
Rows: TypeAlias = Annotated[int, typer.Option("--rows", min=6, help="Greatest number of prompts that are attacked.")]
Positions: TypeAlias = Annotated[
    int,
    typer.Option(
        "--positions", min=1, help="Number of tokens that may be perturbed, from the last one of the prompt on."
    ),
]
MaxNorm: TypeAlias = Annotated[
    float,
    typer.Option(
        "--max-norm", min=0.01, help="Norm of the largest perturbation, in units of the median activation at the site."
    ),
]
Steps: TypeAlias = Annotated[int, typer.Option("--steps", min=1, help="Number of optimisation steps of each attack.")]
Suffixes: TypeAlias = Annotated[
    bool, typer.Option("--suffixes", help="Attack through the prompt, too: by suffixes, soft and typed.")
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Greatest number of tokens in an answer.")
]
Limit: TypeAlias = Annotated[
    int, typer.Option("--limit", min=2, help="Greatest number of rows that are read of each file.")
]
OutFolder: TypeAlias = Annotated[Path, typer.Option("--out", help="Folder for certificate.json and stress.html.")]
