"""Whether a model may decode on its cache: compared with passes that use none, and not assumed.

A model that ignores the cache it is given, keeps a state that rows cannot leave, or counts padding as text, writes
fluent answers that are not its own from their second token on. So a short batch is decoded once on the cache and once
without, before the first answer of a model is believed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import CannotTap, NotTestable, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.cache import keeps_cache
from molehunt.model.decoding import DecodingBatch
from molehunt.model.taps import edit_sites, without_hooks

STEPS = 3
"""Tokens that are decoded after each prompt of the check."""
LENGTHS = (4, 7)
"""Tokens of the two prompts of the check: the shorter is padded."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Root mean square of the difference between two logits, in standard deviations of the logits, that arithmetic explains.

Of 26 tiny architectures whose cache is right, the worst shows 7e-6 in fp32. Wrong ones show 1e-4 (Zamba2, which clamps
its time steps in one of two paths) to 1 (a cache that is not read).
"""
TF32_TOLERANCE = 1e-2
"""The same for fp32 on an accelerator, which may multiply in TF32."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, CannotTap)
"""What models raise that cannot do what is asked of them."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodingCheck:
    """How a model may decode."""

    cached: bool
    """On its cache, row by row as without one."""
    padded: bool
    """In batches whose rows are padded on the left."""
    why: str
    """What the check found; empty where nothing is wrong."""


_CHECKED: "WeakKeyDictionary[nn.Module, dict[object, DecodingCheck]]" = WeakKeyDictionary()
_SAID: set[str] = set()


def decoding_check(
    model: nn.Module, interventions: Sequence[Intervention] = (), *, layers_path: str | None = None
) -> DecodingCheck:
    """How this model may decode, checked once for each model, and once for each kind and place of intervention on it.

    What fails is logged as a warning, once. An intervention that follows a batch (it or its gate says `follows_batch`) cannot
    be asked about other rows and is left out: that such gates keep step with the cache is announced to them by our own
    decoding (see `cache.on_decoder_calls`). So is one that cannot act on the rows of the check.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        interventions: active in the passes that are compared.
        layers_path: see `decoder_blocks`.

    Raises:
        NotTestable: the model cannot run even a plain forward pass.
        CannotTap: an intervention's site cannot be edited (see `edit_sites`).
    """
    known = _CHECKED.setdefault(model, {})
    plain = known.get(()) or _checked(model, known, (), (), layers_path)
    alone = [i for i in interventions if not _follows_batch(i)]
    if not alone or not plain.cached:
        return plain
    kinds = tuple((i.site, *map(type, _parts(i))) for i in alone)
    return known.get(kinds) or _checked(model, known, kinds, alone, layers_path)


def extending_check(model: nn.Module) -> DecodingCheck:
    """How this model may continue a prompt by several tokens in one pass: `decoding_check`, and this checked as well.

    Raises:
        NotTestable: the model cannot run even a plain forward pass.
    """
    plain = decoding_check(model)
    known = _CHECKED[model]
    if plain.cached and "extends" not in known:
        with torch.inference_mode(), without_hooks():
            rows = _rows(model)
            why = _failure(lambda: _extended(model, rows, [_alone(model, row) for row in rows]))
        known["extends"] = DecodingCheck(not why, True, why)
    return known.get("extends", plain)


def must_extend(model: nn.Module) -> None:
    """Raise NotTestable unless several tokens in one pass may follow on the model's cache."""
    check = extending_check(model)
    if not check.cached:
        raise NotTestable(
            f"{type(unwrapped(model)).__name__} cannot continue a cached prompt by several tokens at once: {check.why}.\n"
            "What was asked for reads one prompt once and continues it many times."
        )


def unsound(model: nn.Module) -> tuple[str, ...]:
    """What earlier checks of this model found wrong with decoding on its cache, for a report."""
    return tuple(dict.fromkeys(check.why for check in _CHECKED.get(model, {}).values() if check.why))


def _parts(intervention: object) -> list[object]:
    """An intervention, its gate, and what it is made around."""
    inner = [getattr(intervention, name, None) for name in ("gate", "inner", "edit")]
    return [intervention, *(part for each in inner if each is not None for part in _parts(each))]


def _follows_batch(intervention: Intervention) -> bool:
    return any(getattr(part, "follows_batch", False) for part in _parts(intervention))


