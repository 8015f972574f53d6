"""The only code that accesses a model's cache: it passes the cache to a model, and reads it from a call or an output.

transformers has called the argument `past_key_values`, `cache_params` and, since 5.24, `cache`. A hook that looks for one
of these names would take every decoding step for the start of a batch when a caller uses another name. So no other file
of the package names the argument.
"""

import copy
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as memoized
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from molehunt.errors import CannotTap
from molehunt.model.blocks import decoder, unwrapped
from molehunt.model.taps import live

NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the argument, and of the field of the output, newest first."""
SELECTS_ROWS = ("reorder_cache", "batch_select_indices")
"""Methods of a cache that select rows by their indices; the first one moves the indices to the device of the cache."""


class Uncached:
    """Replaces the cache of a batch that decodes without one, so that hooks can follow its rows as those of a cache."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        """Number of columns of the first pass of the batch; every later pass runs them again."""

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Select rows of the batch. This object stores nothing; hooks that follow the batch replace this method."""

    def reorder_cache(self, indices: Int[Tensor, " kept"]) -> None:
        """See `batch_select_indices`."""


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """A forward pass of a decoder, as seen by a hook that runs before it."""

    cache: Any
    """Object with the lifetime of the batch: its cache, or an `Uncached`. None if the caller has no cache."""
    begins: bool
    """Whether this pass starts a batch (a prefill); otherwise it continues one."""
    again: int
    """Number of columns on the left that an earlier pass of this batch has read: 0 unless a batch decodes without a cache."""
    ids: Int[Tensor, "batch pos"] | None
    """Token ids; None if the pass starts from embeddings."""
    mask: Any
    """The attention mask that the caller passed."""

    def tokens(self) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Token ids, and a mask that is True at real tokens. Raises CannotTap if the call does not state them."""
        if self.ids is None:
            raise CannotTap("a prefill from embeddings has no token ids to decide by.")
        if self.mask is None:
            return self.ids, torch.ones_like(self.ids, dtype=torch.bool)
        if not isinstance(self.mask, Tensor) or self.mask.shape != self.ids.shape:
            raise CannotTap("a prefill whose attention mask is not [batch pos] does not say which tokens are padding.")
        return self.ids, self.mask.bool()


@dataclass(frozen=True, eq=False)
class _Announced:
    """Facts that Molehunt's own decoding states about the running pass, so that hooks need not infer them from the call."""

    begins: bool
    uncached: Uncached | None
    ids: Int[Tensor, "batch pos"] | None
    mask: Int[Tensor, "batch all"] | None


_ANNOUNCED: "WeakKeyDictionary[nn.Module, _Announced]" = WeakKeyDictionary()
"""Facts by decoder, because a pass of one model may run inside a hook of another."""


@contextmanager
def announced(
    model: nn.Module,
    *,
    begins: bool,
    uncached: Uncached | None = None,
    ids: Int[Tensor, "batch pos"] | None = None,
    mask: Int[Tensor, "batch all"] | None = None,
) -> Generator[None, None, None]:
    """Inside the block, state whether passes of the model start or continue a batch.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        begins: whether the passes start a batch.
        uncached: replaces the cache of a batch that decodes without one.
        ids: token ids, for a model that passes embeddings to its decoder, as models with a vision tower do.
        mask: whether each token is real; False at padding.
    """
    inner = decoder(model)
    before = _ANNOUNCED.get(inner)
    _ANNOUNCED[inner] = _Announced(begins, uncached, ids, mask)
    try:
        yield
    finally:
        if before is None:
            del _ANNOUNCED[inner]
        else:
            _ANNOUNCED[inner] = before


