"""Batches for training: each token once per epoch, in an order that can be repeated and taken up anywhere."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.activation.piece import Piece
from molehunt.activation.shuffle import PairBatch, batches
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site

SITE = Site(1)


def piece(start: int, n: int, *, sink_every: int = 4) -> Piece:
    """Tokens whose activations are their own number, and its negative in the fine-tune."""
    number = torch.arange(start, start + n, dtype=torch.int32)
    acts = number[:, None].float() * torch.tensor([1.0, 0.5])
    return Piece(
        tokens=number,
        document=number // 7,
        position=number % 7,
        sink=number % sink_every == 0,
        base={SITE: acts},
        tuned={SITE: -acts},
    )


def pieces(*lengths: int, **options: int) -> list[Piece]:
    starts = itertools.accumulate((0, *lengths))
    return [piece(start, n, **options) for start, n in zip(starts, lengths, strict=False)]


def numbers(found: list[PairBatch]) -> list[int]:
    return [int(n) for batch in found for n in batch.base[:, 0]]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda all: sum(all) > 4)
sizes = st.integers(1, 30)


@given(lengths, sizes, st.integers(0, 50), st.integers(0, 9), st.integers(1, 3), st.booleans())
def test_each_token_appears_exactly_once_per_epoch(lengths, size, more, seed, epochs, drop_sinks) -> None:
    source = pieces(*lengths)
    wanted = [n for n in range(sum(lengths)) if n % 4 or not drop_sinks]
    found = list(
        batches(source, SITE, size=size, seed=seed, buffer_tokens=size + more, epochs=epochs, drop_sinks=drop_sinks)
    )
    reported = numbers(found)
    assert len(reported) == epochs * len(wanted)
    for epoch in range(epochs):
        assert sorted(reported[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted
    assert all(len(batch.base) == size for batch in found[:-1]), "only the very last can be short"
    assert all(torch.equal(batch.tuned, -batch.base) for batch in found), "rows of both models stay together"


@given(lengths, sizes, st.integers(0, 50), st.integers(0, 12), st.integers(0, 9))
def test_what_is_skipped_is_what_came_before(lengths, size, more, skip, seed) -> None:
    source, options = pieces(*lengths), {"size": size, "seed": seed, "buffer_tokens": size + more, "epochs": 3}
    assert numbers(list(batches(source, SITE, skip=skip, **options))) == numbers(
        list(batches(source, SITE, **options))[skip:]
    )


def test_the_order_follows_from_the_seed_and_differs_between_epochs() -> None:
    source = pieces(30, 50, 20)

    def order(**options: int) -> list[int]:
        return numbers(
            list(batches(source, SITE, **{"size": 8, "seed": 0, "buffer_tokens": 32, "epochs": 2} | options))
        )

    assert order() == order(size=16) == order(seed=0)
    assert order() != order(seed=1)
    assert order()[:75] != order()[75:]
    assert order() != order(buffer_tokens=40)


def test_without_a_number_of_epochs_it_never_ends() -> None:
    found = itertools.islice(batches(pieces(5), SITE, size=4, seed=0, buffer_tokens=4), 100)
    assert len(numbers(list(found))) == 400


def test_tokens_of_several_shards_meet_in_one_batch() -> None:
    source = pieces(*[40] * 10)
    found = list(batches(source, SITE, size=32, seed=0, buffer_tokens=200, epochs=1))
    shards = [len({n // 40 for n in numbers([batch])}) for batch in found]
    assert min(shards[:-1]) >= 3
    whole = numbers(found)
    assert whole != sorted(whole)


def test_half_of_the_buffer_stays_to_meet_what_comes_next() -> None:
    source = pieces(*[40] * 6, sink_every=1000)
    for batch in list(batches(source, SITE, size=40, seed=0, buffer_tokens=40, epochs=1, drop_sinks=False))[:-1]:
        assert len({n // 40 for n in numbers([batch])}) >= 2, "a buffer that is emptied would give one shard at a time"


def test_what_is_held_is_bounded_by_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.activation import shuffle

    made: list[int] = []
    real = torch.empty

    def counted(*shape: int, **options):
        made.append(shape[1])
        return real(*shape, **options)

    read: list[int] = []
    monkeypatch.setattr(shuffle, "SLICE", 16)
    monkeypatch.setattr(shuffle.torch, "empty", counted)
    stacked = shuffle._stacked
    monkeypatch.setattr(
        shuffle,
        "_stacked",
        lambda piece, site, sides, span: read.append(span.stop - span.start) or stacked(piece, site, sides, span),
    )
    found = numbers(list(batches(pieces(100, 30, 200), SITE, size=8, seed=0, buffer_tokens=48, epochs=1)))
    assert sorted(found) == [n for n in range(330) if n % 4]
    assert made == [48] and max(read) <= 16


def test_skipping_reads_nothing_of_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.activation import shuffle

    read: list[int] = []
    stacked = shuffle._stacked
    monkeypatch.setattr(
        shuffle,
        "_stacked",
        lambda piece, site, sides, span: read.append(span.stop - span.start) or stacked(piece, site, sides, span),
    )
    next(batches(pieces(*[100] * 20), SITE, size=10, seed=0, buffer_tokens=50, skip=120))
    assert sum(read) <= 500


def test_dtype_and_differences() -> None:
    source = pieces(20)
    half = next(batches(source, SITE, size=4, seed=0, buffer_tokens=20, dtype=torch.bfloat16))
    assert half.base.dtype == half.tuned.dtype == torch.bfloat16
    whole = next(batches(source, SITE, size=4, seed=0, buffer_tokens=20))
    delta = next(batches(source, SITE, size=4, seed=0, buffer_tokens=20, delta_only=True))
    assert whole.base.dtype == torch.float32
    assert not delta.base.any() and torch.equal(delta.tuned, whole.tuned - whole.base)


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"epochs": 0}, {"skip": -1}, {"buffer_tokens": 3}],
    ids=lambda options: next(iter(options)),
)
def test_numbers_that_make_no_sense_are_refused_at_once(options) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        batches(pieces(9), SITE, **{"size": 4, "seed": 0, "buffer_tokens": 8} | options)


def test_a_source_without_the_site_or_without_tokens() -> None:
    with pytest.raises(UsageError, match=r"L9\.resid"):
        batches(pieces(9), Site(9), size=1, seed=0, buffer_tokens=1)
    with pytest.raises(NotTestable, match="drop_sinks"):
        batches(pieces(9, sink_every=1), SITE, size=1, seed=0, buffer_tokens=1)
    with pytest.raises(NotTestable):
        batches([], SITE, size=1, seed=0, buffer_tokens=1)


def test_pieces_of_differences_must_be_asked_for() -> None:
    whole = piece(0, 8)
    alone = Piece(
        tokens=whole.tokens,
        document=whole.document,
        position=whole.position,
        sink=whole.sink,
        delta={SITE: whole.tuned[SITE]},
    )
    with pytest.raises(UsageError, match="differences alone"):
        batches([alone], SITE, size=1, seed=0, buffer_tokens=1)
    found = next(batches([alone], SITE, size=6, seed=0, buffer_tokens=6, delta_only=True))
    assert sorted(int(-n) for n in found.tuned[:, 0]) == [1, 2, 3, 5, 6, 7]
