"""Conditional steering: a prompt's own activations decide, once, whether its row is steered.

Source: CAST (Lee et al., arXiv 2409.05907), whose threshold is searched for on labelled prompts. Here it comes from
clean prompts at a stated false-positive rate, and each row of a batch is decided by itself and followed while it decodes.
"""

import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from molehunt.activation.scale import sinks
from molehunt.errors import UsageError
from molehunt.measure.threshold import conformal_threshold
from molehunt.model.batches import batches, padded
from molehunt.model.blocks import decoder
from molehunt.model.taps import observe_sites, read_sites
from molehunt.run.progress import Track, by_rows, silent
from molehunt.run.saved_file import header_and_tensors, of_types, reading
from molehunt.run.whole import replace_whole
from molehunt.site import Site
from molehunt.steer.row_gate import RowGate, gate_at_prefill
from molehunt.steer.scope import Choose, last_of_prompt, whole_prompt

Pooling = Literal["max", "last"]
"""A prompt's score is that of its highest token, attention sinks left out (they would score alike in every prompt), or
that of its last token."""
Score = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos"]]
"""One score per token, from that token's activations alone."""
SCHEMA = 1
_READ: dict[Pooling, Choose] = {"max": whole_prompt, "last": last_of_prompt}


class PrefillGate:
    """Open at every token of the rows whose prompt scored above the threshold; what `prefill_gate` yields."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, site: Site, decided: RowGate) -> None:
        self.site = site
        self._decided = decided
        self.reading: Bool[Tensor, "batch pos"] | None = None
        """Where the prompts that are being prefilled will be read, until the site is reached."""

    @property
    def rows(self) -> Bool[Tensor, " batch"]:
        """Whether each row is steered, in the order of the batch as it is now."""
        return self._decided.rows

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """Raises UsageError where an intervention acts before the gate's site was reached."""
        if self.reading is not None:
            raise UsageError(
                f"this gate is decided at {self.site}, and an intervention behind it acts before that.\n"
                "Steer at that site or after it, in a block that is entered inside the gate's; or read an earlier site."
            )
        return self._decided(acts)


@contextmanager
def prefill_gate(
    model: nn.Module,
    site: Site,
    score: Score,
    threshold: float,
    *,
    pooling: Pooling = "max",
    layers_path: str | None = None,
) -> Generator[PrefillGate, None, None]:
    """A gate for the passes inside the block, decided anew at each prefill; the decision then stays with each row's cache.

    At the gate's own site it reads what the model computed, before an edit that is entered inside this block acts there.
    Right under padding on either side and in any batch; `gate_at_prefill` says what is a prefill, and follows the rows.

    Args:
        model: a causal language model, in a PEFT wrapper or not; `generate` of ours or of transformers may run it.
        site: where prompts are read: at the interventions' site, or before it in the forward pass.
        score: of each token; a `LogisticProbe`'s weight and bias make one with `linear_score`.
        threshold: rows above it are steered, and rows that score NaN.
        pooling: from tokens to a row.
        layers_path: see `decoder_blocks`.

    Raises:
        UsageError: in a forward pass: an intervention acts before the site was reached.
        CannotTap: the site cannot be read (see `read_sites`); or see `gate_at_prefill`.
    """

    def begins(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, " batch"]:
        gate.reading = _READ[pooling](ids, real)
        return torch.zeros(len(ids), dtype=torch.bool)  # until the site is reached

    def reached(acts: Tensor) -> None:
        if gate.reading is not None:
            scores = _pooled(score, acts, gate.reading, pooling)
            decided.rows = ~(scores <= threshold)  # a NaN is above every threshold
            gate.reading = None

    with gate_at_prefill(model, begins) as decided:
        gate = PrefillGate(site, decided)
        with observe_sites(model, {site: reached}, layers_path=layers_path):
            yield gate


@torch.inference_mode()
def prompt_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    site: Site,
    score: Score,
    *,
    pooling: Pooling = "max",
    layers_path: str | None = None,
    track: Track = silent,
) -> Float[Tensor, " prompts"]:
    """The number that `prefill_gate` compares with its threshold, of each prompt; on the CPU.

    Raises:
        CannotTap: the model lacks such a site (see `read_sites`).
    """
    device = next(model.parameters()).device
    found = torch.zeros(len(prompts))
    groups = batches([len(prompt) for prompt in prompts])
    for rows in by_rows(track, groups, "scoring prompts"):
        ids, real = (each.to(device) for each in padded([prompts[i] for i in rows]))
        with read_sites(model, [site], stop_early=True, layers_path=layers_path) as tap:
            decoder(model)(input_ids=ids, attention_mask=real.long(), use_cache=False)
        found[rows] = _pooled(score, tap[site], _READ[pooling](ids, real), pooling).float().cpu()
    return found


