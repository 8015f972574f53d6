"""A span clamp holds what latents read: encoded again, its result gives the targets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import JumpReLUActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.steer.span_clamp import SPAN_MODES, SpanClamp, pre_activations_of
from random_dictionaries import FAMILIES, INPUT_NORMS, D, F, dictionary_of, some_acts
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
LATENTS = torch.tensor([17, 3, 8])
VALUE = torch.tensor([1.5, 0.25, -2.0])
COMPETING = ("group-max", "topk")


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_again_gives_the_targets_where_a_clamp_does_not(family: str, center: bool, norm: str) -> None:
    dictionary, acts = replace(dictionary_of(family), norm=norm, center=center), some_acts()
    once = SpanClamp(SITE, dictionary, LATENTS, VALUE)(acts)
    wanted = VALUE.expand(3, 7, 3)
    assert far(dictionary.pre_activations(once, LATENTS), wanted) < 1e-5
    assert far(SpanClamp(SITE, dictionary, LATENTS, VALUE)(once), once) < 1e-5  # twice is once
    code = VALUE.clamp_min(0)
    clamped = Clamp(SITE, dictionary, LATENTS, "set", code)(acts)
    assert far(dictionary.encode_latents(clamped, LATENTS), code.expand(3, 7, 3)) > 0.05
    if family in COMPETING:
        assert (dictionary.encode_latents(once, LATENTS)[..., 2] == 0).all()  # a negative target never fires


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_a_normalised_token_keeps_its_length(norm: str) -> None:
    dictionary, acts = replace(dictionary_of("relu"), norm=norm), some_acts()
    edited = SpanClamp(SITE, dictionary, LATENTS, VALUE)(acts)
    torch.testing.assert_close(edited.norm(dim=-1), acts.norm(dim=-1), rtol=1e-5, atol=0)
    if norm == "layer_norm":
        torch.testing.assert_close(edited.mean(-1), acts.mean(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in COMPETING])
def test_codes_are_what_was_asked_for(family: str) -> None:
    dictionary, acts, code = dictionary_of(family), some_acts(), torch.tensor([3.0, 5.0, 4.0])
    value = pre_activations_of(dictionary, LATENTS, code)
    edited = SpanClamp(SITE, dictionary, LATENTS, value)(acts)
    torch.testing.assert_close(dictionary.encode_latents(edited, LATENTS), code.expand(3, 7, 3), rtol=1e-5, atol=1e-5)


def test_it_is_the_least_step_and_lies_in_the_span() -> None:
    dictionary, acts = dictionary_of("relu"), some_acts()
    step = SpanClamp(SITE, dictionary, LATENTS, VALUE)(acts) - acts
    A = dictionary.W_enc[:, LATENTS]
    least = torch.linalg.lstsq(
        A.T, (VALUE - dictionary.pre_activations(acts, LATENTS)).reshape(-1, 3).T, driver="gelsd"
    )
    torch.testing.assert_close(step.reshape(-1, D).T, least.solution, rtol=1e-4, atol=1e-4)


def test_at_most_moves_only_what_is_above() -> None:
    acts = some_acts()
    for norm in INPUT_NORMS:
        dictionary = replace(dictionary_of("relu"), norm=norm)
        before = dictionary.pre_activations(acts, LATENTS)
        clamp = SpanClamp(SITE, dictionary, LATENTS, 0.0, "at-most")
        edited = clamp(acts)
        after = dictionary.pre_activations(edited, LATENTS)
        torch.testing.assert_close(after, before.clamp_max(0), rtol=1e-5, atol=1e-5)
        silent = (before <= 0).all(-1)
        assert silent.any() and not silent.all()
        assert edited[silent].equal(acts[silent])
        assert far(clamp(edited), edited) < 1e-5


@pytest.mark.parametrize("mode", SPAN_MODES)
@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_strengths(norm: str, mode: str) -> None:
    dictionary = replace(dictionary_of("jumprelu"), norm=norm)
    for dtype in (torch.float32, torch.bfloat16):
        acts = some_acts(dtype)
        assert SpanClamp(SITE, dictionary, LATENTS, VALUE, mode, strength=0)(acts) is acts
    acts = some_acts()
    whole, half = (SpanClamp(SITE, dictionary, LATENTS, VALUE, mode, strength=s)(acts) for s in (1, 0.5))
    torch.testing.assert_close(half, (acts + whole) / 2, rtol=1e-5, atol=1e-5)


def test_columns_that_depend_on_others() -> None:
    """Three columns in a plane: consistent targets are met, others as nearly as can be, and twice is still once."""
    rng = torch.Generator().manual_seed(0)
    plane = torch.randn(D, 2, generator=rng)
    mix = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    dictionary = dictionary_of("relu")
    W_enc = dictionary.W_enc.clone()
    W_enc[:, LATENTS] = plane @ mix
    dictionary = replace(dictionary, W_enc=W_enc, b_enc=torch.zeros(F))
    acts = some_acts()
    consistent = torch.tensor([0.5, 1.0, 1.5])
    met = SpanClamp(SITE, dictionary, LATENTS, consistent)(acts)
    assert far(dictionary.pre_activations(met, LATENTS), consistent.expand(3, 7, 3)) < 1e-5
    torn = SpanClamp(SITE, dictionary, LATENTS, torch.tensor([0.0, 0.0, 3.0]))
    once = torn(acts)
    assert far(torn(once), once) < 1e-5
    lengths = W_enc[:, LATENTS].norm(dim=0)
    least = torch.linalg.lstsq((W_enc[:, LATENTS] / lengths).T, (torch.tensor([0.0, 0.0, 3.0]) / lengths)[:, None])
    nearest = (least.solution[:, 0] @ W_enc[:, LATENTS]).expand(3, 7, 3)
    torch.testing.assert_close(dictionary.pre_activations(once, LATENTS), nearest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("mode", SPAN_MODES)
def test_further_directions_are_held_too(mode: str, norm: str) -> None:
    dictionary, acts = replace(dictionary_of("topk"), norm=norm), some_acts()
    directions, held = torch.randn(2, D, generator=torch.Generator().manual_seed(2)), torch.tensor([0.5, -1.0])
    edited = SpanClamp(SITE, dictionary, LATENTS, VALUE, mode, directions, held)(acts)
    n, _, _ = dictionary.normalised(edited)
    assert far(n @ directions.T, held.expand(3, 7, 2)) < 1e-5
    pre, before = dictionary.pre_activations(edited, LATENTS), dictionary.pre_activations(acts, LATENTS)
    assert far(pre, VALUE.expand_as(pre) if mode == "set" else before.minimum(VALUE)) < 1e-5


def test_gradients_pass_it() -> None:
    """An attacker upstream sees that the span is closed, and that the rest is not."""
    for norm in INPUT_NORMS:
        dictionary = replace(dictionary_of("jumprelu"), norm=norm)
        acts = some_acts().requires_grad_()
        edited = SpanClamp(SITE, dictionary, LATENTS, VALUE)(acts)
        (closed,) = torch.autograd.grad(dictionary.pre_activations(edited, LATENTS).sum(), acts, retain_graph=True)
        (open_,) = torch.autograd.grad(edited.square().sum(), acts)
        assert closed.isfinite().all() and open_.isfinite().all()
        assert float(closed.norm()) < 1e-4 * float(open_.norm())


def test_it_steers_a_model_in_cached_generation() -> None:
    model, rows = tiny_model("llama"), prompts(lengths=(3, 8, 5))

    def answers(*edits: SpanClamp) -> list[list[int]]:
        return generate(model, tiny_tokenizer(), rows, max_new_tokens=8, interventions=edits, stop=())

    def shut(acts: Tensor) -> Tensor:
        return torch.zeros(acts.shape[:2], dtype=torch.bool)

    dictionary = dictionary_of("topk")
    assert answers(SpanClamp(SITE, dictionary, LATENTS, 9.0)) != answers()
    assert answers(SpanClamp(SITE, dictionary, LATENTS, 9.0, gate=shut)) == answers()
    with pytest.raises(UsageError, match=f"reads {D} values a token, and was given {D + 1}"):
        SpanClamp(SITE, dictionary, LATENTS, 9.0)(torch.zeros(1, 1, D + 1))


def made(**options) -> Dictionary:
    return replace(dictionary_of("relu"), **options)


@pytest.mark.parametrize(
    ("dictionary", "options", "said"),
    [
        (made(), {"latents": []}, "at least one latent"),
        (made(), {"latents": [2, 2]}, "given twice"),
        (made(), {"value": float("nan")}, "one finite value"),
        (made(), {"value": torch.zeros(3)}, "one for each of 2 latents"),
        (made(), {"directions": torch.ones(2, D)}, r"directions \[2, 32\] and None values"),
        (made(), {"directions": torch.ones(2, D), "held": torch.zeros(1)}, r"\[2, 32\] and 1 values"),
        (made(), {"directions": torch.ones(2, 5), "held": torch.zeros(2)}, "each direction of 32 entries"),
        (made(W_enc=torch.zeros(D, F)), {}, "latent 1 reads nothing"),
        (made(), {"directions": torch.zeros(2, D), "held": torch.zeros(2)}, "direction 0 reads nothing"),
        (made(site=Site(2)), {}, r"of L2\.resid"),
        (made(pairing=Pairing(kind="difference")), {}, "reads both models"),
        (made(norm="layer_norm"), {"value": 1e3}, r"length 5\.57 .`layer_norm`.*take"),
        (made(norm="constant_norm"), {"value": 1e3}, r"length 5\.66 .`constant_norm`.*take"),
    ],
)
def test_what_cannot_be_held_is_refused(dictionary: Dictionary, options: dict, said: str) -> None:
    given = {"latents": [1, 2], "value": 0.5, **options}
    with pytest.raises(UsageError, match=said):
        SpanClamp(SITE, dictionary, torch.tensor(given.pop("latents"), dtype=torch.long), **given)


def test_a_token_too_short_for_its_target_keeps_its_length() -> None:
    """`at-most` under a norm: what would take more than the whole token goes as far as the token is long."""
    dictionary = Dictionary(
        W_enc=torch.eye(D)[:, :2].contiguous(),
        b_enc=torch.zeros(2),
        W_dec=torch.eye(D)[:2].contiguous(),
        b_dec=torch.zeros(D),
        nonlinearity=JumpReLUActivation(torch.zeros(2)),
        norm="constant_norm",
    )
    acts = torch.zeros(1, 1, D)
    acts[..., :3] = torch.tensor([1.0, 2.0, 0.5])
    edited = SpanClamp(SITE, dictionary, torch.tensor([0]), -50.0, "at-most")(acts)
    assert edited.isfinite().all()
    torch.testing.assert_close(edited.norm(), acts.norm())
    torch.testing.assert_close(edited[0, 0, 0], -acts.norm(), rtol=0.05, atol=0)
