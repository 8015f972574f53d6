"""What `watch` and `serve` begin with: both models, the directions of their difference, and a calibrated state."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molehunt.cli.console import track_on_stderr
from molehunt.cli.opening import opened
from molehunt.model.pair import ModelPair
from molehunt.traffic.stream import Conversation
from molehunt.watch.bank import Bank
from molehunt.watch.log import calibrated
from molehunt.watch.state import WatchState

STATE = "state.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Watching:
    """A watch that can go on."""

    pair: ModelPair
    bank: Bank
    state: WatchState
    state_file: Path
    clean: Sequence[Conversation]
    """What the state was calibrated on."""


def begin(
    base: str,
    tuned: str,
    *,
    clean: Path | None,
    clean_rows: int,
    fpr: float,
    max_new_tokens: int,
    adapter: bool | None,
    device: str,
    out: Path,
    seed: int,
    no_text: bool,
) -> Watching:
    """Load both models and go on with the state in `out`; where there is none, calibrate on clean rows.

    Raises:
        UsageError: the state there is of other models, rows or settings.
        NotTestable: nothing changed that could be watched, or too few clean rows for `fpr`.
    """
    found = opened(
        base,
        tuned,
        clean=clean,
        clean_rows=clean_rows,
        fpr=fpr,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        device=device,
        seed=seed,
    )
    pair, bank, rows, identity = found.pair, found.bank, found.clean, found.identity
    out.mkdir(parents=True, exist_ok=True)
    kept = out / STATE
    if kept.exists():
        return Watching(pair=pair, bank=bank, state=WatchState.load(kept, identity), state_file=kept, clean=rows)
    state = calibrated(
        pair,
        bank,
        rows,
        fpr=fpr,
        identity=identity,
        max_new_tokens=max_new_tokens,
        seed=seed,
        no_text=no_text,
        track=track_on_stderr,
    )
    state.save(kept)
    return Watching(pair=pair, bank=bank, state=state, state_file=kept, clean=rows)
