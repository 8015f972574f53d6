"""`molehunt watch`: judge every row of a log at a chosen false-alarm rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Clean, CleanRows, Device, Fpr, NoText, Seed, Tuned

if TYPE_CHECKING:
    from molehunt.cli.watching import Watching
    from molehunt.watch.alert import Alert
    from molehunt.watch.simulate import Simulated

OUT = Path("watch")


def watch(
    base: Base,
    tuned: Tuned,
    traffic: Annotated[
        Path, typer.Option(help="Log to watch: JSONL, JSONL.gz or parquet, of any size.", show_default=False)
    ],
    clean: Clean = None,
    clean_rows: CleanRows = 2000,
    fpr: Fpr = 0.01,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate for a row whose answer was not logged.")
    ] = 32,
    attacks: Annotated[
        Path | None,
        typer.Option(
            help="Simulate: insert these rows into the traffic, taken as benign, and tell what is seen of the 1st, 10th, "
            "100th repeat, beside the published range.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each attack of a simulation comes.")] = 100,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count rows that cannot be read.")] = False,
    no_text: NoText = False,
    shard: Annotated[str, typer.Option("--shard", help="This machine's share of the rows, such as 3/64.")] = "1/1",
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for state, verdicts and alerts; a watch resumes there.")
    ] = OUT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Watch a log along the weight directions of a fine-tune, at a false-alarm rate that you choose.

    Calibrates on clean rows first. Flagged rows are quarantined in alerts.sqlite; verdicts.jsonl has a line for every row.
    Exit code 1: something was flagged. A log of n clean rows will have about n times the rate of those.
    """
    import json
    from dataclasses import asdict

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.cli.watching import begin
    from molehunt.errors import UsageError
    from molehunt.measure.interval import proportion
    from molehunt.run.local import Shard
    from molehunt.traffic.stream import BadLines, read_conversations
    from molehunt.watch.ledger import Ledger
    from molehunt.watch.log import watch_log

    share = Shard.parse(shard)
    if not traffic.is_file():
        raise UsageError(f"{traffic} is not a file; --traffic takes a JSONL, JSONL.gz or parquet log.")
    watching = begin(
        base,
        tuned,
        clean=clean,
        clean_rows=clean_rows,
        fpr=fpr,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        device=device,
        out=out,
        seed=seed,
        no_text=no_text,
    )
    bank, state = watching.bank, watching.state
    if attacks is not None:
        found = _simulated(
            watching, traffic, attacks, fpr=fpr, max_new_tokens=max_new_tokens, repeats=repeats, seed=seed
        )
        typer.echo(json.dumps([asdict(one) for one in found], indent=2) if as_json else _simulation_told(found, fpr))
        return
    if state.seen:
        say(f"Going on at line {state.place.line + 1}: {state.seen} rows were judged before.")
    bad = BadLines()
    with Ledger(f"sqlite:///{(out / 'alerts.sqlite').absolute()}", no_text=no_text) as ledger:
        watch_log(
            watching.pair,
            bank,
            state,
            read_conversations(
                traffic,
                on_bad="skip" if skip_bad else "stop",
                bad=bad,
                start_at=state.place,
                shard=share,
                track=track_on_stderr,
            ),
            fpr=fpr,
            max_new_tokens=max_new_tokens,
            into=out,
            ledger=ledger,
            track=track_on_stderr,
        )
        alerts = ledger.recent(10)
    share_flagged = proportion(state.flagged, state.seen) if state.seen else None
    told = {
        "verdict": "FLAGGED" if state.flagged else "NO FINDING",
        "rows": state.seen,
        "flagged": state.flagged,
        "share_flagged": None if share_flagged is None else asdict(share_flagged),
        "fpr": fpr,
        "calibration_rows": len(state.monitor.calibration),
        "directions": bank.written,
        "drift_alarm": state.drift.alarm,
        "skipped": bad.count,
        "out": str(out),
        "exit_code": int(bool(state.flagged)),
    }
    typer.echo(json.dumps(told, indent=2) if as_json else _told(told, alerts, bad.first))
    raise typer.Exit(int(bool(state.flagged)))


def _simulated(
    watching: "Watching", traffic: Path, attacks: Path, *, fpr: float, max_new_tokens: int, repeats: int, seed: int
) -> "list[Simulated]":
    from molehunt.cli.console import track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.traffic.stream import Conversation, read_conversations
    from molehunt.watch.log import read_answers
    from molehunt.watch.profile import Profile
    from molehunt.watch.simulate import simulate

    def profiles(rows: Sequence[Conversation], what: str) -> list[Profile]:
        read = read_answers(
            watching.pair, watching.bank, rows, max_new_tokens=max_new_tokens, track=track_on_stderr, what=what
        )
        return [profile for _, _, profile in read]

    benign, inserted = list(read_conversations(traffic)), list(read_conversations(attacks))
    if not benign or not inserted:
        raise UsageError(f"{attacks if benign else traffic} has no rows: a simulation needs benign rows and attacks.")
    return simulate(
        watching.state.monitor,
        profiles(watching.clean, "clean"),
        profiles(benign, "benign"),
        profiles(inserted, "attacks"),
        written=watching.bank.written,
        repeats=repeats,
        seed=seed,
    )


def _simulation_told(found: "Sequence[Simulated]", fpr: float) -> str:
    shown = list(found[0].by_repeat)
    lines = [
        f"Share of attacks flagged at each repeat, and of benign rows, asked for {fpr:g}:",
        "",
        f"{'monitor':<36}{'order':<8}" + "".join(f"{f'repeat {n}':>12}" for n in shown) + f"{'benign':>24}",
    ]
    for one in found:
        shares = "".join(f"{one.by_repeat[n].estimate:>12.2f}" for n in shown)
        told = f"{one.fpr.estimate:.4f} [{one.fpr.low:.4f}, {one.fpr.high:.4f}]"
        lines.append(f"{one.monitor:<36}{one.order:<8}{shares}{told:>24}")
    return "\n".join(lines)


def _told(told: dict[str, Any], alerts: Sequence["Alert"], bad: Sequence[str]) -> str:
    from molehunt.errors import printable

    expected = told["fpr"] * told["rows"]
    lines = [
        f"{told['verdict']}: {told['flagged']} of {told['rows']} rows; clean traffic alone would give about {expected:.0f}.",
        f"{told['directions']} directions watched, {told['calibration_rows']} clean rows set the rate of {told['fpr']:g}.",
    ]
    if told["share_flagged"] is not None:
        share = told["share_flagged"]
        lines.append(f"Share flagged {share['estimate']:.4f} [{share['low']:.4f}, {share['high']:.4f}].")
    if told["drift_alarm"]:
        lines.append("The traffic has drifted from what was calibrated on: the rate no longer holds. Calibrate anew.")
    if bad:
        lines += [f"{told['skipped']} rows could not be read, the first:", *(f"  {printable(one)}" for one in bad)]
    if alerts:
        lines += ["", f"{'where':<12}{'p':>9}  {'direction':<14}{'token':>6}  the answer, and without the direction"]
    for alert in alerts:
        lines.append(
            f"{alert.request:<12}{alert.p_value:>9.2g}  {alert.direction:<14}{alert.span[0]:>6}  "
            f"{printable(alert.answer or '', 60)!r}"
        )
        lines.append(f"{'':<45}{printable(alert.answer_without or '', 60)!r}")
    lines += ["", f"verdicts and alerts: {told['out']}"]
    return "\n".join(lines)
