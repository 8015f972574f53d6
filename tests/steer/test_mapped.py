"""A block that puts out what a map makes of it: the switch, against full replacement by a second model."""

import copy
from dataclasses import replace

import pytest
import torch

from experiments.maps.replaced_answers import Speaker, replaced_answers
from molehunt.activation.scale import sinks
from molehunt.errors import CannotTap, UsageError
from molehunt.model.generate import generate
from molehunt.model.taps import read_sites
from molehunt.site import Site
from molehunt.steer.mapped import Mapped, switched
from molehunt.transfer.alignment import align
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.procrustes import identity
from molehunt.transfer.ridge import ridge
from molehunt.transfer.statistics import PairMoments
from tiny_models import D_MODEL, hooks, prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
TEXTS = ["ask me", "a somewhat longer prompt", "xyz", "what? qqq zz"]


def random_map(scale: float = 0.4, target: Site = SITE, width: int = D_MODEL) -> LinearMap:
    rng = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(D_MODEL, width, generator=rng)
    return LinearMap(SITE, target, weight, scale * torch.randn(width, generator=rng))


def answers(model, texts=TEXTS, n: int = 9) -> list[str]:
    tokenizer = tiny_tokenizer()
    rows = [tokenizer.encode(text) for text in texts]
    return [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(model, tokenizer, rows, max_new_tokens=n)
    ]


@pytest.mark.parametrize("with_sinks", [False, True])
def test_it_is_full_replacement_by_what_a_second_copy_of_the_model_puts_out(with_sinks: bool) -> None:
    """An edit of a block changes nothing before it: so a copy that reads along puts out what the block was given."""
    model = tiny_model("llama")
    if with_sinks:
        with torch.no_grad():
            model.model.embed_tokens.weight[tiny_tokenizer().encode("q")[0]] *= 2000
    copied = copy.deepcopy(model)
    some = [align(tiny_tokenizer(), tiny_tokenizer(), text) for text in TEXTS]
    expected = replaced_answers(
        Speaker(copied, tiny_tokenizer()), Speaker(model, tiny_tokenizer()), some, random_map(), max_new_tokens=9
    )
    with switched(model, random_map()):
        found = answers(model)
    assert found == expected != answers(model)
    assert hooks(model) == 0


def test_first_tokens_and_sinks_keep_their_own_under_padding() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[20] *= 2000
    rows = [[5, 6, 20, 7, 8, 9, 10], [11, 12, 13], [20, 30, 31, 32, 33]]
    width = 7
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    real = ids > 0
    with torch.inference_mode():
        with read_sites(model, [SITE]) as own:
            model(ids, attention_mask=real.long(), use_cache=False)
        with switched(model, random_map()), read_sites(model, [SITE]) as tapped:
            model(ids, attention_mask=real.long(), use_cache=False)
    kept = sinks(own[SITE], real)
    assert kept.sum() == 4 and kept[0, 2]  # three first tokens, one of which is the long one, and the other long one
    assert tapped[SITE][kept].equal(own[SITE][kept])
    mapped = random_map()(own[SITE][real & ~kept])
    torch.testing.assert_close(tapped[SITE][real & ~kept], mapped)


@pytest.mark.parametrize("strength", [0, 0.0])
def test_strength_0_and_the_map_that_changes_nothing_are_the_model_itself(strength: float) -> None:
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(8, 8)))
    itself = LinearMap(SITE, SITE, torch.eye(D_MODEL), torch.zeros(D_MODEL))
    with torch.inference_mode():
        plain = model(ids).logits
        with switched(model, random_map(), strength):
            assert model(ids).logits.equal(plain)
        with switched(model, itself):
            torch.testing.assert_close(model(ids).logits, plain)
        with switched(model, random_map()):
            assert not torch.allclose(model(ids).logits, plain, atol=1e-2)


def planted() -> tuple[torch.nn.Module, torch.nn.Module, LinearMap, LinearMap]:
    """A base, a fine-tune whose second block puts out a linear function of the base's, and fitted maps both ways."""
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    rng = torch.Generator().manual_seed(4)
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=rng)).Q

    def block(module, args, output):
        return (output[0] @ turn, *output[1:]) if isinstance(output, tuple) else output @ turn

    tuned.model.layers[SITE.layer].register_forward_hook(block)
    read = []
    for model in (tuned, base):
        with torch.inference_mode(), read_sites(model, [SITE]) as tap:
            model(torch.tensor(prompts(seed=9, lengths=(40,) * 8)))
        read.append(tap[SITE].flatten(0, 1))
    off = PairMoments.of(SITE, SITE, *read)
    return base, tuned, ridge(off, off), ridge(off.reversed(), off.reversed())


def test_a_planted_change_is_switched_off_and_on() -> None:
    base, tuned, off, on = planted()
    logits = {}
    ids = torch.tensor(prompts(seed=3, lengths=(30,)))  # the first token keeps its own, and so a little is left
    with torch.inference_mode():
        for name, model, map in (("base", base, None), ("tuned", tuned, None), ("off", tuned, off), ("on", base, on)):
            if map is None:
                logits[name] = model(ids).logits
            else:
                with switched(model, map):
                    logits[name] = model(ids).logits

    def apart(a: str, b: str) -> float:
        return float((logits[a] - logits[b]).norm())

    assert apart("off", "base") < 0.3 * apart("tuned", "base")
    assert apart("on", "tuned") < 0.3 * apart("base", "tuned")


def test_the_identity_control_moves_means_alone() -> None:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(200, D_MODEL, generator=rng)
    map = identity(PairMoments.of(SITE, SITE, x, 3 * x + 1))
    edited = Mapped(SITE, map)(x[None])
    torch.testing.assert_close(edited[0] - x, (3 * x + 1 - x).mean(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_maps_of_other_sites_and_widths_are_refused() -> None:
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(5,)))
    with pytest.raises(UsageError, match=r"from L1\.resid to L2\.resid"), switched(model, random_map(target=Site(2))):
        pass
    with pytest.raises(UsageError, match="leads to 16 dimensions"), switched(model, random_map(width=16)):
        model(ids)
    far = replace(random_map(), source=Site(7), target=Site(7))
    with pytest.raises(CannotTap), switched(model, far):
        pass
    assert hooks(model) == 0
