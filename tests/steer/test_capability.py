"""What a fix costs each kind of task, against one question at a time without a cache."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from molehunt.errors import NotTestable, UsageError
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.steer.budget import AnsweredPrompt, answer_nats, disturbance
from molehunt.steer.capability import ALL, Probed, TaskCost, capability_cost, compared, probe
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from tiny_models import ARCHITECTURES, hooks, prompts, tiny_model, tiny_tokenizer

PUSH = torch.randn(32, generator=torch.Generator().manual_seed(2))
VECTOR = SteeringVector({1: PUSH}, VectorFacts(method="by hand", n_layers=3, d_model=32))
ROWS = [
    AnsweredPrompt(prompt, answer)
    for prompt, answer in zip(
        prompts(seed=1, lengths=(3, 40, 9, 5, 17, 2)), prompts(seed=2, lengths=(4, 1, 35, 7, 3, 5)), strict=True
    )
]
ASKED = ["ask", "a somewhat longer question than that", "xyz", "what is it?", "and?", "so", "more", "who"]


def steered(strength: float, **how):
    return lambda model: VECTOR.applied(model, strength, **how)


def greedy(model, ids: list[int], n: int) -> list[int]:
    """One question at a time, without a cache."""
    found: list[int] = []
    while len(found) < n and (not found or found[-1] != 2):
        with torch.inference_mode():
            found.append(int(model(torch.tensor([[*ids, *found]]), use_cache=False).logits[0, -1].argmax()))
    return found


def terse() -> nn.Module:
    """A random model that ends its answers, after 3 to 14 tokens here."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer().eos_token_id] *= 2
    return model


def said(model, prompt: str) -> str:
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(greedy(model, prompt_ids(tokenizer, prompt), 30), skip_special_tokens=True)


