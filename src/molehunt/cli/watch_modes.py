"""What `molehunt watch` runs: either monitor over a log, or both over a simulated stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.cli.console import say, track_on_stderr
from molehunt.cli.watching import STATE, Opened, Watching, begin, opened
from molehunt.errors import UsageError, printable
from molehunt.model.pair import ModelPair
from molehunt.report.watch_build import ALERTS_AMONG, Labels, conformal_report, published_report
from molehunt.report.watch_schema import WatchReport
from molehunt.run.local import Shard
from molehunt.traffic.stream import BadLines, Conversation, Place, read_conversations
from molehunt.watch import published as range_watch
from molehunt.watch.extremes import Inputs
from molehunt.watch.label_endpoint import LabelEndpoint
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import read_answers, watch_log
from molehunt.watch.profile import Profile
from molehunt.watch.simulate import Simulated, simulate
from molehunt.watch.state import WatchState


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that all runs share."""

    base: str
    tuned: str
    traffic: Path
    clean: Path | None
    clean_rows: int
    fpr: float
    trust_clean: bool
    max_new_tokens: int
    skip_bad: bool
    no_text: bool
    share: Shard
    adapter: bool | None
    device: str
    out: Path
    seed: int
    endpoint: LabelEndpoint | None
    """What labels directions; None: their words alone."""

    def rows(self, start_at: Place, seen: int, bad: BadLines) -> Iterator[Conversation]:
        """What is left of the log."""
        if seen:
            say(f"Going on at line {start_at.line + 1}: {seen} rows were judged before.")
        return read_conversations(
            self.traffic,
            on_bad="skip" if self.skip_bad else "stop",
            bad=bad,
            start_at=start_at,
            shard=self.share,
            track=track_on_stderr,
        )

    def begun(self) -> Watching:
        """Calibrated for `fpr`, or taken up again."""
        self._refuse(range_watch.FILE, "published")
        return begin(
            self._opened(),
            fpr=self.fpr,
            max_new_tokens=self.max_new_tokens,
            out=self.out,
            seed=self.seed,
            trust_clean=self.trust_clean,
            no_text=self.no_text,
        )

    def _opened(self) -> Opened:
        return opened(
            self.base,
            self.tuned,
            clean=self.clean,
            clean_rows=self.clean_rows,
            fpr=self.fpr,
            max_new_tokens=self.max_new_tokens,
            adapter=self.adapter,
            device=self.device,
            seed=self.seed,
        )

    def conformal(self, bad: BadLines) -> WatchReport:
        """Watch at the rate that was asked for."""
        watching = self.begun()
        bank, state = watching.bank, watching.state
        inputs = self._inputs(state, len(bank.names))
        with Ledger(f"sqlite:///{(self.out / 'alerts.sqlite').absolute()}", no_text=self.no_text) as ledger:
            watch_log(
                watching.pair,
                bank,
                state,
                inputs,
                self.rows(state.place, state.seen, bad),
                fpr=self.fpr,
                max_new_tokens=self.max_new_tokens,
                into=self.out,
                ledger=ledger,
                track=track_on_stderr,
            )
            alerts = ledger.recent(ALERTS_AMONG)
        labels = Labels.of(watching.clean, self.endpoint, seed=self.seed)
        told = self._told(watching.pair, bad)
        return conformal_report(state, bank, inputs, alerts, labels, fpr=self.fpr, told=told, out=self.out)

    def published(self, bad: BadLines, *, slack: float, percentile: float) -> WatchReport:
        """Watch as published: arXiv 2508.00161."""
        self._refuse(STATE, "conformal")
        found = self._opened()
        rateless = {name: value for name, value in found.identity.items() if name != "false-alarm rate"}
        identity = {**rateless, "slack": f"{slack:g}", "percentile": f"{percentile:g}"}
        self.out.mkdir(parents=True, exist_ok=True)
        kept = self.out / range_watch.FILE
        if kept.exists():
            state = range_watch.PublishedState.load(kept, identity)
        else:
            state = range_watch.calibrated_range(
                found.pair,
                found.bank,
                found.clean,
                identity=identity,
                max_new_tokens=self.max_new_tokens,
                slack=slack,
                percentile=percentile,
                seed=self.seed,
                track=track_on_stderr,
            )
            state.save(kept)
        inputs = self._inputs(state, len(range_watch.role_names(found.bank)))
        range_watch.watch_published(
            found.pair,
            found.bank,
            state,
            inputs,
            self.rows(state.place, state.seen, bad),
            max_new_tokens=self.max_new_tokens,
            into=self.out,
            track=track_on_stderr,
        )
        labels = Labels.of(found.clean, self.endpoint, seed=self.seed)
        told = self._told(found.pair, bad)
        return published_report(state, found.bank, inputs, labels, told=told, out=self.out)

    def simulated(self, attacks: Path, repeats: int) -> list[Simulated]:
        """Both monitors, `attacks` inserted into the traffic."""
        watching = self.begun()

        def profiles(rows: Sequence[Conversation], what: str) -> list[Profile]:
            read = read_answers(
                watching.pair,
                watching.bank,
                rows,
                max_new_tokens=self.max_new_tokens,
                track=track_on_stderr,
                what=what,
            )
            return [profile for _, _, profile in read]

        benign, inserted = list(read_conversations(self.traffic)), list(read_conversations(attacks))
        if not benign or not inserted:
            empty = printable(str(attacks if benign else self.traffic))
            raise UsageError(f"{empty} has no rows: a simulation needs benign rows and attacks.")
        return simulate(
            watching.state.monitor,
            profiles(watching.clean, "clean"),
            profiles(benign, "benign"),
            profiles(inserted, "attacks"),
            written=watching.bank.written,
            repeats=repeats,
            seed=self.seed,
        )

    def _told(self, pair: ModelPair, bad: BadLines) -> dict[str, Any]:
        return {"base": self.base, "tuned": self.tuned, "skipped": bad.count, "decoding": pair.decoding_notes()}

    def _inputs(self, state: WatchState | range_watch.PublishedState, columns: int) -> Inputs:
        if not state.seen:  # what an earlier watch left there is of other rows
            return Inputs.empty(columns, no_text=self.no_text)
        return Inputs.load(self.out, state.identity, columns, no_text=self.no_text)

    def _refuse(self, file: str, mode: str) -> None:
        if (self.out / file).exists():
            raise UsageError(
                f"{printable(str(self.out))} holds a watch of the {mode} mode, whose verdicts would be written over.\n"
                "Give another --out folder."
            )
