"""Attacks that are repeated: quarantine keeps seeing them, a range that takes in what it flags does not."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.monitor import Monitor
from molehunt.watch.profile import Profile, profiles
from molehunt.watch.simulate import ORDERS, events, simulate

WRITTEN, COLUMNS = 3, 5


def answers(n: int, seed: int, *, shift: float = 0.0) -> list[Profile]:
    """Cosine-like columns; an attack moves all of them."""
    rng = torch.Generator().manual_seed(seed)
    columns = 0.1 * torch.randn(n, 4, COLUMNS, generator=rng) + shift
    return profiles(columns, [4] * n, torch.empty(n, 0))


@given(st.sampled_from(ORDERS), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_every_attack_comes_as_often_as_asked_and_benign_rows_keep_their_order(
    order: str, repeats: int, n: int, seed: int
) -> None:
    benign, attacks = answers(9, 0), answers(n, 1)
    strength = {id(a): i for i, a in enumerate(attacks)}
    stream = events(benign, attacks, repeats=repeats, order=order, seed=seed, strength=lambda a: strength[id(a)])  # pyright: ignore
    assert [id(e.profile) for e in stream if not e.repeat] == list(map(id, benign))
    for attack in attacks:
        assert [e.repeat for e in stream if e.profile is attack] == list(range(1, repeats + 1))
    inserted = [e for e in stream if e.repeat]
    if order == "rising":
        assert [strength[id(e.profile)] for e in inserted] == sorted(strength[id(e.profile)] for e in inserted)
    if order == "burst":
        assert [e.repeat for e in inserted] == list(range(1, repeats + 1)) * n


def test_quarantine_does_not_decay_and_the_absorbing_range_does() -> None:
    fit, calibrate = answers(300, 2), answers(300, 3)
    monitor = Monitor.fit(Fit(tuple(fit)), Calibrate(tuple(calibrate)), fpr=0.02)
    found = simulate(
        monitor, [*fit, *calibrate], answers(400, 4), answers(20, 5, shift=0.4), written=WRITTEN, repeats=100
    )
    assert len(found) == 2 * len(ORDERS)
    for one in found:
        assert one.first_sight.estimate == one.by_repeat[1].estimate and list(one.by_repeat) == [1, 2, 3, 10, 30, 100]
        if one.monitor.startswith("conformal"):
            assert {share.estimate for share in one.by_repeat.values()} == {1.0}
            assert one.fpr.low <= 0.02 * 2
        elif one.order == "burst":
            assert one.by_repeat[1].estimate > 0.15 and one.by_repeat[2].estimate == 0
        else:
            assert one.by_repeat[100].estimate == 0
