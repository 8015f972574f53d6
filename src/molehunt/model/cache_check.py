"""Checks whether a model may decode on its cache, by comparison with passes that use none.

A model may ignore the cache, store a state that rows cannot leave, or read padding as text. Its answers are then fluent
and wrong from their second token on. So a short batch is decoded once on the cache and once without it, before the first
answer of a model is used.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from molehunt.model.taps import active_edits, edit_sites, without_hooks

STEPS = 3
"""Number of tokens that are decoded after each prompt of the check."""
LENGTHS = (4, 7)
"""Numbers of tokens of the two prompts of the check. The shorter one is padded."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest root mean square of the difference of logits that rounding explains, in standard deviations of the logits.

Among 27 tiny architectures with a correct cache, the largest difference is 7e-6 in fp32. Incorrect ones differ by 1e-4
(Zamba2, which clamps its time steps in one of two paths) to 1 (a cache that is not read).
"""
TF32_TOLERANCE = 1e-2
"""Tolerance for fp32 on an accelerator, which may multiply in TF32."""
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, CannotTap)
"""Errors that models raise when they do not support a call."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodingCheck:
    """Result of the check: the ways in which a model may decode."""

    cached: bool
    """Whether decoding on the cache gives the same logits as decoding without it."""
    padded: bool
    """Whether batches may be padded on the left."""
    why: str
    """Reason why `cached` or `padded` is False; empty if both are True."""


State = tuple[bool, torch.dtype, torch.device]
"""State of the model that a result is valid for: a model may be moved, or set to train, after the check."""
EditTypes = frozenset[tuple[object, ...]]
"""Types of the edits that a result is valid for; empty for the model without edits."""
ALONE: EditTypes = frozenset()
EXTENDS: EditTypes = frozenset({("several tokens in one pass",)})
"""Key of the result of `extending_check`, in place of edit types."""
_CHECKED: "WeakKeyDictionary[nn.Module, dict[tuple[State, EditTypes], DecodingCheck]]" = WeakKeyDictionary()
_WARNED: set[object] = set()


def decoding_check(
    model: nn.Module, interventions: Sequence[Intervention] = (), *, layers_path: str | None = None
) -> DecodingCheck:
    """The ways in which this model may decode under the active edits and these interventions.

    Each model is checked once, and once for each set of types of interventions. A failure is logged as a warning, once.
    An intervention that follows a batch (it or its gate sets `follows_batch`) cannot run on the rows of the check and is
    left out: `cache.on_decoder_calls` keeps it in step. An intervention that was made for other rows is left out, too.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        interventions: interventions that will act in addition to the active edits.
        layers_path: see `decoder_blocks`.

    Raises:
        NotTestable: the model cannot run a plain forward pass.
        CannotTap: an intervention's site cannot be edited (see `edit_sites`).
    """
    known = _CHECKED.setdefault(model, {})
    state = _state(model)
    if (state, ALONE) not in known:
        known[state, ALONE] = _checked(model)
        _warn_once(model, known[state, ALONE])
    plain = known[state, ALONE]
    in_place, path = active_edits(model)
    edits = [edit for edit in (*in_place, *interventions) if not _follows_batch(edit)]
    edit_types = frozenset(tuple(map(_type_of, _parts(edit))) for edit in edits)
    if edit_types and (state, edit_types) not in known:
        try:
            known[state, edit_types] = _checked(model, plain, edits, layers_path or path)
        except _MadeForOtherRows:
            return plain
        if known[state, edit_types] != plain:
            _warn_once(model, known[state, edit_types], edit_types)
    return known[state, edit_types]


def extending_check(model: nn.Module) -> DecodingCheck:
    """The same as `decoding_check`, with a check of passes that continue a prompt by several tokens.

    Raises:
        NotTestable: the model cannot run a plain forward pass.
    """
    check = decoding_check(model)
    known, key = _CHECKED[model], (_state(model), EXTENDS)
    if not check.cached:
        return check
    if key not in known:
        with torch.no_grad(), without_hooks():
            rows = _rows(model)
            why = _failure(lambda: _extended(model, rows, [_alone(model, row) for row in rows]))
        known[key] = DecodingCheck(not why, True, why)
    return known[key]


def must_extend(model: nn.Module) -> None:
    """Raise NotTestable unless several tokens in one pass may follow on the model's cache."""
    check = extending_check(model)
    if not check.cached:
        raise NotTestable(
            f"{type(unwrapped(model)).__name__} cannot continue a cached prompt by several tokens at once: {check.why}.\n"
            "This request reads one prompt once and continues it many times."
        )


def unsound(model: nn.Module) -> tuple[str, ...]:
    """Failures of this model's checks so far, without and with interventions, for a report."""
    found = _CHECKED.get(model, {})
    plain = {check.why for (_, edit_types), check in found.items() if not edit_types}
    named = (
        f"under an intervention, {check.why}" if edit_types and check.why not in plain else check.why
        for (_, edit_types), check in found.items()
        if edit_types != EXTENDS and check.why
    )
    return tuple(dict.fromkeys(named))


