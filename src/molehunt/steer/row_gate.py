"""Gates: one open for whole rows from prefill on, one open for the tokens whose projection is out of range."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.errors import CannotTap
from molehunt.model.blocks import decoder
from molehunt.model.site import Site

SELECTS_ROWS = ("batch_select_indices", "reorder_cache")
"""Methods of a key-value cache that leave it with the rows of the given indices."""


class RowGate:
    """Open at every token of some rows of the batch, in prefill and in every cached step."""

    def __init__(self, rows: Bool[Tensor, " batch"]) -> None:
        self.rows = rows
        """Whether the intervention acts on each row, in the order of the batch as it is now."""

    def keep(self, indices: Int[Tensor, " kept"]) -> None:
        """Follow the batch when rows leave it (or change places): `indices` are those that stay, in their new order."""
        self.rows = self.rows[indices.to(self.rows.device)]

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """Raises ValueError for a batch of another size: rows left it, and the gate was not told which."""
        if len(acts) != len(self.rows):
            raise ValueError(
                f"this gate was decided for {len(self.rows)} rows and meets a batch of {len(acts)}; call keep() with "
                "the rows that stay whenever some leave"
            )
        return self.rows.to(acts.device)[:, None].expand(acts.shape[:2])


@contextmanager
def gate_at_prefill(
    model: nn.Module, decide: Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Bool[Tensor, " batch"]]
) -> Generator[RowGate, None, None]:
    """A gate that is decided anew whenever a batch begins, and then stays with its rows for as long as their cache lives.

    Inside the block, a pass without cached tokens is a prefill: `decide` is asked, once, before any layer runs. Rows
    that leave the batch or change places do so in the cache, and that is where they are followed.

    Args:
        model: a causal language model, in a PEFT wrapper or not; `generate` of ours or of transformers may run it.
        decide: given token ids and where they are real (padding is False), on which rows to act. A conversation of
            several turns that is prefilled whole is judged whole; one that continues on its cache keeps its verdict,
            and one prefilled in chunks is judged by the first.

    Raises:
        CannotTap: in a forward pass: a cache that this gate did not see begin, or a batch whose tokens it cannot see.
    """
    gate = RowGate(torch.zeros(0, dtype=torch.bool))
    followed: Any = None  # the cache of the batch that runs
    its_own: dict[str, MethodType] = {}

    def follow(cache: Any) -> None:
        nonlocal followed
        for name, method in its_own.items():
            setattr(followed, name, method)
        its_own.clear()
        for name in SELECTS_ROWS if cache is not None else ():
            its_own[name] = getattr(cache, name)
            setattr(cache, name, _telling(its_own[name], gate))
        followed = cache

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            gate.rows = decide(*prefill_tokens(args, kwargs))
        elif cache is not followed:
            raise CannotTap(
                "this batch was prefilled before gate_at_prefill was entered, or another one was since: nobody has "
                "decided on its rows.\nPrefill it inside the block, and finish one batch before the next."
            )

    def after(module: nn.Module, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not followed:
            follow(cache)

    runs = decoder(model)
    handles = [runs.register_forward_pre_hook(before, with_kwargs=True), runs.register_forward_hook(after)]
    try:
        yield gate
    finally:
        for handle in handles:
            handle.remove()
        follow(None)


def _telling(method: MethodType, gate: RowGate) -> MethodType:
    """`method` of a cache, with the gate selecting the same rows."""

    def select(cache: Any, indices: Tensor) -> None:
        method.__func__(cache, indices)  # of the cache that is called, which may be a deep copy of the one followed
        gate.keep(indices)

    return MethodType(select, method.__self__)


def prefill_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and where they are real, from what a decoder was called with. Raises CannotTap where they are not."""
    ids: Tensor | None = args[0] if args else kwargs.get("input_ids")
    mask: Any = kwargs.get("attention_mask")
    if ids is None:
        raise CannotTap("a prefill from embeddings has no token ids to decide by.")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise CannotTap("a prefill whose attention mask is not [batch pos] does not say which tokens are padding.")
    return ids, mask.bool()


@dataclass(frozen=True, eq=False)
class AboveRange:
    """Open at each token whose projection on some direction is outside of [lo, hi]; a NaN is outside of every range.

    Before a `Clip` to the same ranges it changes nothing. Before an `Ablate` or an `Add` it leaves normal tokens alone.
    """

    site: Site
    """Where the ranges were learnt, which is where the intervention behind the gate must act."""
    directions: Float[Tensor, "k d_model"]
    """Used at unit length."""
    lo: Float[Tensor, " k"]
    hi: Float[Tensor, " k"]

    def __post_init__(self) -> None:
        if not bool((self.lo <= self.hi).all()):
            raise ValueError(f"{self.site}: every lo must be at most its hi")

    @cached_property
    def units(self) -> Float[Tensor, "k d_model"]:
        return normalize(self.directions.float(), dim=-1)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        units, lo, hi = (t.to(acts.device) for t in (self.units, self.lo, self.hi))
        projections = acts.float() @ units.mT
        return ~((lo <= projections) & (projections <= hi)).all(-1)