def linear_score(weight: Float[Tensor, " d_model"], bias: float = 0.0) -> Score:
    """`acts · weight + bias`, in fp32: the projection on a direction, or a probe's log-odds.

    The score raises UsageError for activations of another width.
    """

    def score(acts: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos"]:
        if acts.shape[-1] != len(weight):
            raise UsageError(f"this score reads {len(weight)} values a token, and the model has {acts.shape[-1]}.")
        return acts.float() @ weight.to(acts.device, torch.float32) + bias

    return score


def _pooled(
    score: Score, acts: Float[Tensor, "batch pos d_model"], at: Bool[Tensor, "batch pos"], pooling: Pooling
) -> Float[Tensor, " batch"]:
    """One score per row, of the tokens `at`; −∞ where there is none."""
    at = at.to(acts.device)
    if pooling == "max":
        at = at & ~sinks(acts, at)
    return score(acts).masked_fill(~at, -torch.inf).amax(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """Which prompts to steer: a linear score of their activations, above a threshold that clean prompts set.

    Law: `Condition.load(c.save(path))` equals `c`, bit for bit.
    """

    site: Site
    weight: Float[Tensor, " d_model"]
    """The weight of the score, in fp32."""
    bias: float
    pooling: Pooling
    threshold: float
    fpr: float
    """Greatest share of clean prompts that it was calibrated to steer."""
    clean: int
    """Number of clean prompts that set the threshold."""

    def __post_init__(self) -> None:
        finite = bool(self.weight.isfinite().all()) and math.isfinite(self.bias) and math.isfinite(self.threshold)
        if self.weight.ndim != 1 or not finite:
            raise ValueError(f"{self.site}: a condition is a vector, a bias and a threshold, all finite")
        if self.pooling not in _READ or not 0 < self.fpr < 1 or self.clean < 1:
            raise ValueError(f"{self.site}: pooling {self.pooling!r}, rate {self.fpr} from {self.clean} clean prompts")

    @classmethod
    def calibrated(
        cls,
        site: Site,
        weight: Float[Tensor, " d_model"],
        bias: float = 0.0,
        *,
        clean: Float[Tensor, " n"],
        fpr: float,
        pooling: Pooling = "max",
    ) -> "Condition":
        """The condition that steers a fresh clean prompt with probability at most `fpr`.

        Args:
            site: where the score is read.
            weight: a direction or a probe's weight, fitted on other prompts than `clean`.
            bias: of the score.
            clean: `prompt_scores` with this score and pooling, of clean prompts that chose nothing.
            fpr: in 0..1.
            pooling: as in `prompt_scores`.

        Raises:
            NotTestable: too few clean prompts for this rate (see `conformal_threshold`).
            ValueError: NaN among the scores.
        """
        threshold = conformal_threshold(clean, fpr)
        return cls(
            site=site,
            weight=weight.float(),
            bias=bias,
            pooling=pooling,
            threshold=threshold,
            fpr=fpr,
            clean=len(clean),
        )

    def gate(self, model: nn.Module, *, layers_path: str | None = None) -> AbstractContextManager[PrefillGate]:
        """`prefill_gate` with this score and threshold; raises as that and `linear_score` do."""
        score = linear_score(self.weight, self.bias)
        return prefill_gate(model, self.site, score, self.threshold, pooling=self.pooling, layers_path=layers_path)

    def save(self, path: Path) -> Path:
        """One safetensors file with a JSON header, replaced whole."""
        fields = {name: getattr(self, name) for name in ("bias", "pooling", "threshold", "fpr", "clean")}
        header = json.dumps({"schema": SCHEMA, "site": str(self.site), **fields})
        tensors = {"weight": self.weight.float().contiguous().cpu()}
        replace_whole(path, lambda partial: save_file(tensors, partial, {"molehunt_condition": header}))
        return path

    @classmethod
    def load(cls, path: Path) -> "Condition":
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        with reading(path, "condition of Molehunt's"):
            header, tensors = header_and_tensors(path, "molehunt_condition")
            if header.pop("schema") != SCHEMA:
                raise ValueError("its schema is another version's")
            made = cls(site=Site.parse(header.pop("site")), weight=tensors["weight"], **header)
            return of_types(made, bias=(int, float), pooling=str, threshold=(int, float), fpr=float, clean=int)
