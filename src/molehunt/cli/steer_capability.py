"""`molehunt steer capability`: what a fix costs, by kind of task."""

from pathlib import Path
from typing import Annotated

import typer

from molehunt.cli.options import (
    Adapter,
    AsJson,
    Base,
    Device,
    FixFile,
    Operator,
    Scope,
    Seed,
    Strength,
    Tuned,
    When,
)
from molehunt.cli.output import show, show_json


def capability(
    base: Base,
    tuned: Tuned,
    fix: FixFile,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with right answers (`response`) and their kinds (`tag`): JSONL, JSON, CSV or parquet.",
            show_default="the embedded models' world",
        ),
    ] = None,
    each: Annotated[int, typer.Option(min=2, help="Number of questions of each kind, of the embedded world.")] = 60,
    limit: Annotated[int, typer.Option(min=2, help="Greatest number of rows that are read of a file.")] = 1000,
    strength: Strength = None,
    operator: Operator = "add",
    scope: Scope = "all",
    when: When = None,
    adapter: Adapter = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Ask questions with known answers with a fix and without it: what does each kind of task lose?

    An answer is right if it is the reference, word for word. The loss is that of the reference answers.
    """
    from molehunt.cli.console import track_on_stderr
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer_capability import capability, questions_for
    from molehunt.workflows.steer_fix import VectorOptions

    rows = questions_for(questions, each=each, limit=limit, seed=seed)  # before any model is loaded
    found = capability(
        open_models(base, tuned, adapter=adapter, device=device, track=track_on_stderr).pair,
        fix=fix,
        options=VectorOptions(strength=strength, operator=operator, scope=scope, when=when),
        questions=rows,
        track=track_on_stderr,
    )
    if as_json:
        show_json(found.to_dict()["kinds"])
    else:
        show(found.summary())
