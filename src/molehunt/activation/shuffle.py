"""Batches of tokens for training, mixed across shards, with a bounded buffer and a position to resume from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.activation.piece import DTYPES, Piece
from molehunt.activation.store import ActivationStore
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site

SLICE = 4096
"""Tokens read from a shard at once."""


@dataclass(frozen=True, eq=False, slots=True)
class PairBatch:
    """Both models' activations at one site, row for row the same tokens."""

    base: Float[Tensor, "n d_model"]
    tuned: Float[Tensor, "n d_model"]


def batches(
    source: ActivationStore | Sequence[Piece],
    site: Site,
    *,
    size: int,
    seed: int,
    buffer_tokens: int,
    epochs: int | None = None,
    drop_sinks: bool = True,
    skip: int = 0,
    delta_only: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[PairBatch]:
    """Yield batches of tokens in a random order that is the same for the same arguments.

    Shards are visited in random order. Their tokens enter a buffer, which is permuted; the first half of it leaves as
    batches and makes room. Each token appears exactly once per epoch. A batch that an epoch does not fill is filled
    from the next one, so only the very last can be short.

    Args:
        source: a store, or pieces from `stream`.
        site: whose activations.
        size: tokens in a batch.
        seed: of the order.
        buffer_tokens: greatest number of tokens in memory, besides a slice of one shard and the batch itself.
        epochs: passes over the source; endless by default.
        drop_sinks: leave out tokens that are sinks.
        skip: batches to leave out at the start, without reading their activations. Law: `batches(…, skip=k)` is what
            `batches(…)` yields after its first k.
        delta_only: yield zeros as `base` and the difference as `tuned`; the only way to read int8 differences.
        dtype: of what is yielded.

    Raises:
        ValueError: `size`, `epochs` or `skip` is out of range, or `buffer_tokens` is smaller than `size`.
        UsageError: the source lacks the site, or holds differences alone and `delta_only` is False.
        NotTestable: no token is left.
        InvalidInput: a shard is damaged; raised when it is reached.
    """
    if size < 1 or buffer_tokens < size or skip < 0 or (epochs is not None and epochs < 1):
        raise ValueError(
            f"size {size} and epochs {epochs} must be positive, skip {skip} not negative, and buffer_tokens "
            f"{buffer_tokens} no less than size"
        )
    read_from: _Source
    if isinstance(source, ActivationStore):
        read_from = _StoreSource(source, site, drop_sinks, delta_only)
    else:
        read_from = _PieceSource(source, site, drop_sinks, delta_only)
    if not sum(read_from.counts):
        raise NotTestable("no token is left to train on: there is none, or all are sinks (drop_sinks=False keeps them)")
    return _batches(read_from, size, seed, buffer_tokens, epochs, skip, dtype)


def _batches(
    source: "_Source", size: int, seed: int, buffer_tokens: int, epochs: int | None, skip: int, dtype: torch.dtype
) -> Iterator[PairBatch]:
    total = sum(source.counts)
    epoch, into = divmod(skip * size, total)
    buffer = _Buffer(source, min(buffer_tokens, total))
    waiting: list[Tensor] = []
    missing = size
    while epochs is None or epoch < epochs:
        for slots in buffer.epoch(seed, epoch, into):
            while len(slots):
                now, slots = slots[:missing], slots[missing:]
                waiting.append(buffer.acts[:, now])
                missing -= len(now)
                if not missing:
                    yield _batch(waiting, dtype)
                    waiting, missing = [], size
        epoch, into = epoch + 1, 0
    if waiting:
        yield _batch(waiting, dtype)


def _batch(parts: list[Tensor], dtype: torch.dtype) -> PairBatch:
    acts = torch.cat(parts, dim=1).to(dtype)
    return PairBatch(torch.zeros_like(acts[0]), acts[0]) if len(acts) == 1 else PairBatch(acts[0], acts[1])


class _Buffer:
    """Slots for activations, and which token lies in which slot."""

    def __init__(self, source: "_Source", slots: int) -> None:
        self.source = source
        self.acts = torch.empty(source.sides, slots, source.d_model, dtype=source.dtype)
        self.shard = torch.zeros(slots, dtype=torch.int64)
        self.token = torch.zeros(slots, dtype=torch.int64)

    def epoch(self, seed: int, epoch: int, into: int) -> Iterator[Int[Tensor, " n"]]:
        """Yield slots in the order in which their tokens leave; they are overwritten when the next are yielded.

        Args:
            seed: of every epoch.
            epoch: 0-based.
            into: number of tokens that have left before; their activations are not read.
        """
        rng = torch.Generator().manual_seed(_mixed(seed, epoch))
        order: list[int] = torch.randperm(len(self.source.counts), generator=rng).tolist()
        queue = [(shard, 0) for shard in reversed(order) if self.source.counts[shard]]
        free, held, left, loaded = torch.arange(len(self.shard)), torch.arange(0), 0, False
        while queue or len(held):
            arriving, free = self._place(queue, free)
            held = torch.cat([held, arriving])
            held = held[torch.randperm(len(held), generator=rng)]
            leaving = (len(held) + 1) // 2 if queue else len(held)
            out, staying = held[:leaving], held[leaving:]
            if left + leaving > into:
                out = out[max(0, into - left) :]
                self._load(arriving if loaded else torch.cat([out, staying]))
                loaded = True
                yield out
            left += leaving
            free, held = torch.cat([free, held[:leaving]]), staying

    def _place(self, queue: list[tuple[int, int]], free: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Give the next tokens of `queue`, a stack of shards and their next tokens, to free slots.

        Returns the slots that were taken and those that are left.
        """
        taken = 0
        while queue and taken < len(free):
            shard, token = queue.pop()
            n = min(len(free) - taken, self.source.counts[shard] - token)
            slots = free[taken : taken + n]
            self.shard[slots] = shard
            self.token[slots] = torch.arange(token, token + n)
            taken += n
            if token + n < self.source.counts[shard]:
                queue.append((shard, token + n))
        return free[:taken], free[taken:]

    def _load(self, slots: Int[Tensor, " n"]) -> None:
        """Read the activations that belong in `slots`, shard by shard and a slice at a time."""
        for shard in self.shard[slots].unique().tolist():
            mine = slots[self.shard[slots] == shard]
            mine = mine[self.token[mine].argsort()]
            rows = self.source.rows(shard)[self.token[mine]]
            for start in range(int(rows[0]), int(rows[-1]) + 1, SLICE):
                inside = (rows >= start) & (rows < start + SLICE)
                if bool(inside.any()):
                    stop = min(start + SLICE, int(rows[-1]) + 1)
                    self.acts[:, mine[inside]] = self.source.read(shard, start, stop)[:, rows[inside] - start]


def _mixed(seed: int, epoch: int) -> int:
    """A generator's seed; neighbouring seeds and epochs share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")


class _Source(Protocol):
    counts: tuple[int, ...]
    """Tokens of each shard that take part."""
    sides: int
    """2 for base and tuned, 1 for differences."""
    d_model: int
    dtype: torch.dtype

    def rows(self, shard: int) -> Int[Tensor, " used"]:
        """Where in the shard those tokens lie, ascending."""
        ...

    def read(self, shard: int, start: int, stop: int) -> Float[Tensor, "sides n d_model"]:
        """All tokens from `start` to `stop`."""
        ...


class _StoreSource:
    def __init__(self, store: ActivationStore, site: Site, drop_sinks: bool, delta_only: bool) -> None:
        if site not in store.sites:
            raise UsageError(f"{site} was not harvested; there are {', '.join(map(str, store.sites))}.")
        if store.manifest.delta_int8 and not delta_only:
            raise _differences_alone()
        self._store, self._site, self._drop_sinks = store, site, drop_sinks
        self.sides = 1 if delta_only else 2
        self.counts = tuple(s.tokens - s.sinks * drop_sinks for s in store.manifest.shards)
        self.d_model = store.d_model
        self.dtype = torch.float32 if delta_only else DTYPES[store.manifest.dtype]
        self.rows = lru_cache(maxsize=1)(self._rows)

    def _rows(self, shard: int) -> Tensor:
        sink = self._store.read(shard, sites=()).sink
        return (~sink).nonzero()[:, 0] if self._drop_sinks else torch.arange(len(sink))

    def read(self, shard: int, start: int, stop: int) -> Tensor:
        return _stacked(self._store.read(shard, start, stop, sites=(self._site,)), self._site, self.sides, slice(None))


class _PieceSource:
    def __init__(self, pieces: Sequence[Piece], site: Site, drop_sinks: bool, delta_only: bool) -> None:
        for piece in pieces:
            if site not in {**piece.base, **piece.delta}:
                raise UsageError(f"the pieces hold no {site}; they hold {', '.join(map(str, piece.base))}.")
            if piece.delta and not delta_only:
                raise _differences_alone()
        self._pieces, self._site = pieces, site
        self.sides = 1 if delta_only else 2
        self._rows = [(~p.sink).nonzero()[:, 0] if drop_sinks else torch.arange(len(p.sink)) for p in pieces]
        self.counts = tuple(map(len, self._rows))
        held = [{**piece.delta, **piece.base}[site] for piece in pieces]
        self.d_model = held[0].shape[1] if held else 0
        self.dtype = torch.float32 if delta_only or not held else held[0].dtype

    def rows(self, shard: int) -> Tensor:
        return self._rows[shard]

    def read(self, shard: int, start: int, stop: int) -> Tensor:
        return _stacked(self._pieces[shard], self._site, self.sides, slice(start, stop))


def _stacked(piece: Piece, site: Site, sides: int, span: slice) -> Tensor:
    if site in piece.delta:
        return piece.delta[site][span][None]
    base, tuned = piece.base[site][span], piece.tuned[site][span]
    return torch.stack([base, tuned]) if sides == 2 else (tuned.float() - base.float())[None]


def _differences_alone() -> UsageError:
    return UsageError(
        "this store holds differences alone, so there are no two models' activations to yield.\n"
        "Ask for delta_only, or harvest without --delta-int8."
    )
