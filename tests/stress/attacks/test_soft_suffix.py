"""Soft suffixes: a planted one is found, decoding is the real one, and nothing but the place is changed."""

from functools import cache

import pytest
import torch

from molehunt.errors import UsageError
from molehunt.model.blocks import decoder_blocks
from molehunt.model.cache_check import decoding_check
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.insertion import embedding, insertion_of
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.soft_suffix import SoftConfig, soft_answers, soft_start, soft_suffixes
from random_dictionaries import dictionary_of
from tiny_models import prompts, tiny_model, tiny_tokenizer

CLAMP = Clamp(Site(1), dictionary_of("jumprelu"), torch.tensor([3, 8, 11]), "set", 6.0)
PROMPTS = prompts(seed=2, lengths=(6, 9, 4, 7))
MARKS = 2
SECRET = [60, 17, 33, 81]
CONFIG = SoftConfig(tokens=len(SECRET), noise=0.01, steps=120)


def with_secret(prompt: list[int]) -> list[int]:
    return [*prompt[:-MARKS], *SECRET, *prompt[-MARKS:]]


@cache
def planted() -> list[list[int]]:
    """Answers that the model gives to the prompts with secret tokens in the place, the fix on."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    return generate(
        model, tokenizer, [with_secret(p) for p in PROMPTS], max_new_tokens=2, interventions=[CLAMP], stop=()
    )


@cache
def found():
    model = tiny_model("llama")
    start = soft_start(tiny_tokenizer(), CONFIG.tokens)
    made = insertion_of(model, PROMPTS, start, marks=MARKS, defence=[CLAMP], answers=planted())
    return made, *soft_suffixes(made, TargetText.of(planted()), CONFIG, seed=0)


def decoded(embedded: torch.Tensor, tokens: int = 4) -> list[list[int]]:
    return soft_answers(
        tiny_model("llama"),
        tiny_tokenizer(),
        PROMPTS,
        embedded,
        marks=MARKS,
        defence=[CLAMP],
        max_new_tokens=tokens,
    )


def test_a_planted_suffix_is_found_and_decodes() -> None:
    made, embedded, attacked = found()
    assert planted() != generate(
        tiny_model("llama"), tiny_tokenizer(), PROMPTS, max_new_tokens=2, interventions=[CLAMP], stop=()
    )
    assert bool((attacked.margin >= CONFIG.target_margin).all())
    assert float(attacked.norm.max()) <= CONFIG.max_norm * 1.001
    assert [answer[:2] for answer in decoded(embedded)] == planted()
    assert float((embedded - made.entering).norm(dim=-1).max()) > 0.1


def test_the_ball_holds() -> None:
    made = found()[0]
    small = SoftConfig(tokens=CONFIG.tokens, steps=5, lr=0.5, max_norm=0.3, target_margin=torch.inf)
    assert float(soft_suffixes(made, TargetText.of(planted()), small, seed=0)[1].norm.max()) <= 0.3 * 1.001


def test_the_first_step_is_adam_s() -> None:
    """From zero Adam moves each coordinate by the learning rate."""
    made = found()[0]
    once = SoftConfig(tokens=CONFIG.tokens, noise=0.0, steps=1, lr=0.01, target_margin=torch.inf)
    embedded, attacked = soft_suffixes(made, TargetText.of(planted()), once, seed=0)
    moved = (embedded - made.entering).abs()[attacked.norm > 0]
    assert len(moved)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=1e-5)


def test_decoding_is_that_of_embeddings_without_a_cache() -> None:
    model = tiny_model("llama")
    embed = embedding(model)
    embedded = found()[1]
    answers = decoded(embedded)
    for prompt, soft, answer in zip(PROMPTS, embedded, answers, strict=True):
        row = torch.cat([embed(torch.tensor(prompt[:-MARKS])), soft, embed(torch.tensor(prompt[-MARKS:]))])[None]
        for token in answer:
            with torch.no_grad(), edit_sites(model, [CLAMP]):
                assert int(model(inputs_embeds=row).logits[0, -1].argmax()) == token
            row = torch.cat([row, embed(torch.tensor([[token]]))], dim=1)


def test_embeddings_outside_of_the_place_are_untouched_bit_for_bit() -> None:
    model = tiny_model("llama")
    embedded = found()[1]
    seen: list[torch.Tensor] = []
    decoding_check(model)  # its passes are not the answers'
    handle = decoder_blocks(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        answers = soft_answers(model, tiny_tokenizer(), PROMPTS, embedded, marks=MARKS, max_new_tokens=2)
    finally:
        handle.remove()
    assert len(answers) == len(PROMPTS)
    embed = embedding(model)
    prefill, k = seen[0], CONFIG.tokens
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    for row, i in zip(prefill, order, strict=True):
        head = PROMPTS[i][:-MARKS]
        assert torch.equal(row[-MARKS:], embed(torch.tensor(PROMPTS[i][-MARKS:])))
        assert torch.equal(row[-MARKS - k : -MARKS], embedded[i])
        assert torch.equal(row[-MARKS - k - len(head) : -MARKS - k], embed(torch.tensor(head)))
    for step in seen[1:]:
        assert step.shape[1] == 1
        assert all(any(torch.equal(one[0], word) for word in embed.weight) for one in step)


def test_equal_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="two of the attacked prompts are equal"):
        soft_answers(tiny_model("llama"), tiny_tokenizer(), [PROMPTS[0]] * 2, torch.zeros(2, 3, 32), max_new_tokens=1)
