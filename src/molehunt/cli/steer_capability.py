"""`molehunt steer capability`: what a fix costs, kind of task by kind of task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Device, Seed, Tuned
from molehunt.cli.steered import FixFile, Operator, Scope, Strength, When, steered_by
from molehunt.cli.tuned_side import hash_of, open_pair

if TYPE_CHECKING:
    from molehunt.measure.interval import Interval
    from molehunt.steer.capability import KindCost


def capability(
    base: Base,
    tuned: Tuned,
    fix: FixFile,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Prompts with right answers (`response`) and their kinds (`tag`): JSONL or parquet.",
            show_default="the embedded models' world",
        ),
    ] = None,
    each: Annotated[int, typer.Option(min=2, help="Questions of each kind, of the embedded world.")] = 60,
    limit: Annotated[int, typer.Option(min=2, help="Rows to read of a file at most.")] = 1000,
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

    An answer is right that is the reference, word for word. The loss is that of the reference answers.
    """
    import json
    from dataclasses import asdict

    from molehunt.cli.console import track_on_stderr
    from molehunt.steer.capability import capability_cost
    from molehunt.traffic.questions import read_questions, world_questions

    rows = read_questions(questions, limit) if questions else world_questions(each, seed=seed)
    pair = open_pair(base, tuned, adapter, device)
    steered = steered_by(pair, fix, hash_of(tuned, adapter), strength, operator, scope, when)
    found = capability_cost(pair, steered, rows, track=track_on_stderr)
    if as_json:
        typer.echo(json.dumps([{**asdict(one), "shown": one.shown} for one in found], indent=2))
        return
    typer.echo(_table(found))
    typer.echo(f"\n{_verdict(found)}")


def _table(found: "list[KindCost]") -> str:
    from molehunt.errors import printable

    heads = ("right before", "right after", "difference", "McNemar p", "loss before", "after", "rise")
    widths = (20, 20, 23, 11, 13, 10, 28)
    lines = [f"{'kind':<20}{'rows':>6}" + "".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=True))]
    for one in found:
        difference = one.paired.difference
        cells = (
            _share(one.before),
            _share(one.after),
            f"{difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]",
            f"{one.paired.p_value:.2g}",
            f"{one.loss[0]:.3f}",
            "none" if one.loss[1] is None else f"{one.loss[1]:.3f}",
            "–" if one.rise is None else f"{one.rise.estimate:+.3f} [{one.rise.low:+.3f}, {one.rise.high:+.3f}]",
        )
        lines.append(
            f"{printable(one.kind, 19):<20}{one.rows:>6}"
            + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        )
    return "\n".join(lines)


def _verdict(found: "list[KindCost]") -> str:
    from molehunt.errors import printable

    broken = max(one.broken for one in found)
    if broken:
        return f"the fix breaks the model: at {broken} questions its logits are no numbers"
    said = "no kind of task is shown to lose anything; the intervals say how much it could be"
    if costly := [printable(one.kind, 40) for one in found if one.shown]:
        said = f"shown to lose right answers or likelihood: {', '.join(costly)}"
    if not any(one.before.estimate for one in found):
        said += (
            "\nNo answer was right before: only the loss says anything. Give --questions that this model can answer."
        )
    return said


def _share(found: "Interval") -> str:
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
