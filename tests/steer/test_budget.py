"""The strength that a budget allows, and what each strength costs clean answers."""

import math
from functools import partial

import pytest
import torch

from molehunt.errors import NotTestable, UsageError
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.budget import AnsweredPrompt, Budget, Disturbance, Search, Tried, disturbance, search_strength
from molehunt.steer.prefill_gate import linear_score, prefill_gate
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.traffic.split import Select
from molehunt.traffic.split import Test as TestSplit
from tiny_models import ARCHITECTURES, hooks, prompts, tiny_model, tiny_tokenizer

D, LAYER, STEPS = 32, 1, 6
PUSH = torch.randn(D, generator=torch.Generator().manual_seed(2))
VECTOR = SteeringVector({LAYER: PUSH}, VectorFacts(method="by hand", n_layers=3, d_model=D))
CLEAN = tuple(
    AnsweredPrompt(prompt, answer)
    for prompt, answer in zip(
        prompts(seed=1, lengths=(3, 40, 9, 5, 17, 2)), prompts(seed=2, lengths=(4, 1, 35, 7, 3, 5)), strict=True
    )
)
ROWS = tuple(prompts(seed=3, lengths=(5, 9, 4, 12, 7, 6, 8, 5)))
AMPLE = Budget(kl=math.inf, loss=math.inf)


def steered(model, **how):
    return partial(VECTOR.applied, model, **how)


# ------------------------------------------------------------------------------------------------- cost


def by_hand(model, row: AnsweredPrompt, strength: float, scope: str) -> tuple[float, float, float]:
    """KL and both losses of one row: one token at a time, without cache or padding, editing by position."""
    kl = plain_loss = steered_loss = 0.0
    for t, token in enumerate(row.answer):
        ids = [*row.prompt, *row.answer[:t]]
        n = len(row.prompt)
        at = {"all": range(len(ids)), "prompt": range(n), "generation": range(n, len(ids)), "last": [n - 1]}[scope]

        def edit(acts: torch.Tensor, at=tuple(at)) -> torch.Tensor:
            edited = acts.clone()
            edited[:, list(at)] += strength * PUSH
            return edited

        def hook(module, args, output, edit=edit):
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        blocks = model.transformer.h if hasattr(model, "transformer") else None
        if blocks is None:
            blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
        with torch.inference_mode():
            plain = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            handle = blocks[LAYER].register_forward_hook(hook)
            by_row = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            handle.remove()
        kl += float((plain.exp() * (plain - by_row)).sum())
        plain_loss -= float(plain[token])
        steered_loss -= float(by_row[token])
    return kl, plain_loss, steered_loss


@pytest.mark.parametrize(
    ("architecture", "scope"),
    [*((a, "all") for a in ARCHITECTURES), ("llama", "prompt"), ("llama", "generation"), ("llama", "last")],
)
def test_cost_is_that_of_each_row_token_by_token(architecture: str, scope: str) -> None:
    model = tiny_model(architecture)
    before = hooks(model)
    found = disturbance(model, tiny_tokenizer(), partial(steered(model, scope=scope), 0.7), CLEAN)
    by_row = [by_hand(model, row, 0.7, scope) for row in CLEAN]
    n = sum(len(row.answer) for row in CLEAN)
    assert found.tokens == n
    assert found.kl == pytest.approx(sum(kl for kl, _, _ in by_row) / n, rel=1e-3)
    assert found.loss == pytest.approx(sum(after - plain for _, plain, after in by_row) / n, rel=1e-3, abs=1e-5)
    assert found.kl > 1e-3 and hooks(model) == before


def test_no_steering_costs_nothing_and_rows_without_answers_count_for_nothing() -> None:
    model = tiny_model("llama")
    assert disturbance(model, tiny_tokenizer(), partial(steered(model), 0.0), CLEAN) == Disturbance(
        kl=0.0, loss=0.0, tokens=55
    )
    more = (*CLEAN, AnsweredPrompt([5, 6], []))
    cost = partial(disturbance, model, tiny_tokenizer(), partial(steered(model), 1.0))
    assert cost(more) == cost(CLEAN)
    with pytest.raises(NotTestable, match="None of 1 clean prompts has an answer"):
        cost(more[-1:])


