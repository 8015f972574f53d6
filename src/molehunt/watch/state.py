"""A monitor and what it has seen, on disk: whole or not at all, and never another model's."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehunt.activation.identity import tokenizer_hash
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import UsageError, printable
from molehunt.run.saved_file import header_and_tensors, reading
from molehunt.run.whole import replace_whole
from molehunt.traffic.stream import START, Conversation, Place
from molehunt.watch.alert import Extreme
from molehunt.watch.bank import Bank
from molehunt.watch.drift import DriftMartingale
from molehunt.watch.monitor import Monitor, PrefixScore, StratumCalibration
from molehunt.watch.scores import TailSum
from molehunt.watch.sketch import ScoreSketch
from molehunt.watch.strata import PromptStrata
from molehunt.watch.suspects import Suspect, Suspects

SCHEMA = 5
READS = (4, SCHEMA)
"""Versions that are read. Version 4 names strata otherwise."""
RATE = "false-alarm rate"
"""Name of the rate in a state's identity."""
WHAT, AGAIN = "state of a watch", "Remove it to calibrate again."


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
    """Everything that a calibration depends on, by the name that errors use for it."""
    rows = [[[(turn.role, turn.text) for turn in row.turns], row.response] for row in clean]
    return {
        "base model": base.content_hash(),
        "tuned model": tuned.content_hash(),
        "tokenizer": tokenizer_hash(tokenizer),
        "set of directions": bank.sha256(),
        RATE: f"{fpr:g}",
        "answer length": str(max_new_tokens),
        "set of clean rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


@dataclass(eq=False, kw_only=True)
class WatchState:
    """Everything that a restart needs to go on as if nothing had happened."""

    identity: Mapping[str, str]
    """Hashes of both models, the tokenizer and the directions, and the rate: a state made for others is refused."""
    monitor: Monitor
    extremes: tuple[Extreme, ...] = ()
    """The top-scoring clean rows, which alerts are compared with."""
    suspects: Suspects | None = None
    """Clean rows that may contain the behaviour; None where they were not searched for."""
    scores: ScoreSketch = field(default_factory=lambda: ScoreSketch.empty(1))
    """Scores of unflagged traffic since calibration. Flagged rows are quarantined and never enter."""
    drift: DriftMartingale
    rng: np.random.Generator
    """Draws the place of ties among p-values."""
    place: Place = START
    """Place in the log at which to go on."""
    written: int = 0
    """Bytes of the verdicts that are written up to there."""
    seen: int = 0
    flagged: int = 0

    def copy(self) -> "WatchState":
        """A state that goes on independently of this one."""
        return replace(
            self,
            scores=ScoreSketch.from_bytes(self.scores.to_bytes()),
            drift=replace(self.drift),
            rng=deepcopy(self.rng),
        )

    def save(self, path: Path) -> None:
        """Replace the file at `path`, synced."""
        strata = self.monitor.strata
        tensors: dict[str, Tensor] = {
            "scores": torch.frombuffer(bytearray(self.scores.to_bytes()), dtype=torch.uint8),
            "strata.center": strata.center,
            "strata.scale": strata.scale,
            "strata.centroids": strata.centroids,
        }
        for stratum, one in enumerate(self.monitor.by_stratum):
            tensors |= {f"{stratum}.{name}": tensor for name, tensor in _tensors(one).items()}
        fields = {
            "schema": SCHEMA,
            "identity": dict(self.identity),
            "stratum_of": strata.stratum_of,
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
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_watch": json.dumps(fields)}))

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, str]) -> "WatchState":
        """Read what `save` wrote, also with the names of version 4.

        Raises:
            UsageError: the state is of another model, tokenizer, set of directions or rate; names which.
            InvalidInput: the file is broken or of another version.
        """
        with reading(path, WHAT, AGAIN):
            fields, tensors = header_and_tensors(path, "molehunt_watch")
            if (schema := fields.get("schema")) not in READS:
                raise ValueError(f"it is of schema {schema}, and this version reads {SCHEMA}")
            other = [name for name, value in identity.items() if fields["identity"].get(name) != value]
        if other:
            raise UsageError(
                f"{printable(path.name)} was calibrated for another {', '.join(other)}.\nGive another folder (out, --out), or "
                "remove the state to calibrate again."
            )
        with reading(path, WHAT, AGAIN):
            found = cls._made(fields, tensors, identity)
            found._check(fields["identity"].get(RATE))
        return found

    @classmethod
    def _made(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], identity: Mapping[str, str]
    ) -> "WatchState":
        """The state that was saved as these. Raises LookupError, TypeError or ValueError where that is none."""
        strata = _strata(tensors, fields)
        rng = np.random.default_rng()
        rng.bit_generator.state = fields["rng"]
        return cls(
            identity=identity,
            monitor=Monitor(
                strata, tuple(_calibrated(tensors, stratum) for stratum in range(strata.n)), float(fields["threshold"])
            ),
            extremes=tuple(Extreme(score=float(score), text=str(text)) for score, text in fields["extremes"]),
            suspects=_suspects(fields["suspects"]),
            scores=ScoreSketch.from_bytes(tensors["scores"].numpy().tobytes()),
            drift=DriftMartingale.from_dict(fields["drift"]),
            rng=rng,
            place=Place(*(_count(value) for _, value in zip(Place._fields, fields["place"], strict=True))),
            written=_count(fields["written"]),
            seen=_count(fields["seen"]),
            flagged=_count(fields["flagged"]),
        )

    def _check(self, rate: str | None) -> None:
        """Raises ValueError unless this monitor can flag: a state that was altered must not watch with its eyes shut.

        Every number is finite, every scale positive, and the threshold is the one that the clean scores of each stratum
        give at the rate that the state was calibrated for.
        """
        strata, threshold = self.monitor.strata, self.monitor.threshold
        scores = [prefix.score for one in self.monitor.by_stratum for prefix in one.prefixes]
        scales = [strata.scale, *(one.scale for one in scores if isinstance(one, TailSum))]
        own = [
            value
            for one in self.monitor.by_stratum
            for prefix in one.prefixes
            for value in (prefix.start, prefix.scale)
        ]
        tensors = [strata.center, strata.centroids, *(one.start for one in scores if isinstance(one, TailSum)), *scales]
        tensors += [one.calibration for one in self.monitor.by_stratum]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors) or not all(map(math.isfinite, own)):
            raise ValueError("it holds values that are no number")
        if any(bool((scale <= 0).any()) for scale in scales) or any(scale <= 0 for scale in own[1::2]):
            raise ValueError("a scale is not positive")
        for one in self.monitor.by_stratum:
            ranked, n = one.calibration.sort(descending=True).values, len(one.calibration)
            first, last = 0, n - 1
            if rate is not None:  # it is saved with six digits
                first, last = (int(float(rate) * by * (n + 1)) - 1 for by in (1 - 1e-5, 1 + 1e-5))
            lowest, highest = float(ranked[max(0, last)]), float(ranked[max(0, first)])
            slack = 1e-3 * (1 + abs(highest))
            if not lowest - slack <= threshold <= highest + slack:
                raise ValueError(f"its threshold {threshold:g} is not the one that its clean scores give")


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value


