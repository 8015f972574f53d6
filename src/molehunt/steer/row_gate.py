"""Gates: one open for whole rows from prefill on, one open for the tokens whose projection is out of range."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.errors import CannotTap
from molehunt.model.cache import SELECTS_ROWS, DecoderCall, on_decoder_calls
from molehunt.site import Site


class RowGate:
    """Open at every token of some rows of the batch, in prefill and in every decoding step."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, rows: Bool[Tensor, " batch"]) -> None:
        self.rows = rows
        """Whether the intervention acts on each row, in the order of the batch as it is now."""

    def select_rows(self, indices: Int[Tensor, " rows"]) -> None:
        """Follow the batch when rows leave it (or change places): `indices` are those that stay, in their new order."""
        self.rows = self.rows[indices.to(self.rows.device)]

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """Raises ValueError for a batch of another size: rows left it, and `select_rows` was not called."""
        if len(acts) != len(self.rows):
            raise ValueError(
                f"this gate was decided for {len(self.rows)} rows and meets a batch of {len(acts)}; call select_rows() with "
                "the rows that stay whenever some leave"
            )
        return self.rows.to(acts.device)[:, None].expand(acts.shape[:2])


@contextmanager
def gate_at_prefill(
    model: nn.Module, decide: Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Bool[Tensor, " batch"]]
) -> Generator[RowGate, None, None]:
    """A gate that is decided anew whenever a batch begins, and then stays with its rows for as long as their cache lives.

    Inside the block, a pass without cached tokens is a prefill: `decide` is called once, before any layer runs. Rows
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
    its_own: dict[
        str, MethodType | None
    ] = {}  # what the cache had in its place: another gate's, or none but its class's

    def follow(cache: Any) -> None:
        nonlocal followed
        for name, method in its_own.items():
            delattr(followed, name) if method is None else setattr(followed, name, method)
        its_own.clear()
        for name in SELECTS_ROWS if cache is not None else ():
            its_own[name] = vars(cache).get(name)
            setattr(cache, name, _with_gate(getattr(cache, name), gate))
        followed = cache

    def before(call: DecoderCall) -> None:
        if call.begins:
            gate.rows = decide(*call.tokens())
        elif call.cache is not followed:
            raise CannotTap(
                "this batch was prefilled before gate_at_prefill was entered, or another one was since: no "
                "decision was made on its rows.\nPrefill it inside the block, and finish one batch before the next."
            )

    def after(cache: Any) -> None:
        if cache is not followed:
            follow(cache)

    try:
        with on_decoder_calls(model, before, after):
            yield gate
    finally:
        follow(None)


def _with_gate(method: MethodType, gate: RowGate) -> MethodType:
    """`method` of a cache, with the gate selecting the same rows."""

    def select(cache: Any, indices: Tensor) -> None:
        method.__func__(cache, indices)  # of the cache that is called, which may be a deep copy of the one followed
        gate.select_rows(indices)

    return MethodType(select, method.__self__)


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