def test_the_cost_of_conditional_steering_is_that_of_the_rows_it_steers() -> None:
    model, weight = tiny_model("llama"), torch.randn(D, generator=torch.Generator().manual_seed(9))
    cost = partial(disturbance, model, tiny_tokenizer(), clean=CLEAN)
    everywhere = cost(steered=partial(steered(model), 1.0))
    for threshold, expected in ((math.inf, Disturbance(kl=0.0, loss=0.0, tokens=55)), (-math.inf, everywhere)):
        with prefill_gate(model, Site(0), linear_score(weight), threshold) as gate:
            assert cost(steered=partial(steered(model, gate=gate), 1.0)) == expected


# ---------------------------------------------------------------------------------------------- search


def searched(model, budget: Budget, strengths=(0.25, 1.0, 4.0, 16.0), how=None, **options) -> Search:
    plain = generate(model, tiny_tokenizer(), ROWS, max_new_tokens=STEPS)

    def differs(answer, i: int) -> bool:
        return list(answer) != plain[i]

    given = {
        "prompts": Select(ROWS),
        "clean": Select(CLEAN),
        "succeeds": differs,
        "budget": budget,
        "max_new_tokens": STEPS,
        "strengths": strengths,
    }
    return search_strength(model, tiny_tokenizer(), how or steered(model), **{**given, **options})


@pytest.fixture(scope="module")
def ladder() -> Search:
    """Everything is within the budget."""
    return searched(tiny_model("llama"), AMPLE)


def test_every_strength_of_the_ladder_is_told_with_its_answers_and_its_cost(ladder: Search) -> None:
    model = tiny_model("llama")
    assert [one.strength for one in ladder.tried] == [0.25, 1.0, 4.0, 16.0]
    plain = generate(model, tiny_tokenizer(), ROWS, max_new_tokens=STEPS)
    for one in ladder.tried:
        edit = Add(Site(LAYER), PUSH, one.strength)
        answers = generate(model, tiny_tokenizer(), ROWS, max_new_tokens=STEPS, interventions=[edit])
        assert one.success == proportion(sum(a != b for a, b in zip(answers, plain, strict=True)), len(ROWS))
        assert one.cost == disturbance(model, tiny_tokenizer(), partial(steered(model), one.strength), CLEAN)
        assert one.within and not one.broken
    assert ladder.without == proportion(0, len(ROWS))
    shares = [one.success.estimate for one in ladder.tried if one.success]
    assert shares[0] < max(shares)
    assert ladder.chosen is ladder.tried[shares.index(max(shares))]  # of equals the smallest


@pytest.mark.parametrize("sign", [1, -1])
def test_the_gap_between_the_last_within_and_the_first_beyond_is_halved(ladder: Search, sign: int) -> None:
    model = tiny_model("llama")
    costs = [one.cost.kl for one in ladder.tried]
    assert costs == sorted(costs)
    budget = Budget(kl=(costs[1] + costs[2]) / 2, loss=math.inf)
    how = steered(model) if sign > 0 else lambda strength: VECTOR.applied(model, -strength)
    found = searched(model, budget, [sign * s for s in (4.0, 1.0, 16.0, 0.25)], how)
    sizes = [sign * one.strength for one in found.tried]
    assert sizes == sorted(sizes) and len(sizes) == 8
    within = [one.within for one in found.tried]
    assert within == sorted(within, reverse=True)
    edge = within.index(False)
    assert sizes[edge] / sizes[edge - 1] == pytest.approx(4 ** (1 / 16))
    assert found.tried[edge - 1].cost.kl <= budget.kl < found.tried[edge].cost.kl
    assert found.chosen is not None and found.chosen.within
    best = max(one.success.estimate for one in found.tried if one.within and one.success)
    assert found.chosen.success is not None and found.chosen.success.estimate == best
    assert [one for one in ladder.tried if one.cost.kl <= budget.kl and one.success.estimate > best] == []
    assert len(searched(model, budget, bisections=0).tried) == 4


