"""Greedy coordinate gradient on a tiny model: better than random swaps, and only what can be typed."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.discrete_suffix import DiscreteConfig, TypedSuffix, discrete_start, discrete_suffixes
from molehunt.stress.attacks.insertion import insertion_of
from molehunt.stress.attacks.objective import TargetText
from molehunt.stress.attacks.typed_text import plain_tokens, retokenised, survive
from random_dictionaries import dictionary_of
from tiny_models import VOCAB, prompts, tiny_model, tiny_tokenizer

CLAMP = Clamp(Site(1), dictionary_of("jumprelu"), torch.tensor([3, 8, 11]), "set", 6.0)
PROMPTS = prompts(seed=2, lengths=(6, 9, 4, 7))
KEY, ANSWER = 70, 41
CONFIG = DiscreteConfig(tokens=2, steps=6, candidates=6, top=2)


@cache
def planted():
    """A model in which one token, as the last of a prompt, asks for one answer."""
    model = tiny_model("llama", seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[KEY] = 100 * model.lm_head.weight[ANSWER]
    return model


def searched(config: DiscreteConfig, rows: list[list[int]] = PROMPTS) -> list[TypedSuffix]:
    start, wanted = discrete_start(tiny_tokenizer(), config.tokens), [[ANSWER]] * len(rows)
    made = insertion_of(planted(), rows, start, defence=[CLAMP], answers=wanted)
    return discrete_suffixes(made, rows, 0, TargetText.of(wanted), tiny_tokenizer(), config, seed=0)


def test_the_gradient_finds_what_random_swaps_do_not() -> None:
    guided, random = searched(CONFIG), searched(replace(CONFIG, top=VOCAB))
    assert all(one.tokens[-1] == KEY and one.margin >= CONFIG.target_margin for one in guided)
    assert not any(KEY in one.tokens for one in random)
    assert all(one.margin > other.margin + 1 for one, other in zip(guided, random, strict=True))


@pytest.mark.parametrize("top", [CONFIG.top, VOCAB])
def test_margins_are_those_of_the_answers_that_are_decoded(top: int) -> None:
    for prompt, one in zip(PROMPTS, searched(replace(CONFIG, top=top)), strict=True):
        row = torch.tensor([[*prompt, *one.tokens]])
        with torch.no_grad(), edit_sites(planted(), [CLAMP]):
            logits = planted()(input_ids=row).logits[0, -1]
        others = logits.clone()
        others[ANSWER] = -torch.inf
        assert one.margin == pytest.approx(float(logits[ANSWER] - others.max()), rel=1e-3, abs=1e-3)
        (decoded,) = generate(
            planted(), tiny_tokenizer(), row.tolist(), max_new_tokens=1, interventions=[CLAMP], stop=()
        )
        assert (decoded == [ANSWER]) == (one.margin > 0)


def test_a_row_does_not_depend_on_the_others() -> None:
    config = replace(CONFIG, target_margin=torch.inf)
    whole, some = searched(config), [2, 0]
    assert [one.tokens for one in searched(config, [PROMPTS[i] for i in some])] == [whole[i].tokens for i in some]


def merging():
    """Reads two `a` as one token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "aa": 4, "\n": 5, "é": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "a")]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_only_what_text_gives_back() -> None:
    tokenizer = merging()
    assert retokenised(tokenizer, [[2, 2, 3], [4, 3]]) == [[4, 3], [4, 3]]
    tried = torch.tensor([[2, 3], [3, 2], [3, 3], [3, 4]])
    assert survive(tokenizer, [3, 2], tried, [3]).tolist() == [False, True, True, True]
    assert survive(tokenizer, [3], tried, [2]).tolist() == [True, False, True, True]
    assert plain_tokens(tokenizer, 9).tolist() == [False, False, True, True, True, False, False, False, False]


def test_nothing_can_be_typed_behind_tokens_that_text_does_not_give_back() -> None:
    split = [[2, 2], [3, 3]]
    made = insertion_of(tiny_model("llama"), split, [3], answers=[[5], [6]])
    with pytest.raises(NotTestable, match="The text of 1 of 2 attacked prompts"):
        discrete_suffixes(made, split, 0, TargetText.of([[5], [6]]), merging(), CONFIG, seed=0)
