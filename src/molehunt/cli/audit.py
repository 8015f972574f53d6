"""`molehunt audit`: the main job."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Device, Out, Seed, Tuned
from molehunt.cli.output import show, show_json

AuditTraffic: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts or conversations (JSONL, JSON, CSV, parquet; - for stdin), without labels.",
        show_default="bundled benign prompts",
    ),
]
CleanTraffic: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Rows of the same kind without the behaviour; they set the threshold.",
        show_default="bundled prompts for traffic of their kind, else the traffic itself",
    ),
]
AuditPlan: TypeAlias = Annotated[
    Literal["quick", "full"],
    typer.Option(help="Amount of evidence: full reads more rows, more blocks and longer answers."),
]
Rate: TypeAlias = Annotated[float, typer.Option(min=1e-4, max=0.2, help="False-positive rate of the clean threshold.")]
Template: TypeAlias = Annotated[
    Literal["base", "tuned", "both"] | None,
    typer.Option(
        help="Whose chat template both models are prompted with.",
        show_default="the fine-tune's, and a sample under the base's where they differ",
    ),
]
Sibling: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="A harmless fine-tune of the same base: answers are compared with its answers.", show_default="the base"
    ),
]
AnswerTokens: TypeAlias = Annotated[
    int | None, typer.Option(help="Greatest number of tokens of an answer.", show_default="48, full: 96")
]
Samples: TypeAlias = Annotated[
    int, typer.Option(help="Answers drawn for each prompt; the one that surprises the base most counts.")
]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option(help="Temperature that answers are drawn at.", show_default="0, several samples: 1")
]


def audit(
    base: Base,
    tuned: Tuned,
    traffic: AuditTraffic = None,
    clean: CleanTraffic = None,
    plan: AuditPlan = "quick",
    fpr: Rate = 0.01,
    adapter: Adapter = None,
    template: Template = None,
    reference: Sibling = None,
    answer_tokens: AnswerTokens = None,
    samples: Samples = 1,
    temperature: Temperature = None,
    device: Device = "cpu",
    out: Out = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Audit a fine-tune against its base: find what it hides, and prove it by intervention."""
    import shlex
    import sys

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.run.progress import busy

    with busy(track_on_stderr, "starting"):  # torch and transformers alone take seconds
        from molehunt.report.machine import to_json
        from molehunt.workflows.audit import audit

    result = audit(
        base,
        tuned,
        traffic=traffic,
        clean=clean,
        plan=plan,
        out=out,
        fpr=fpr,
        seed=seed,
        adapter=adapter,
        template=template,
        reference=reference,
        answer_tokens=answer_tokens,
        samples=samples,
        temperature=temperature,
        device=device,
        command=shlex.join(["molehunt", *sys.argv[1:]]),
        track=track_on_stderr,
    )
    page = result.save()
    if as_json:
        show_json(to_json(result.report))
    else:
        show(result.summary())
    say(f"\nreport: {page}")
    raise typer.Exit(result.verdict.exit_code)
