"""Drawing tokens: the settings that evaluation clients send do what they do in transformers."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from guarded import PROMPTS, generation, guard_of, run
from molehunt.model.generate import stop_ids
from molehunt.model.pair import ModelPair
from molehunt.model.sampling import LEAST_LOGPROB, Sampler, Sampling, all_logprobs_of, logprobs_of, next_tokens
from molehunt.serve.app import _own_sampling
from molehunt.serve.continuous import Continuous
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState


def penalised_greedy(pair: ModelPair, prompt: list[int], penalty: float, n: int) -> list[int]:
    """A greedy answer under the logits processor of transformers, one full pass a token."""
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < n and not set(answer) & set(stop_ids(pair._tuned, pair.tokenizer)):
            tokens = torch.tensor([[*prompt, *answer]])
            answer.append(int(processor(tokens, pair._tuned(input_ids=tokens).logits[:, -1]).argmax()))  # pyright: ignore
    return answer


@pytest.mark.parametrize("settings", [{}, {"backend": Continuous}], ids=["eager", "continuous"])
def test_the_repetition_penalty_is_that_of_transformers(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, settings: dict[str, object]
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger, threshold=1e9)
    wanted = [(prompt, penalty) for prompt in PROMPTS[:3] for penalty in (1.0, 1.7, 0.6)]
    requests = [
        replace(
            generation(prompt, 10, logprobs=0), sampling=Sampling(repetition_penalty=penalty), id=f"{prompt}{penalty}"
        )
        for prompt, penalty in wanted
    ]  # rows of one batch, each with its own penalty
    heard = run(pair, guard, requests, **settings)
    answers = [[one.token for one in heard_one.logprobs] for heard_one in heard]
    assert answers == [penalised_greedy(pair, *one, 10) for one in wanted]
    assert len({tuple(answer) for answer in answers[:3]}) == 3, "the penalties make a difference"


def test_prompt_and_answer_count_for_the_penalty() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[0])
    logits = torch.tensor([[4.0, 3.0, 2.5, -1.0]])
    assert [next_tokens(logits, [sampler])[0] for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_penalty_still_draws(penalty: float, temperature: float) -> None:
    sampler = Sampler(Sampling(repetition_penalty=penalty, temperature=temperature, seed=0), prompt=[0, 1, 2])
    logits = torch.tensor([[4.0, 0.0, -3.0, 1.0]])
    assert next_tokens(logits, [sampler])[0] == (0 if penalty < 1 else 3)


def test_top_k_leaves_the_likeliest_and_zero_leaves_all() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.8, 1.7, 1.6]])

    def drawn(**settings: object) -> set[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=1, **settings))  # pyright: ignore[reportArgumentType]
        return {next_tokens(logits, [sampler])[0] for _ in range(200)}

    assert drawn(top_k=2) == {0, 1} and drawn(top_k=1) == {0}
    assert drawn(top_k=0) == drawn(top_k=9) == {0, 1, 2, 3, 4}
    assert drawn(top_k=3, top_p=0.4) == {0, 1}, "the nucleus is taken of what top_k leaves"


def test_log_probabilities_of_many_steps_are_those_of_each_and_are_finite() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = -torch.inf
    tokens = [2, 3, 8, 0]
    found = all_logprobs_of(logits, tokens, 2)
    assert found == tuple(logprobs_of(row, token, 2) for row, token in zip(logits, tokens, strict=True))
    expected = logits.log_softmax(-1)
    assert found[1].logprob == LEAST_LOGPROB
    assert found[2].logprob == pytest.approx(float(expected[2, 8]), abs=1e-6)
    assert [token for token, _ in found[3].top] == expected[3].topk(2).indices.tolist()


def test_the_models_own_settings_hold_where_it_samples(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    for sampled, expected in ((True, Sampling(**own)), (False, Sampling())):  # pyright: ignore[reportArgumentType]
        config = GenerationConfig(do_sample=sampled, **(own if sampled else {"repetition_penalty": 1.05}))
        monkeypatch.setattr(pair._tuned, "generation_config", config)
        assert _own_sampling(pair) == expected