@contextmanager
def on_decoder_calls(
    model: nn.Module,
    before: Callable[[DecoderCall], None],
    after: Callable[[Any], None] | None = None,
) -> Generator[None, None, None]:
    """Call `before` with each pass of the model's decoder inside the block, and `after` with the cache after that pass.

    Raises:
        CannotTap: in a forward pass of Molehunt's own decoding, when the call does not contain the cache.
    """

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(_read(module, args, kwargs))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if after is not None:
            facts = _ANNOUNCED.get(module)
            after(facts.uncached if facts is not None and facts.uncached is not None else left_by(output))

    inner = decoder(model)
    handles = [
        inner.register_forward_pre_hook(live(begin), with_kwargs=True),
        inner.register_forward_hook(live(end)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DecoderCall:
    given = _bound(module, args, kwargs)
    cache = next((given[name] for name in NAMES if given.get(name) is not None), None)
    ids, mask = given.get("input_ids", args[0] if args else None), given.get("attention_mask")
    facts = _ANNOUNCED.get(module)
    if facts is None:
        return DecoderCall(cache, not is_filled(cache), 0, ids, mask)
    ids, mask = (ids, mask) if facts.ids is None else (facts.ids, facts.mask)
    if facts.uncached is not None:
        return DecoderCall(facts.uncached, facts.begins, 0 if facts.begins else facts.uncached.prompt, ids, mask)
    if is_filled(cache) == facts.begins:
        raise CannotTap(
            f"{type(module).__name__} does not show its decoder the cache by a name that Molehunt knows "
            f"({', '.join(NAMES)}): prompts and answers cannot be distinguished.\nUse interventions that act on every token."
        )
    return DecoderCall(cache, facts.begins, 0, ids, mask)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; positional arguments get the names in `forward`."""
    names = [name for name in _parameters(type(module)) if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@memoized
def _parameters(of: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of the class's `forward`: wrappers that distribute a model replace that of the object."""
    return tuple(inspect.signature(of.forward).parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` has an argument of this name, such as `position_ids` or `logits_to_keep`."""
    return name in _parameters(type(unwrapped(model)))


def positions_for(model: nn.Module, positions: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """The argument with the position of each token; empty for a model without positions, or with relative ones."""
    return {"position_ids": positions} if takes(model, "position_ids") else {}


def keeps_cache(model: nn.Module) -> bool:
    """Whether the model's `forward` takes a cache by one of `NAMES`."""
    return any(takes(model, name) for name in NAMES)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments of a pass that extends `cache`; with None the pass creates a cache.

    Raises:
        CannotTap: the model takes no cache by a known name.
    """
    for name in NAMES:
        if takes(model, name):
            return {name: cache, "use_cache": True}
    raise CannotTap(f"{type(unwrapped(model)).__name__} takes no cache by a name that Molehunt knows.")


def left_by(output: Any) -> Any:
    """The cache in a model's output; None if it has none."""
    if isinstance(output, Mapping):  # reading a field by its old name would be a deprecation
        fields = cast("Mapping[str, Any]", output)
        return next((fields[name] for name in NAMES if name in set(fields.keys())), None)
    return next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)


def is_filled(cache: Any) -> bool:
    """Whether a cache contains tokens: a new cache, and None, do not."""
    if cache is None:
        return False
    layers: list[Any] | None = getattr(cache, "layers", None)
    if layers is not None and not layers:
        return False
    if holds_keys(cache):
        return bool(cache.get_seq_length())
    return bool(cache.has_previous_state())


def holds_keys(cache: Any) -> bool:
    """Whether any layer stores keys. A cache of recurrent states only has no length, and its past has no mask."""
    layers: list[Any] | None = getattr(cache, "layers", None)
    return layers is None or any(hasattr(layer, "keys") for layer in layers)


def select_rows(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Reduce the cache to these rows, in this order. Raises CannotTap for a cache whose rows cannot be selected."""
    layers: list[Any] = getattr(cache, "layers", [])
    for name in SELECTS_ROWS:
        if hasattr(cache, name) and all(hasattr(layer, name) for layer in layers):
            getattr(cache, name)(rows)
            return
    raise CannotTap(f"rows of a {type(cache).__name__} cannot be selected.")


def branched(cache: Any) -> Any:
    """A copy of a cache that grows independently of the original. Until then both share their tensors. None stays None.

    Raises:
        CannotTap: a layer writes into its tensors instead of appending to them, as those of recurrent states do.
    """
    if cache is None:
        return None
    from transformers.cache_utils import DynamicLayer

    if not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "recurrent_states") for layer in cache.layers):
        raise CannotTap(
            "this model keeps a recurrent state instead of the keys and values of every token, and a state cannot be "
            "continued in several ways.\nThis request reads one prompt once and continues it many times."
        )
    seen = copy.copy(cache)
    for name in SELECTS_ROWS:  # methods that a gate of the original cache has replaced
        seen.__dict__.pop(name, None)
    seen.layers = [copy.copy(layer) for layer in cache.layers]
    return seen