def _state(model: nn.Module) -> State:
    parameter = next(model.parameters())
    return model.training, parameter.dtype, parameter.device


def _parts(intervention: object) -> list[object]:
    """An intervention, its gate, and the intervention that it wraps."""
    inner = [getattr(intervention, name, None) for name in ("gate", "inner", "edit")]
    return [intervention, *(part for each in inner if each is not None for part in _parts(each))]


class _Itself:
    """A hashable key of an object, equal to another key of the same object: a plugin's class need not be hashable."""

    def __init__(self, part: object) -> None:
        self.part = part

    def __hash__(self) -> int:
        return id(self.part)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.part is self.part


def _type_of(part: object) -> object:
    """The type of an edit. Edits of Molehunt act on each token separately, so their class decides; others are their own type."""
    return type(part) if type(part).__module__.startswith("molehunt.") else _Itself(part)


def _follows_batch(intervention: Intervention) -> bool:
    return any(getattr(part, "follows_batch", False) for part in _parts(intervention))


def _warn_once(model: nn.Module, found: DecodingCheck, edit_types: EditTypes = ALONE) -> None:
    """Warn once for each architecture and type of intervention: a base and its fine-tune fail in the same way."""
    name = type(unwrapped(model)).__name__
    if not found.why or (name, edit_types) in _WARNED:
        return
    _WARNED.add((name, edit_types))
    how = "without a cache" if found.padded else "without a cache, and only rows of equal length together"
    _log.warning(
        f"{name}{' under an intervention' if edit_types else ''}: {found.why}.\n"
        f"Its answers are decoded {how}: they are correct, and take longer."
    )


class _MadeForOtherRows(Exception):
    """An intervention cannot act on the rows of the check, so nothing can be compared."""


def _checked(
    model: nn.Module,
    plain: DecodingCheck | None = None,
    edits: Sequence[Intervention] = (),
    layers_path: str | None = None,
) -> DecodingCheck:
    """Check the model without edits; or with edits, when the result without them is known."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # a value that an edit computes once may be differentiated later
        stack.enter_context(without_hooks())
        if edits:
            stack.enter_context(edit_sites(model, edits, layers_path=layers_path))
        rows = _rows(model)
        try:
            wanted = [_alone(model, row) for row in rows]
        except CannotTap:
            raise
        except _FAILURES as error:
            if edits:
                raise _MadeForOtherRows from error
            raise NotTestable(
                f"{type(unwrapped(model)).__name__} cannot run a forward pass: {type(error).__name__}: "
                f"{printable(str(error), 300)}"
            ) from error
        if plain is None:
            plain = DecodingCheck(True, True, "")
            if not keeps_cache(model):
                plain = DecodingCheck(False, True, "it takes no cache by a name that Molehunt knows")
        why = _failure(lambda: _stepped(model, rows, wanted, cached=True)) if plain.cached else plain.why
        if not why:
            return plain
        padding = _failure(lambda: _stepped(model, rows, wanted, cached=False)) if plain.padded else ""
        if padding:
            why = f"{why}; padded on the left, {padding}"
        return DecodingCheck(False, plain.padded and not padding, why)


def _rows(model: nn.Module) -> list[list[int]]:
    """Two rows of tokens from the middle of the vocabulary, which has no control tokens."""
    inner: Any = unwrapped(model)
    vocab = int(inner.get_input_embeddings().weight.shape[0])
    return [[(vocab // 3 + 37 * row + 11 * i) % vocab for i in range(n + STEPS)] for row, n in enumerate(LENGTHS)]


def _alone(model: nn.Module, row: Sequence[int]) -> Float[Tensor, "pos vocab"]:
    """Logits of one row in one pass without a cache: the definition of the model's output."""
    device = next(model.parameters()).device
    out: Any = model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    return out.logits[0].float()


def _stepped(model: nn.Module, rows: Sequence[Sequence[int]], wanted: Sequence[Tensor], *, cached: bool) -> None:
    """Decode the rows step by step; the first leaves before the last step. Raises ValueError where logits differ."""
    batch = DecodingBatch(
        model, cached=cached, filler=rows[0][0]
    )  # an ordinary token, unlike the padding token, shows when padding is read
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
        return  # such a model has no correct answer to compare with
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
    """The reason of a failure; empty if the attempt succeeded."""
    try:
        attempt()
    except torch.OutOfMemoryError:  # unrelated to the cache
        raise
    except (ValueError, CannotTap) as error:
        return printable(str(error).rstrip("."), 300)
    except _FAILURES as error:
        return f"{type(error).__name__}: {printable(str(error).rstrip('.'), 300)}"
    return ""
