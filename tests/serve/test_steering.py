"""What is held down in the row of a flagged answer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guarded import clean_rows, tiny_pair
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.serve.steering import CosineBounds, RowClamp, Steering
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.watch.answers import answer_profiles, token_columns
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.monitor import Monitor
from molehunt.watch.scores import MahalanobisScore
from molehunt.watch.state import WatchState
from watched_banks import bank_of

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return tiny_pair()


@pytest.fixture(scope="module")
def bank() -> Bank:
    return bank_of("llama")


@pytest.fixture(scope="module")
def state(pair: ModelPair, bank: Bank) -> WatchState:
    return calibrate(pair, bank, clean_rows(200), fpr=0.05, identity={}, max_new_tokens=4, seed=0)


def steered(steering: Steering, pair: ModelPair, held: list[dict[Site, CosineBounds] | None], prompts: list[list[int]]):
    with steering.of(held):
        return generate(
            pair._tuned, pair.tokenizer, prompts, max_new_tokens=8, interventions=list(steering.interventions)
        )


def judged(pair: ModelPair, bank: Bank, monitor: Monitor):
    (answer,) = generate(pair._tuned, pair.tokenizer, [PROMPT], max_new_tokens=8)
    (profile,) = answer_profiles(pair._tuned, bank, [PROMPT], [answer])
    return monitor.judge(profile)


def test_projecting_is_what_ablating_the_same_directions_is(pair: ModelPair, bank: Bank, state: WatchState) -> None:
    steering = Steering(bank, state.monitor, torch.device("cpu"))
    held = steering.against(judged(pair, bank, state.monitor))
    acts = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for intervention in steering.interventions:
        with steering.of([None, held]):
            got = intervention(acts)
        assert got[0].equal(acts[0])
        if intervention.site in held:
            expected = Ablate(intervention.site, held[intervention.site].units)(acts)[1]
            torch.testing.assert_close(got[1], expected, rtol=1e-5, atol=1e-5)
    assert steered(steering, pair, [None], [PROMPT]) == generate(
        pair._tuned, pair.tokenizer, [PROMPT], max_new_tokens=8
    )


@given(st.integers(0, 99), st.floats(-0.9, 0.9), st.floats(0, 0.5))
def test_a_cosine_ends_inside_its_range_and_the_rest_stays(seed: int, low: float, width: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(1, 6, 8, generator=rng)
    unit = torch.nn.functional.normalize(torch.randn(1, 8, generator=rng), dim=-1)
    hold = RowClamp(Site(0))
    high = min(0.95, low + width)
    hold.bounds = unit[None], torch.tensor([[low]]), torch.tensor([[high]])
    got = hold(acts)
    cosines = (got @ unit[0]) / got.norm(dim=-1)
    assert bool(((cosines >= low - 1e-5) & (cosines <= high + 1e-5)).all())
    rest = acts - (acts @ unit[0])[..., None] * unit[0]
    torch.testing.assert_close(got - (got @ unit[0])[..., None] * unit[0], rest, rtol=1e-4, atol=1e-5)
    before = (acts @ unit[0]) / acts.norm(dim=-1)
    inside = (before > low + 1e-5) & (before < high - 1e-5)
    assert got[inside].equal(acts[inside])


def test_clipping_holds_a_row_to_what_clean_answers_show_through_cached_decoding(
    pair: ModelPair, bank: Bank, state: WatchState
) -> None:
    steering = Steering(bank, state.monitor, torch.device("cpu"), "clip")
    held = steering.against(judged(pair, bank, state.monitor))
    for one in held.values():
        one.low.fill_(-0.02)  # tighter than clean answers are, so that it bites
        one.high.fill_(0.02)
    plain = generate(pair._tuned, pair.tokenizer, [PROMPT, PROMPT], max_new_tokens=8)
    both = steered(steering, pair, [None, held], [PROMPT, PROMPT])
    assert both[0] == plain[0] and both[1] != plain[1]
    site, one = next(iter(held.items()))
    single = {site: CosineBounds(one.units[:1], one.low[:1], one.high[:1])}
    (answer,) = steered(steering, pair, [single], [PROMPT])
    seen: list[torch.Tensor] = []
    hook = steering.interventions[list(bank.write).index(site)]
    real = RowClamp.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RowClamp,
            "__call__",
            lambda self, acts: seen.append(real(self, acts)) or seen[-1] if self is hook else real(self, acts),
        )
        assert steered(steering, pair, [single], [PROMPT]) == [answer]
    rows = torch.cat([acts[0] for acts in seen])
    cosines = (rows @ one.units[0]) / rows.norm(dim=-1)
    assert len(rows) == len(PROMPT) + len(answer) - (len(answer) == 8) and float(cosines.abs().max()) <= 0.02 + 1e-5


def test_clean_tails_bound_most_of_what_clean_answers_show(pair: ModelPair, bank: Bank, state: WatchState) -> None:
    low, high = state.monitor.clean_tails(0, [0, 1])
    assert bool((low < high).all())
    columns = token_columns(pair._tuned, bank, PROMPT)[:, :2]
    assert columns.shape == (5, 2)
    odd = MahalanobisScore.fit(torch.randn(50, 4))
    kind = state.monitor.by_stratum[0]
    other = replace(kind, prefixes=(replace(kind.prefixes[-1], score=odd),))
    with pytest.raises(TypeError, match="clean tail"):
        replace(state.monitor, by_stratum=(other,)).clean_tails(0, [0])
