"""Whether a model may decode on its cache: compared with passes that use none, and not assumed.

A model that ignores the cache it is given, keeps a state that rows cannot leave, or counts padding as text, writes
fluent answers that are not its own from their second token on. So a short batch is decoded once on the cache and once
without, before the first answer of a model is believed.
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
"""Tokens that are decoded after each prompt of the check."""
LENGTHS = (4, 7)
"""Tokens of the two prompts of the check: the shorter is padded."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Root mean square of the difference between two logits, in standard deviations of the logits, that arithmetic explains.

Of 27 tiny architectures whose cache is right, the worst shows 7e-6 in fp32. Wrong ones show 1e-4 (Zamba2, which clamps
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


State = tuple[bool, torch.dtype, torch.device]
"""What a verdict holds for; a model may be moved, or set to train, after it was checked."""
Kinds = frozenset[tuple[object, ...]]
"""Of the edits that a verdict is about; empty for the model by itself."""
ALONE: Kinds = frozenset()
EXTENDS: Kinds = frozenset({("several tokens in one pass",)})
"""In the place of kinds: the verdict of `extending_check`."""
_CHECKED: "WeakKeyDictionary[nn.Module, dict[tuple[State, Kinds], DecodingCheck]]" = WeakKeyDictionary()
_SAID: set[object] = set()


def decoding_check(
    model: nn.Module, interventions: Sequence[Intervention] = (), *, layers_path: str | None = None
) -> DecodingCheck:
    """How this model may decode under the edits that are in place and these interventions.

    It is checked once for each model, and once for each set of kinds of interventions on it. What fails is logged as a
    warning, once. An intervention that follows a batch (it or its gate says `follows_batch`) cannot be asked about other
    rows and is left out: that it keeps step is up to `cache.on_decoder_calls`. So is one that was made for other rows
    than those of the check.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        interventions: those that will act beside the ones in place.
        layers_path: see `decoder_blocks`.

    Raises:
        NotTestable: the model cannot run even a plain forward pass.
        CannotTap: an intervention's site cannot be edited (see `edit_sites`).
    """
    known = _CHECKED.setdefault(model, {})
    state = _state(model)
    if (state, ALONE) not in known:
        known[state, ALONE] = _checked(model)
        _say(model, known[state, ALONE])
    plain = known[state, ALONE]
    in_place, path = active_edits(model)
    edits = [edit for edit in (*in_place, *interventions) if not _follows_batch(edit)]
    kinds = frozenset(tuple(map(_kind, _parts(edit))) for edit in edits)
    if kinds and (state, kinds) not in known:
        try:
            known[state, kinds] = _checked(model, plain, edits, layers_path or path)
        except _MadeForOtherRows:
            return plain
        if known[state, kinds] != plain:
            _say(model, known[state, kinds], kinds)
    return known[state, kinds]


def extending_check(model: nn.Module) -> DecodingCheck:
    """How this model may continue a prompt by several tokens in one pass: `decoding_check`, and this checked as well.

    Raises:
        NotTestable: the model cannot run even a plain forward pass.
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
            "What was asked for reads one prompt once and continues it many times."
        )


def unsound(model: nn.Module) -> tuple[str, ...]:
    """What `decoding_check` found wrong with this model so far, by itself and under interventions, for a report."""
    found = _CHECKED.get(model, {})
    plain = {check.why for (_, kinds), check in found.items() if not kinds}
    named = (
        f"under an intervention, {check.why}" if kinds and check.why not in plain else check.why
        for (_, kinds), check in found.items()
        if kinds != EXTENDS and check.why
    )
    return tuple(dict.fromkeys(named))


def _state(model: nn.Module) -> State:
    parameter = next(model.parameters())
    return model.training, parameter.dtype, parameter.device


def _parts(intervention: object) -> list[object]:
    """An intervention, its gate, and what it is made around."""
    inner = [getattr(intervention, name, None) for name in ("gate", "inner", "edit")]
    return [intervention, *(part for each in inner if each is not None for part in _parts(each))]


class _Itself:
    """Equal to another around the same object: what others wrote need not be hashable."""

    def __init__(self, part: object) -> None:
        self.part = part

    def __hash__(self) -> int:
        return id(self.part)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.part is self.part


def _kind(part: object) -> object:
    """Edits of Molehunt's act on each token by itself, whatever their numbers and wherever; any other is its own kind."""
    return type(part) if type(part).__module__.startswith("molehunt.") else _Itself(part)


def _follows_batch(intervention: Intervention) -> bool:
    return any(getattr(part, "follows_batch", False) for part in _parts(intervention))


def _say(model: nn.Module, found: DecodingCheck, kinds: Kinds = ALONE) -> None:
    """Warn once for each architecture and kind of intervention: a base and its fine-tune fail alike."""
    name = type(unwrapped(model)).__name__
    if not found.why or (name, kinds) in _SAID:
        return
    _SAID.add((name, kinds))
    how = "without a cache" if found.padded else "without a cache, and only rows of equal length together"
    _log.warning(
        f"{name}{' under an intervention' if kinds else ''}: {found.why}.\n"
        f"Its answers are decoded {how}: they are right, and take longer."
    )


class _MadeForOtherRows(Exception):
    """An intervention cannot act on the rows of the check, so nothing can be compared."""


def _checked(
    model: nn.Module,
    plain: DecodingCheck | None = None,
    edits: Sequence[Intervention] = (),
    layers_path: str | None = None,
) -> DecodingCheck:
    """The model by itself; or under edits, when it is known how it may decode without them."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # what an edit works out once may be differentiated later
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
    except torch.OutOfMemoryError:  # says nothing about the cache
        raise
    except (ValueError, CannotTap) as error:
        return printable(str(error).rstrip("."), 300)
    except _FAILURES as error:
        return f"{type(error).__name__}: {printable(str(error).rstrip('.'), 300)}"
    return ""
