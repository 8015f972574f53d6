"""The one seam to a model's cache: how it is passed to a model, and how it is read from a call or an output.

transformers has called the argument `past_key_values`, `cache_params` and, since 5.24, `cache`. A hook that looks for one
of these names takes every decoding step for the beginning of a batch when a caller uses another, so nothing else in the
package names it.
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
"""Every name of the argument, and of the output's field, newest first."""
SELECTS_ROWS = ("reorder_cache", "batch_select_indices")
"""Methods of a cache that leave it with the rows of the given indices, in their order; the first moves them to its device."""


class Uncached:
    """Stands for the cache of a batch that decodes without one: hooks follow its rows as they would a cache's."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        """Columns of the pass that began the batch; every later pass runs them again."""

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Rows leave the batch. Nothing is held here; whoever follows the batch replaces this method."""

    def reorder_cache(self, indices: Int[Tensor, " kept"]) -> None:
        """See `batch_select_indices`."""


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """A forward pass of a decoder, as a hook before it sees it."""

    cache: Any
    """What lives as long as the batch does: its cache, or an `Uncached`. None where the caller keeps no cache."""
    begins: bool
    """Whether this pass begins a batch (a prefill); otherwise it continues one."""
    again: int
    """Columns on the left that an earlier pass of this batch has read: 0 but where a batch decodes without a cache."""
    ids: Int[Tensor, "batch pos"] | None
    """Token ids; None where the pass starts from embeddings."""
    mask: Any
    """The attention mask as it was given."""

    def tokens(self) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Token ids and where they are real (padding is False). Raises CannotTap where the call does not say so."""
        if self.ids is None:
            raise CannotTap("a prefill from embeddings has no token ids to decide by.")
        if self.mask is None:
            return self.ids, torch.ones_like(self.ids, dtype=torch.bool)
        if not isinstance(self.mask, Tensor) or self.mask.shape != self.ids.shape:
            raise CannotTap("a prefill whose attention mask is not [batch pos] does not say which tokens are padding.")
        return self.ids, self.mask.bool()


@dataclass(frozen=True, eq=False)
class _Announced:
    """What our own decoding says of the pass that runs, so that hooks need not infer it from the call."""

    begins: bool
    uncached: Uncached | None
    ids: Int[Tensor, "batch pos"] | None
    mask: Int[Tensor, "batch all"] | None


_ANNOUNCED: "WeakKeyDictionary[nn.Module, _Announced]" = WeakKeyDictionary()
"""By decoder: a pass of one model may run inside a hook of another."""


@contextmanager
def announced(
    model: nn.Module,
    *,
    begins: bool,
    uncached: Uncached | None = None,
    ids: Int[Tensor, "batch pos"] | None = None,
    mask: Int[Tensor, "batch all"] | None = None,
) -> Generator[None, None, None]:
    """Passes of the model inside the block begin or continue a batch.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        begins: whether they begin one.
        uncached: where there is no cache that could show it.
        ids: the tokens, for a model that gives its decoder embeddings, as those with a vision tower do.
        mask: which of all tokens are real.
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
    """Show `before` each pass of the model's decoder inside the block, and `after` the cache that the pass left.

    Raises:
        CannotTap: in a forward pass of our own decoding, when the call does not show the cache that it was given.
    """

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(_read(module, args, kwargs))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if after is not None:
            said = _ANNOUNCED.get(module)
            after(said.uncached if said is not None and said.uncached is not None else left_by(output))

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
    said = _ANNOUNCED.get(module)
    if said is None:
        return DecoderCall(cache, not is_filled(cache), 0, ids, mask)
    ids, mask = (ids, mask) if said.ids is None else (said.ids, said.mask)
    if said.uncached is not None:
        return DecoderCall(said.uncached, said.begins, 0 if said.begins else said.uncached.prompt, ids, mask)
    if is_filled(cache) == said.begins:
        raise CannotTap(
            f"{type(module).__name__} does not show its decoder the cache by a name that Molehunt knows "
            f"({', '.join(NAMES)}): prompts and answers cannot be distinguished.\nUse interventions that act on every token."
        )
    return DecoderCall(cache, said.begins, 0, ids, mask)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; those given by position take the names of `forward`."""
    names = [name for name in _parameters(type(module)) if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@memoized
def _parameters(of: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of `forward`; of the class, since wrappers that spread a model over devices replace it."""
    return tuple(inspect.signature(of.forward).parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` has an argument of this name, such as `position_ids` or `logits_to_keep`."""
    return name in _parameters(type(unwrapped(model)))


def positions_for(model: nn.Module, positions: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """The argument that gives each token its position; none for a model without positions, or with relative ones."""
    return {"position_ids": positions} if takes(model, "position_ids") else {}


def keeps_cache(model: nn.Module) -> bool:
    """Whether the model takes a cache by a name that is known here."""
    return any(takes(model, name) for name in NAMES)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments that run a pass on `cache`, which it extends; with None the pass makes one.

    Raises:
        CannotTap: the model takes no cache by a known name.
    """
    for name in NAMES:
        if takes(model, name):
            return {name: cache, "use_cache": True}
    raise CannotTap(f"{type(unwrapped(model)).__name__} takes no cache by a name that Molehunt knows.")


def left_by(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    if isinstance(output, Mapping):  # reading a field by its old name would be a deprecation
        held = cast("Mapping[str, Any]", output)
        return next((held[name] for name in NAMES if name in set(held.keys())), None)
    return next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens: a new one, and None, do not."""
    if cache is None:
        return False
    layers: list[Any] | None = getattr(cache, "layers", None)
    if layers is not None and not layers:
        return False
    if holds_keys(cache):
        return bool(cache.get_seq_length())
    return bool(cache.has_previous_state())


def holds_keys(cache: Any) -> bool:
    """Whether any layer attends to earlier tokens; a cache of recurrent states alone has no length and no mask of its past."""
    layers: list[Any] | None = getattr(cache, "layers", None)
    return layers is None or any(hasattr(layer, "keys") for layer in layers)


def select_rows(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Leave the cache with these rows, in this order. Raises CannotTap for a cache whose rows cannot be selected."""
    layers: list[Any] = getattr(cache, "layers", [])
    for name in SELECTS_ROWS:
        if hasattr(cache, name) and all(hasattr(layer, name) for layer in layers):
            getattr(cache, name)(rows)
            return
    raise CannotTap(f"rows of a {type(cache).__name__} cannot be selected.")


def branched(cache: Any) -> Any:
    """A cache that grows without the one it came from: both hold the same tensors until then. None stays None.

    Raises:
        CannotTap: a layer writes into its tensors instead of appending to them, as those of recurrent states do.
    """
    if cache is None:
        return None
    from transformers.cache_utils import DynamicLayer

    if not all(isinstance(layer, DynamicLayer) and not hasattr(layer, "recurrent_states") for layer in cache.layers):
        raise CannotTap(
            "this model keeps a recurrent state instead of the keys and values of every token, and a state cannot be "
            "continued in several ways.\nWhat was asked for reads one prompt once and continues it many times."
        )
    seen = copy.copy(cache)
    for name in SELECTS_ROWS:  # that of a gate which follows the other
        seen.__dict__.pop(name, None)
    seen.layers = [copy.copy(layer) for layer in cache.layers]
    return seen
