"""What `watch` and `serve` begin with: both models, the directions of their difference, and a calibrated state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.cli.console import track_on_stderr
from molehunt.cli.tuned_side import open_pair
from molehunt.model.loading import local_folder
from molehunt.model.pair import ModelPair
from molehunt.traffic.benign import benign_prompts
from molehunt.traffic.roles import Turn
from molehunt.traffic.stream import Conversation, Place, read_conversations
from molehunt.watch.bank import Bank
from molehunt.watch.log import calibrated
from molehunt.watch.state import WatchState, identify

STATE = "state.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Opened:
    """What any monitor of a fine-tune needs."""

    pair: ModelPair
    bank: Bank
    clean: Sequence[Conversation]
    identity: Mapping[str, str]
    """See `watch.state.identify`."""


def opened(
    base: str,
    tuned: str,
    *,
    clean: Path | None,
    clean_rows: int,
    fpr: float,
    max_new_tokens: int,
    adapter: bool | None,
    device: str,
    seed: int,
) -> Opened:
    """Load both models and the clean rows: those of the file, else bundled benign prompts.

    Raises:
        NotTestable: nothing changed that could be watched.
    """
    folders = local_folder(base), local_folder(tuned)
    before = Checkpoint.open(folders[0])
    after = Checkpoint.open(folders[1], adapter="refuse" if adapter is None else "use" if adapter else "ignore")
    weights = compare_weights(before, after, track=track_on_stderr)
    bank = Bank.of((row.directions for row in weights.matrices if row.directions is not None), before.model_type)
    pair = open_pair(*folders, adapter, device)
    rows = (
        [
            Conversation(turns=(Turn("user", e.prompt),), response=None, tag="clean", line=i, end=Place())
            for i, e in enumerate(benign_prompts(clean_rows, seed=seed), 1)
        ]
        if clean is None
        else [row for row, _ in zip(read_conversations(clean), range(clean_rows), strict=False)]
    )
    identity = identify(before, after, pair.tokenizer, bank, fpr=fpr, max_new_tokens=max_new_tokens, clean=rows)
    return Opened(pair=pair, bank=bank, clean=rows, identity=identity)


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
    found: Opened, *, fpr: float, max_new_tokens: int, out: Path, seed: int, trust_clean: bool, no_text: bool
) -> Watching:
    """Go on with the state in `out`; where there is none, calibrate on the clean rows.

    Raises:
        UsageError: the state there is of other models, rows or settings.
        NotTestable: too few clean rows for `fpr`.
    """
    pair, bank, rows = found.pair, found.bank, found.clean
    identity = {**found.identity, "--trust-clean": str(trust_clean)}
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
        trust=trust_clean,
        no_text=no_text,
        track=track_on_stderr,
    )
    state.save(kept)
    return Watching(pair=pair, bank=bank, state=state, state_file=kept, clean=rows)