def test_the_loss_of_clean_answers_is_a_budget_of_its_own() -> None:
    model = tiny_model("llama")
    by_row = generate(model, tiny_tokenizer(), [row.prompt for row in CLEAN], max_new_tokens=STEPS, stop=())
    own = Select(tuple(AnsweredPrompt(row.prompt, answer) for row, answer in zip(CLEAN, by_row, strict=True)))
    losses = [one.cost.loss for one in searched(model, AMPLE, clean=own).tried]
    assert losses == sorted(losses) and losses[0] > 0  # its own answers are the likeliest
    found = searched(model, Budget(kl=math.inf, loss=losses[1]), clean=own, bisections=0)
    assert [one.within for one in found.tried] == [True, True, False, False]


def test_no_strength_within_the_budget_is_no_choice() -> None:
    found = searched(tiny_model("llama"), Budget(kl=0, loss=math.inf))
    assert found.chosen is None and len(found.tried) == 4 and not any(one.within for one in found.tried)
    assert all(one.success is not None for one in found.tried)  # what it would have bought is reported all the same


def test_a_strength_that_breaks_the_model_is_told_and_never_chosen() -> None:
    found = searched(tiny_model("llama"), AMPLE, (1.0, 1e250, 1e300), bisections=1)
    assert [one.broken for one in found.tried] == [False, True, True, True]
    assert [one.within for one in found.tried] == [one.cost.finite for one in found.tried] == [True] + [False] * 3
    assert found.chosen is found.tried[0]


@pytest.mark.parametrize("of_prompts", [True, False])
def test_a_model_that_only_breaks_where_its_gate_is_open_is_broken(of_prompts: bool) -> None:
    model = tiny_model("llama")

    def opens(acts: torch.Tensor) -> torch.Tensor:
        """On batches as wide as the prompts', or on those of clean rows, which are padded to 32."""
        return torch.full(acts.shape[:2], 1.0 if (acts.shape[1] < 20) == of_prompts else -1.0)

    with prefill_gate(model, Site(0), opens, 0.0) as gate:
        found = searched(model, AMPLE, (1.0, 1e300), steered(model, gate=gate), bisections=0)
    whole, broken = found.tried
    assert whole.within and whole.success is not None and (whole.success.estimate > 0) == of_prompts
    assert broken.broken and broken.success is None and not broken.within
    assert found.chosen is whole
    if of_prompts:
        assert broken.cost == whole.cost == Disturbance(kl=0.0, loss=0.0, tokens=55)


def test_what_cannot_be_searched_is_refused() -> None:
    model = tiny_model("llama")
    for wrong in ((), (1.0, math.inf), (1.0, math.nan), (-1.0, 1.0), (0.0, 1.0)):
        with pytest.raises(UsageError, match="strengths are finite, and all above 0 or all below"):
            searched(model, AMPLE, wrong)
    for kl, loss in ((-1, 0), (0, -0.1), (math.nan, 0)):
        with pytest.raises(UsageError, match="0 or more nats a token"):
            Budget(kl=kl, loss=loss)
    for split in ({"prompts": TestSplit(ROWS)}, {"clean": TestSplit(CLEAN)}):
        with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
            searched(model, AMPLE, **split)
    with pytest.raises(NotTestable):
        searched(model, AMPLE, prompts=Select(()))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NotTestable, match="Without any steering"):
        searched(model, AMPLE)
    with pytest.raises(NotTestable, match="Without any steering"):
        disturbance(model, tiny_tokenizer(), partial(steered(model), 1.0), CLEAN)
    assert hooks(model) == 0


def test_equal_success_is_taken_at_the_least_strength() -> None:
    def one(strength: float, hits: int, within: bool = True) -> Tried:
        cost = Disturbance(kl=strength, loss=0.0, tokens=9)
        return Tried(strength=strength, success=proportion(hits, 10), cost=cost, within=within)

    tried = (one(1.0, 3), one(2.0, 7), one(3.0, 7), one(4.0, 9, within=False))
    found = Search(budget=AMPLE, without=proportion(0, 10), tried=tried)
    assert found.chosen is tried[1]
