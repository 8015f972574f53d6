"""Open what `watch` and `serve` share: both models, the directions of their difference, and a calibrated state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molehunt.audit.base_identity import check_base
from molehunt.audit.weight_comparison import ROLES, WRITERS, WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import NotTestable
from molehunt.measure.threshold import check_clean_rows, rows_for_rate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.traffic.stream import Conversation, Place
from molehunt.traffic.turn import Turn
from molehunt.traffic.world import benign_prompts
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.monitor import LEAST
from molehunt.watch.state import WatchState, identify
from molehunt.workflows.inputs import Texts, conversations
from molehunt.workflows.models import Models, adapter_choice, open_models

STATE = "state.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchTarget:
    """A fine-tune that can be watched: both models, the directions of their difference, and clean rows."""

    pair: ModelPair
    bank: Bank
    clean: Sequence[Conversation]
    """Rows that a monitor is calibrated on."""
    identity: Mapping[str, str]
    """Everything that a calibration depends on, see `watch.state.identify`."""
    names: tuple[str, str]
    """Base and fine-tune, as the user named them."""


def open_target(
    base: Models,
    tuned: str | Path | None = None,
    *,
    clean: Texts | None,
    clean_rows: int,
    fpr: float,
    max_new_tokens: int,
    sets_rate: bool = True,
    adapter: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> WatchTarget:
    """Load both models, the directions of their difference, and the clean rows, by default bundled benign prompts.

    Args:
        sets_rate: whether the clean rows must hold the rate `fpr`, which is checked before anything is loaded.

    Raises:
        UsageError: only one model, or a file of clean rows that does not exist.
        InvalidInput: a folder or a clean row is broken.
        NotTestable: the base is another model's, nothing changed that could be watched, or too few clean rows for `fpr`.
    """
    rows = _bundled(clean_rows, seed) if clean is None else conversations(clean, clean_rows)
    if sets_rate:
        _check_rows(len(rows), clean_rows, fpr)
    if not isinstance(base, ModelPair) and tuned is not None:  # before anything is loaded, which takes longest
        folders = local_folder(base, track), local_folder(tuned, track)
        choice = adapter_choice(adapter)
        check_base(Checkpoint.open(folders[0]), Checkpoint.open(folders[1], adapter=choice), track)
    opened = open_models(base, tuned, adapter=adapter, device=device, track=track)
    before, after = opened.checkpoints
    if isinstance(base, ModelPair):
        check_base(before, after, track)
    weights = compare_weights(before, after, track=track)
    if after.kind == "model" and adapter and weights.outcome == "NO FINDING":
        raise NotTestable(
            "The watch reads directions from weights or from an adapter, not from both in one folder.\nMove the adapter "
            "(adapter_config.json and its weights) to a folder of its own, or leave it out with adapter (--no-adapter)."
        )
    _refuse_unwatched(weights)
    bank = Bank.of((row.directions for row in weights.matrices if row.directions is not None), before.model_type)
    return WatchTarget(
        pair=opened.pair,
        bank=bank,
        clean=rows,
        identity=identify(
            before, after, opened.pair.tokenizer, bank, fpr=fpr, max_new_tokens=max_new_tokens, clean=rows
        ),
        names=((str(opened.base), str(opened.tuned)) if isinstance(base, ModelPair) else (str(base), str(tuned))),
    )


def _check_rows(n: int, limit: int, fpr: float) -> None:
    """Raises NotTestable where half of the clean rows cannot set this rate, or the others fit no monitor."""
    needed = max(2 * rows_for_rate(fpr) - 1, 2 * LEAST)
    reads = f" At most {limit} are read: raise clean_rows (--clean-rows), too." if needed > limit else ""
    advice = f"Give at least {needed} clean rows, or a higher fpr (--fpr).{reads}"
    check_clean_rows(n, lambda rows: rows - rows // 2, fpr, advice=advice)
    if n < 2 * LEAST:
        raise NotTestable(
            f"{n} clean rows are too few: half of them fit the monitor, and that takes at least {LEAST}.\n"
            f"Give at least {needed} clean rows.{reads}"
        )


def _refuse_unwatched(weights: WeightComparison) -> None:
    """Raises NotTestable for a fine-tune that changed other matrices, and none whose output the watch reads."""
    changed = [row for row in weights.matrices if row.status == "changed"]
    if any(row.role in WRITERS for row in changed):
        return
    names = [role for role in ROLES if any(row.role == role for row in changed)]
    if not names and any(row.status == "changed" for row in weights.others):
        names = ["embeddings, norms or biases"]
    if names:
        raise NotTestable(
            f"The fine-tune changed only {' and '.join(names) if len(names) < 3 else ', '.join(names)}; the watch reads "
            "what attention output projections (o) and MLP down projections (down) write, and these are as in the base.\n"
            "Use `molehunt audit`, which compares answers, or `molehunt.fit_detector`, which reads activations."
        )


def _bundled(n: int, seed: int) -> list[Conversation]:
    return [
        Conversation(turns=(Turn("user", example.prompt),), response=None, tag="clean", line=line, end=Place())
        for line, example in enumerate(benign_prompts(n, seed=seed), 1)
    ]


def calibrated_state(
    target: WatchTarget,
    *,
    fpr: float,
    max_new_tokens: int,
    out: Path | None,
    seed: int,
    trust_clean: bool,
    no_text: bool,
    track: Track = silent,
) -> WatchState:
    """The state in `out`; where there is none, calibrate on the clean rows and save the state there.

    Args:
        out: folder of the state; None calibrates in memory.

    Raises:
        UsageError: the state there was made for other models, rows or settings.
        NotTestable: too few clean rows for `fpr`.
    """
    identity = {**target.identity, "--trust-clean": str(trust_clean)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE).exists():
            return WatchState.load(out / STATE, identity)
    state = calibrate(
        target.pair,
        target.bank,
        target.clean,
        fpr=fpr,
        identity=identity,
        max_new_tokens=max_new_tokens,
        seed=seed,
        trust=trust_clean,
        no_text=no_text,
        track=track,
    )
    if out is not None:
        state.save(out / STATE)
    return state