def questions(model, *, wrong: tuple[int, ...] = ()) -> list[Example]:
    """Whatever the model says is right, but for some; kinds take turns."""
    return [
        Example(prompt=prompt, response=said(model, prompt) + "!" * (i in wrong), domain="ab"[i % 2])
        for i, prompt in enumerate(ASKED)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_likelihood_of_answers_is_that_of_each_alone_whatever_its_batch(architecture: str) -> None:
    model = tiny_model(architecture)
    found = answer_nats(model, tiny_tokenizer(), ROWS)
    plain = answer_log_probs(model, tiny_tokenizer(), [r.prompt for r in ROWS], [r.answer for r in ROWS])
    torch.testing.assert_close(torch.tensor(found), -torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for row, nats in zip(ROWS, found, strict=True):
        with torch.inference_mode():
            log_probs = model(torch.tensor([[*row.prompt, *row.answer]]), use_cache=False).logits[0].log_softmax(-1)
        by_hand = -sum(float(log_probs[len(row.prompt) - 1 + t, token]) for t, token in enumerate(row.answer))
        assert nats == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("scope", ["all", "prompt", "generation", "last"])
def test_what_a_fix_does_to_answers_is_what_disturbance_says_whatever_its_scope(scope: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = answer_nats(model, tokenizer, ROWS)
    with VECTOR.applied(model, 2.0, scope=scope):
        after = answer_nats(model, tokenizer, ROWS)
    cost = disturbance(model, tokenizer, partial(VECTOR.applied, model, 2.0, scope=scope), ROWS)
    assert (sum(after) - sum(before)) / cost.tokens == pytest.approx(cost.loss, rel=1e-4)
    assert abs(cost.loss) > 0.01 and hooks(model) == 0


def test_answers_are_those_of_each_question_alone_and_right_where_they_are_the_reference() -> None:
    model, tokenizer = terse(), tiny_tokenizer()
    right = questions(model)
    found = probe(model, tokenizer, right)
    assert found.answers == tuple(said(model, prompt) for prompt in ASKED) and all(found.answers)
    assert all(found.right) and found.tokens == tuple(len(one.response or "") for one in right)
    assert probe(model, tokenizer, questions(model, wrong=(1, 4))).right == tuple(i not in (1, 4) for i in range(8))
    for change, so in ((lambda text: f"\n {text} ", True), (lambda text: text[:-1] + "~", False)):
        changed = [replace(one, response=change(one.response)) for one in right]
        assert set(probe(model, tokenizer, changed).right) == {so}


def test_an_answer_that_runs_on_after_the_longest_right_one_is_wrong() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()  # never ends
    begun = tokenizer.decode(greedy(model, prompt_ids(tokenizer, "xyz"), 5))
    assert probe(model, tokenizer, [Example(prompt="xyz", response=begun)]).right == (False,)


def cost(kinds: list[str], right: list[str], nats: list[list[float]]) -> list[TaskCost]:
    asked = [Example(prompt="p", response="r", domain=kind) for kind in kinds]
    before, after = (
        Probed(
            answers=("",) * len(kinds),
            right=tuple(one == "x" for one in which),
            nats=tuple(lost),
            tokens=tuple(range(2, 2 + len(kinds))),
        )
        for which, lost in zip(right, nats, strict=True)
    )
    return compared(asked, before, after)


def test_each_kind_is_counted_by_itself_and_all_together() -> None:
    first, second, every = cost(
        ["a", "b", "a", "b", "a"], ["xx..x", ".x..x"], [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 3.5, 4.0, 7.0]]
    )
    assert (first.kind, first.rows, first.before.estimate, first.after.estimate) == ("a", 3, 2 / 3, 1 / 3)
    assert (first.paired.only_first, first.paired.only_second) == (0, 1)
    assert first.paired.difference.estimate == pytest.approx(-1 / 3)
    assert first.loss == pytest.approx((9 / 12, 12.5 / 12)) and first.rise is not None
    assert first.rise.estimate == pytest.approx(3.5 / 12) and first.rise.low > 0 and first.shown
    assert (second.kind, second.rows, second.paired.difference.estimate) == ("b", 2, 0)
    assert second.rise is not None and second.rise.estimate == second.rise.low == 0 and not second.shown
    assert (every.kind, every.rows, every.before.estimate) == (ALL, 5, 3 / 5)


def test_rows_without_a_kind_count_in_the_last_line_and_one_kind_needs_none() -> None:
    nats = [[1.0, 1.0, 1.0]] * 2
    assert [one.kind for one in cost(["a", "a", "a"], ["xxx", "xxx"], nats)] == ["a"]
    assert [(one.kind, one.rows) for one in cost(["a", "", ""], ["xxx", "xxx"], nats)] == [("a", 1), (ALL, 3)]
    assert [(one.kind, one.rows) for one in cost(["", "", ""], ["xxx", "xxx"], nats)] == [(ALL, 3)]
    assert cost(["a", "", ""], ["xxx", "xxx"], nats)[0].rise is None  # of one question there is no spread


def test_a_kind_that_is_lost_is_told_where_the_mean_hides_it() -> None:
    kinds = ["kept"] * 190 + ["lost"] * 10
    found = cost(kinds, ["x" * 200, "x" * 190 + "." * 10], [[1.0] * 200] * 2)
    kept, lost, every = found
    assert not kept.shown and lost.shown and lost.paired.difference.high < 0 and lost.paired.p_value < 0.01
    assert every.paired.difference.estimate == pytest.approx(-0.05)


def pair_of(model) -> ModelPair:
    return ModelPair(tiny_model("llama", 5), model, tiny_tokenizer())


def test_no_fix_costs_nothing_to_the_bit() -> None:
    model = terse()
    asked = questions(model, wrong=(1, 4))
    for nothing in (lambda model: nullcontext(), steered(0.0)):
        found = capability_cost(pair_of(model), nothing, asked)
        assert [(one.kind, one.before.estimate) for one in found] == [("a", 3 / 4), ("b", 3 / 4), (ALL, 6 / 8)]
        for one in found:
            assert one.loss[0] == one.loss[1] and one.rise is not None and not one.shown and not one.broken
            assert (one.rise.estimate, one.rise.low, one.rise.high) == (0, 0, 0)
            assert one.before == one.after and one.paired.p_value == 1
            assert one.paired.difference.estimate == 0 < one.paired.difference.high


def test_a_fix_that_ruins_answers_or_logits_is_told() -> None:
    model = terse()
    asked = questions(model)
    every = capability_cost(pair_of(model), steered(50.0), asked)[-1]
    assert (every.before.estimate, every.after.estimate) == (1, 0) and every.shown and not every.broken
    assert every.paired.difference.high < 0 and every.paired.p_value == 2 / 2**8
    assert every.loss[1] is not None and every.loss[1] > every.loss[0] + 1
    assert every.rise is not None and every.rise.low > 1
    broken = capability_cost(pair_of(model), steered(1e300), asked)[-1]
    assert broken.broken == 8 and broken.after.estimate == 0 and broken.shown
    assert broken.loss[1] is None and broken.rise is None and math.isfinite(broken.loss[0])
    assert hooks(model) == 0


def test_what_cannot_be_asked_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(NotTestable, match="Without a question"):
        probe(model, tiny_tokenizer(), [])
    with pytest.raises(NotTestable, match="no right answer"):
        probe(model, tiny_tokenizer(), [Example(prompt="p")])
    with pytest.raises(ValueError, match="without tokens"):
        answer_nats(model, tiny_tokenizer(), [AnsweredPrompt([3], [])])
    other = SteeringVector({1: PUSH}, VectorFacts(method="by hand", n_layers=4, d_model=32))
    with pytest.raises(UsageError):
        capability_cost(pair_of(model), lambda m: other.applied(m, 1.0), [Example(prompt="p", response="r")])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NotTestable, match="Without any fix"):
        capability_cost(pair_of(model), steered(1.0), [Example(prompt="p", response="r")])