def _strata(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> PromptStrata:
    prefix, stratum_of = ("kinds", "kind_of") if fields["schema"] == 4 else ("strata", "stratum_of")
    center, scale, centroids = (tensors[f"{prefix}.{name}"] for name in ("center", "scale", "centroids"))
    return PromptStrata(center, scale, centroids, tuple(fields[stratum_of]))


def _suspects(saved: Mapping[str, Any] | None) -> Suspects | None:
    if saved is None:
        return None
    fields: dict[str, Any] = {
        **saved,
        "limits": tuple(saved["limits"]),
        "rows": tuple(Suspect(**row) for row in saved["rows"]),
    }
    return Suspects(**fields)


def _tensors(one: StratumCalibration) -> dict[str, Tensor]:
    """The tensors that one stratum is saved as. Raises TypeError for scores other than tail sums."""
    scores = [prefix.score for prefix in one.prefixes]
    tail_sums = [score for score in scores if isinstance(score, TailSum)]
    if len(tail_sums) < len(scores):
        raise TypeError("only a monitor of tail sums can be saved")
    return {
        "start": torch.stack([score.start for score in tail_sums]),
        "scale": torch.stack([score.scale for score in tail_sums]),
        "summed": torch.tensor([score.summed for score in tail_sums]),
        "own": torch.tensor([[prefix.start, prefix.scale] for prefix in one.prefixes], dtype=torch.float64),
        "calibration": one.calibration,
    }


def _calibrated(tensors: Mapping[str, Tensor], stratum: int) -> StratumCalibration:
    """The stratum that `_tensors` made these tensors of."""
    start, scale, summed, own, calibration = (
        tensors[f"{stratum}.{name}"] for name in ("start", "scale", "summed", "own", "calibration")
    )
    prefixes = tuple(
        PrefixScore(TailSum(a, b, n), own_start, own_scale)
        for a, b, n, (own_start, own_scale) in zip(start, scale, summed.tolist(), own.tolist(), strict=True)
    )
    return StratumCalibration(prefixes, calibration)
