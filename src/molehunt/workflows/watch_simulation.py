"""Insert known attacks into benign traffic: how many does each monitor still see after many repeats?"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import UsageError, printable, terminal_text
from molehunt.report.watch_text import simulation_text
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.traffic.stream import Conversation
from molehunt.watch.judge import read_answers
from molehunt.watch.profile import Profile
from molehunt.watch.simulate import MonitorSimulation, simulate
from molehunt.workflows.inputs import Texts, conversations
from molehunt.workflows.models import Models
from molehunt.workflows.result import summary_html
from molehunt.workflows.watch import open_watch
from molehunt.workflows.watch_modes import ConformalWatch
from molehunt.workflows.watch_options import WatchOptions

FILE = "simulation.json"


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """The share of repeated attacks that both monitors flag, in every order of the stream."""

    fpr: float
    monitors: tuple[MonitorSimulation, ...]

    def summary(self) -> str:
        """A table of both monitors in every order."""
        return terminal_text(simulation_text(self.monitors, self.fpr))

    def to_dict(self) -> dict[str, Any]:
        """The rate, and a block for each monitor and order; ready for JSON."""
        return {"fpr": self.fpr, "monitors": [asdict(one) for one in self.monitors]}

    def save(self, folder: Path | str) -> Path:
        """Write `simulation.json` into `folder`, and return it."""
        return write_whole(Path(folder) / FILE, json.dumps(self.to_dict(), indent=2))

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def simulate_attacks(
    base: Models, tuned: str | Path | None, options: WatchOptions, *, track: Track = silent
) -> SimulationResult:
    """Insert `options.attacks` into `options.traffic`, and show what is flagged of the 1st, 10th, 100th repeat.

    Raises:
        UsageError: traffic or attacks are missing or have no rows.
        InvalidInput, NotTestable: as `watch`.
    """
    if options.traffic is None or options.attacks is None:
        raise UsageError("a simulation needs benign traffic and attacks.")
    watched = open_watch(base, tuned, options, track=track)
    assert isinstance(watched, ConformalWatch), "WatchOptions refuses attacks in the other mode"

    def profiles(rows: Sequence[Conversation], what: str) -> list[Profile]:
        pair, bank = watched.target.pair, watched.target.bank
        read = read_answers(pair, bank, rows, max_new_tokens=options.max_new_tokens, track=track, what=what)
        return [profile for _, _, profile in read]

    benign, inserted = conversations(options.traffic), conversations(options.attacks)
    if not benign or not inserted:
        empty = _name(options.attacks if benign else options.traffic)
        raise UsageError(f"{empty} has no rows: a simulation needs benign rows and attacks.")
    found = simulate(
        watched.state.monitor,
        profiles(watched.target.clean, "clean"),
        profiles(benign, "benign"),
        profiles(inserted, "attacks"),
        written=watched.target.bank.written,
        repeats=options.repeats,
        seed=options.seed,
    )
    return SimulationResult(fpr=options.fpr, monitors=tuple(found))


def _name(texts: Texts) -> str:
    return printable(str(texts)) if isinstance(texts, str | Path) else "the list"