def _checked(
    model: nn.Module,
    known: dict[object, DecodingCheck],
    key: object,
    interventions: Sequence[Intervention],
    layers_path: str | None,
) -> DecodingCheck:
    with torch.inference_mode(), without_hooks():
        edits = edit_sites(model, interventions, layers_path=layers_path) if interventions else nullcontext()
        with edits:
            found = _check(model, edited=bool(interventions))
    known[key] = found
    name = type(unwrapped(model)).__name__ + (" under these interventions" if interventions else "")
    if found.why and name not in _SAID:  # a base and its fine-tune are of one kind
        _SAID.add(name)
        how = "without a cache" if found.padded else "without a cache, and only rows of equal length together"
        _log.warning(f"{name}: {found.why}.\nIts answers are decoded {how}: they are right, and take longer.")
    return found


def _check(model: nn.Module, *, edited: bool) -> DecodingCheck:
    rows = _rows(model)
    try:
        wanted = [_alone(model, row) for row in rows]
    except _FAILURES as error:
        if edited:  # made for other rows: nothing can be compared
            return DecodingCheck(True, True, "")
        raise NotTestable(
            f"{type(unwrapped(model)).__name__} cannot run a forward pass: {type(error).__name__}: "
            f"{printable(str(error), 300)}"
        ) from error
    if not keeps_cache(model):
        why = "it takes no cache by a name that Molehunt knows"
    else:
        why = _failure(lambda: _stepped(model, rows, wanted, cached=True))
    if not why:
        return DecodingCheck(True, True, "")
    padding = _failure(lambda: _stepped(model, rows, wanted, cached=False))
    return DecodingCheck(False, not padding, f"{why}; padded on the left, {padding}" if padding else why)


def _rows(model: nn.Module) -> list[list[int]]:
    """Two rows of tokens from the middle of the vocabulary, away from control tokens."""
    inner: Any = unwrapped(model)
    vocab = int(inner.get_input_embeddings().weight.shape[0])
    return [[(vocab // 3 + 37 * row + 11 * i) % vocab for i in range(n + STEPS)] for row, n in enumerate(LENGTHS)]


def _alone(model: nn.Module, row: Sequence[int]) -> Float[Tensor, "pos vocab"]:
    """Logits of a row by itself, in one pass without a cache: what the model is defined to compute."""
    device = next(model.parameters()).device
    out: Any = model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    return out.logits[0].float()


def _stepped(model: nn.Module, rows: Sequence[Sequence[int]], wanted: Sequence[Tensor], *, cached: bool) -> None:
    """Decode the rows step by step; the first leaves before the last step. Raises ValueError where logits differ."""
    batch = DecodingBatch(model, cached=cached, filler=rows[0][0])  # a plain token, unlike padding's, leaves its traces
    logits = batch.begin([row[:n] for row, n in zip(rows, LENGTHS, strict=True)])
    for step in range(STEPS + 1):
        for found, row in zip(logits, range(len(rows) - len(batch), len(rows)), strict=True):
            _must_equal(model, found, wanted[row][LENGTHS[row] - 1 + step], f"step {step}")
        if step == STEPS - 1:
            batch.keep(torch.tensor([1], device=logits.device))
        if step < STEPS:
            newest = [row[n + step] for row, n in zip(rows, LENGTHS, strict=True)][-len(batch) :]
            logits = batch.step(torch.tensor(newest, device=logits.device))


def _extended(model: nn.Module, rows: Sequence[Sequence[int]], wanted: Sequence[Tensor]) -> None:
    """Read the prompts, then all that follows in one pass. Raises ValueError where logits differ."""
    batch = DecodingBatch(model, filler=rows[0][0])
    batch.begin([row[:n] for row, n in zip(rows, LENGTHS, strict=True)])
    device = next(model.parameters()).device
    rest = torch.tensor([row[n:] for row, n in zip(rows, LENGTHS, strict=True)], device=device)
    logits = batch.extend(rest, torch.ones_like(rest, dtype=torch.bool))
    for found, right, n in zip(logits, wanted, LENGTHS, strict=True):
        _must_equal(model, found, right[n:], "a pass over several tokens")


def _must_equal(model: nn.Module, found: Tensor, wanted: Tensor, where: str) -> None:
    if not bool(wanted.isfinite().all()):
        return  # such a model has no right answer that a cache could miss
    spread = float(wanted.std())
    off = float((found - wanted).pow(2).mean().sqrt())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if found.device.type != "cpu" and dtype == torch.float32:
        tolerance = TF32_TOLERANCE
    if not off <= tolerance * spread:
        raise ValueError(
            f"logits at {where} are {off / max(spread, 1e-30):.2g} standard deviations off those of a full pass"
        )


def _failure(attempt: Callable[[], None]) -> str:
    """Why it failed; empty where it did not."""
    try:
        attempt()
    except (ValueError, CannotTap) as error:
        return printable(str(error).rstrip("."), 300)
    except _FAILURES as error:
        return f"{type(error).__name__}: {printable(str(error).rstrip('.'), 300)}"
    return ""
