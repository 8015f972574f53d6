"""Latents are selected by what was planted, and never on the rows that are judged."""

from dataclasses import replace

import pytest
import torch

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.stress.attacks.choice import Choice, choice_margin
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.defences.selection import LabelledText, by_attribution, by_probe_effect, by_sparsity
from molehunt.traffic.split import Select, Test
from random_dictionaries import FAMILIES, dictionary_of
from tiny_models import D_MODEL as D
from tiny_models import prompts, tiny_model

SITE = Site(1)


def rows() -> list[Choice]:
    return [
        Choice(prompt=tuple(prompt), gold=9 + i, others=(40, 41), decoys=(), cluster=i)
        for i, prompt in enumerate(prompts())
    ]


def standard() -> Dictionary:
    """One latent for each coordinate, where it is positive."""
    eye = torch.eye(D)
    return Dictionary(W_enc=eye, b_enc=torch.zeros(D), W_dec=eye, b_dec=torch.zeros(D), nonlinearity=ReLUActivation())


@pytest.mark.parametrize(("family", "norm"), [*((family, "none") for family in FAMILIES), ("relu", "layer_norm")])
def test_attribution_is_the_slope_along_each_latent(family: str, norm: str) -> None:
    model, made = tiny_model("llama"), replace(dictionary_of(family), norm=norm)
    selected = by_attribution(model, SITE, made, Select(tuple(rows())), made.d_dict)
    suffix = suffix_of(model, [row.prompt for row in rows()], SITE)
    goal, x = choice_margin(rows()), suffix.entering
    code = made.encode(x)
    step, expected = 1e-2, torch.zeros(made.d_dict)
    for latent in range(made.d_dict):
        loss: list[torch.Tensor] = []
        for sign in (step, -step):  # along the decoder row, in the token's own scale
            moved = code.clone()
            moved[..., latent] += sign
            loss.append(goal(suffix(x + made.decode(moved, x) - made.decode(code, x))).loss)
        expected[latent] = -(code[:, 0, latent] * (loss[0] - loss[1]) / (2 * step)).mean()
    assert set(selected.latents.tolist()) == set((expected > 1e-6).nonzero()[:, 0].tolist())
    torch.testing.assert_close(selected.score, expected[selected.latents], rtol=0.02, atol=1e-3)
    assert (selected.score.diff() <= 0).all()
    assert selected.first(2).latents.tolist() == selected.latents[:2].tolist()


@pytest.mark.parametrize("family", ["relu", "batch-topk", "topk"])
def test_attribution_everywhere_is_the_slope_along_each_latent_at_all_tokens_but_the_first(family: str) -> None:
    model, made = tiny_model("llama"), dictionary_of(family)
    selected = by_attribution(model, SITE, made, Select(tuple(rows())), made.d_dict, everywhere=True)
    expected = torch.zeros(made.d_dict)
    for row in rows():  # by itself: no padding
        suffix = suffix_of(model, [row.prompt[:1]], SITE, answers=[row.prompt[1:]])
        code = made.encode(suffix.entering)[0]
        code[0] = 0.0
        along = 0.01 * code.T[..., None] * made.W_dec[:, None]  # what each latent writes, at every token at once
        every = suffix.rows(torch.zeros(made.d_dict, dtype=torch.long))
        goal = choice_margin([row] * made.d_dict)
        with torch.no_grad():
            more, less = (goal(every(every.entering + sign * along)[:, -1:]).loss for sign in (1, -1))
        expected -= (more - less) / 0.02 / len(rows())
    assert set((expected > 1e-3).nonzero()[:, 0].tolist()) <= set(selected.latents.tolist())
    torch.testing.assert_close(selected.score, expected[selected.latents], rtol=0.02, atol=2e-3)


def test_what_judges_cannot_choose() -> None:
    made, judge = standard(), Test(tuple(rows()))
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        by_attribution(tiny_model("llama"), SITE, made, judge, 3)
    acts = (torch.ones(2, D),)
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        by_sparsity(made, Test(acts), Select(acts), 3)
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        by_sparsity(made, Select(acts), Test(acts), 3)
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        by_probe_effect(made, torch.ones(D), Test((LabelledText(acts[0], "a"),)), "a", 3)


def test_sparsity_keeps_what_others_need() -> None:
    """Latents 3, 4 and 7 fire on the topic: 3 on all its tokens, 4 on half, 7 on all, but on a tenth of the others', too."""
    forget, retain = -torch.ones(20, D), -torch.ones(20, D)
    forget[:, [3, 7]] = 1.0
    forget[:10, 4] = 1.0
    retain[:2, 7] = 1.0
    texts = Select((forget[:5], forget[5:])), Select((retain,))
    selected = by_sparsity(standard(), *texts, 5)
    assert selected.latents.tolist() == [3, 4]
    assert selected.score.tolist() == [1.0, 0.5]
    assert set(by_sparsity(standard(), *texts, 2, retained=0.1).latents.tolist()) == {3, 7}
    with pytest.raises(NotTestable, match="fires on more than"):
        by_sparsity(standard(), Select((retain,)), Select((retain,)), 5)
    with pytest.raises(UsageError, match="without texts"):
        by_sparsity(standard(), Select(()), Select((retain,)), 5)


def test_an_effect_is_what_differs_and_what_the_probe_reads() -> None:
    """Latents 1, 2 and 5 fire on the class: the probe reads 1 and 2, and 2 with the wrong sign; 6 fires off it."""
    on, off = -torch.ones(4, D), -torch.ones(6, D)
    on[:, [1, 2, 5]] = 2.0
    off[:, 6] = 2.0
    weight = torch.zeros(D)
    weight[[1, 6]], weight[2] = 0.5, -1.0
    texts = Select((LabelledText(on, "birds"), LabelledText(off, "fish"), LabelledText(off[:2], "trees")))
    selected = by_probe_effect(standard(), weight, texts, "birds", 9)
    assert selected.latents.tolist() == [1]
    assert selected.score.tolist() == [1.0]
    with pytest.raises(UsageError, match="of others"):
        by_probe_effect(standard(), weight, texts, "stones", 9)
    with pytest.raises(NotTestable):
        by_probe_effect(standard(), -weight.abs(), texts, "birds", 9)


def test_one_latent_at_least() -> None:
    acts = Select((torch.ones(2, D),))
    with pytest.raises(UsageError, match="one latent or more"):
        by_sparsity(standard(), acts, Select((-torch.ones(2, D),)), 0)
