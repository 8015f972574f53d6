"""A monitor and what it has seen, on disk: whole or not at all, and never another model's."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehunt.activation.identity import tokenizer_hash
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.whole import replace_whole
from molehunt.traffic.stream import START, Conversation, Place
from molehunt.watch.alert import Extreme
from molehunt.watch.bank import Bank
from molehunt.watch.drift import DriftMartingale
from molehunt.watch.kinds import PromptKinds
from molehunt.watch.monitor import Calibrated, Look, Monitor
from molehunt.watch.scores import TailSum
from molehunt.watch.sketch import ScoreSketch
from molehunt.watch.suspects import Suspect, Suspects

SCHEMA = 4


def identify(
    base: Checkpoint,
    tuned: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    bank: Bank,
    *,
    fpr: float,
    max_new_tokens: int,
    clean: Sequence[Conversation],
) -> dict[str, str]:
    """Everything that a calibration depends on, by the name that an error gives it."""
    rows = [[[(turn.role, turn.text) for turn in row.turns], row.response] for row in clean]
    return {
        "base model": base.content_hash(),
        "tuned model": tuned.content_hash(),
        "tokenizer": tokenizer_hash(tokenizer),
        "set of directions": bank.sha256(),
        "false-alarm rate": f"{fpr:g}",
        "answer length": str(max_new_tokens),
        "set of clean rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


@dataclass(eq=False, kw_only=True)
class WatchState:
    """Everything that a restart needs to go on as if nothing had happened."""

    identity: Mapping[str, str]
    """Hashes of both models, the tokenizer and the directions, and the rate: a state of another is refused."""
    monitor: Monitor
    extremes: tuple[Extreme, ...] = ()
    """The clean rows that scored highest, to hold alerts against."""
    suspects: Suspects | None = None
    """Clean rows that may hold the behaviour; None: nobody looked for them."""
    scores: ScoreSketch = field(default_factory=lambda: ScoreSketch.empty(1))
    """Of clean traffic since calibration. Flagged rows are quarantined and never enter."""
    drift: DriftMartingale
    rng: np.random.Generator
    """Places ties among p-values."""
    place: Place = START
    """Where in the log to go on."""
    written: int = 0
    """Bytes of the verdicts written up to there."""
    seen: int = 0
    flagged: int = 0

    def save(self, path: Path) -> None:
        """Replace the file at `path`, synced."""
        kinds = self.monitor.kinds
        tensors: dict[str, Tensor] = {
            "scores": torch.frombuffer(bytearray(self.scores.to_bytes()), dtype=torch.uint8),
            "kinds.center": kinds.center,
            "kinds.scale": kinds.scale,
            "kinds.centroids": kinds.centroids,
        }
        for kind, one in enumerate(self.monitor.of_kind):
            tensors |= {f"{kind}.{name}": tensor for name, tensor in _tensors(one).items()}
        told = {
            "schema": SCHEMA,
            "identity": dict(self.identity),
            "kind_of": kinds.kind_of,
            "threshold": self.monitor.threshold,
            "extremes": [[extreme.score, extreme.text] for extreme in self.extremes],
            "suspects": None if self.suspects is None else asdict(self.suspects),
            "drift": self.drift.to_dict(),
            "rng": self.rng.bit_generator.state,
            "place": list(self.place),
            "written": self.written,
            "seen": self.seen,
            "flagged": self.flagged,
        }
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_watch": json.dumps(told)}))

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, str]) -> "WatchState":
        """Read what `save` wrote.

        Raises:
            UsageError: the state is of another model, tokenizer, set of directions or rate; names which.
            InvalidInput: the file is broken or of another version.
        """
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["molehunt_watch"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InvalidInput(
                f"{printable(path.name)} is no state of a watch: {printable(str(error))}.\nRemove it to calibrate anew."
            ) from None
        if told.get("schema") != SCHEMA:
            raise InvalidInput(
                f"{printable(path.name)} is of schema {printable(str(told.get('schema')))}; this version reads "
                f"{SCHEMA}.\nRemove it to calibrate anew."
            )
        other = [name for name, value in identity.items() if told["identity"].get(name) != value]
        if other:
            raise UsageError(
                f"{printable(path.name)} was calibrated for another {', '.join(other)}.\nGive another --out folder, or "
                "remove the state to calibrate anew."
            )
        kinds = PromptKinds(
            tensors["kinds.center"], tensors["kinds.scale"], tensors["kinds.centroids"], tuple(told["kind_of"])
        )
        rng = np.random.default_rng()
        rng.bit_generator.state = told["rng"]
        return cls(
            identity=identity,
            monitor=Monitor(kinds, tuple(_calibrated(tensors, kind) for kind in range(kinds.n)), told["threshold"]),
            extremes=tuple(Extreme(score=score, text=text) for score, text in told["extremes"]),
            suspects=_suspects(told["suspects"]),
            scores=ScoreSketch.from_bytes(tensors["scores"].numpy().tobytes()),
            drift=DriftMartingale.from_dict(told["drift"]),
            rng=rng,
            place=Place(*told["place"]),
            written=told["written"],
            seen=told["seen"],
            flagged=told["flagged"],
        )


def _suspects(told: Mapping[str, Any] | None) -> Suspects | None:
    if told is None:
        return None
    fields: dict[str, Any] = {
        **told,
        "limits": tuple(told["limits"]),
        "rows": tuple(Suspect(**row) for row in told["rows"]),
    }
    return Suspects(**fields)


def _tensors(one: Calibrated) -> dict[str, Tensor]:
    """What one kind of prompt was fitted to. Raises TypeError for scores other than tail sums."""
    scores = [look.score for look in one.looks]
    tail_sums = [score for score in scores if isinstance(score, TailSum)]
    if len(tail_sums) < len(scores):
        raise TypeError("only a monitor of tail sums can be kept on disk")
    return {
        "start": torch.stack([score.start for score in tail_sums]),
        "scale": torch.stack([score.scale for score in tail_sums]),
        "summed": torch.tensor([score.summed for score in tail_sums]),
        "own": torch.tensor([[look.start, look.scale] for look in one.looks], dtype=torch.float64),
        "calibration": one.calibration,
    }


def _calibrated(tensors: Mapping[str, Tensor], kind: int) -> Calibrated:
    """What `_tensors` took apart."""
    start, scale, summed, own, calibration = (
        tensors[f"{kind}.{name}"] for name in ("start", "scale", "summed", "own", "calibration")
    )
    looks = tuple(
        Look(TailSum(a, b, n), own_start, own_scale)
        for a, b, n, (own_start, own_scale) in zip(start, scale, summed.tolist(), own.tolist(), strict=True)
    )
    return Calibrated(looks, calibration)
