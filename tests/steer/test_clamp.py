"""A clamp moves chosen latents and nothing else, for every family of dictionaries."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.clamp import MODES, Clamp
from random_dictionaries import FAMILIES, INPUT_NORMS, D, F, dictionary_of, some_acts
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
LATENTS = torch.tensor([17, 3, 8])


def clamped(code: Tensor, mode: str, value: Tensor) -> Tensor:
    code = code.clone()
    for value_of, latent in zip(value.tolist(), LATENTS.tolist(), strict=True):
        for token in code.reshape(-1, F):
            before = float(token[latent])
            token[latent] = {
                "set": value_of,
                "scale": value_of * before,
                "negative-if-active": -value_of if before > 0 else before,
            }[mode]
    return code


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_decoded_clamped_code_plus_the_error(family: str, mode: str, center: bool, norm: str) -> None:
    dictionary = replace(dictionary_of(family), norm=norm, center=center)
    acts, value = some_acts(), torch.tensor([1.5, 0.25, 3.0])
    code = dictionary.encode(acts)
    fires = code[..., LATENTS] > 0
    assert fires.any() and not fires.all()
    error = acts - dictionary.decode(code, acts)
    expected = dictionary.decode(clamped(code, mode, value), acts) + error
    edited = Clamp(SITE, dictionary, LATENTS, mode, value)(acts)
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5)
    moved = (edited != acts).any(-1)
    assert moved.any()
    torch.testing.assert_close(
        Clamp(SITE, dictionary, LATENTS, mode, value, 0.5)(acts), (acts + expected) / 2, rtol=1e-5, atol=1e-5
    )
    if mode != "set":
        assert edited[~fires.any(-1)].equal(acts[~fires.any(-1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_left_as_they_are_keep_every_bit(family: str, norm: str, dtype: torch.dtype) -> None:
    dictionary, acts = replace(dictionary_of(family), norm=norm), some_acts(dtype)
    assert Clamp(SITE, dictionary, LATENTS, "scale", 1)(acts).equal(acts)
    assert Clamp(SITE, dictionary, LATENTS, "set", 2.0, 0)(acts) is acts
    silent = ~(dictionary.encode(acts)[..., LATENTS] > 0).any(-1)
    assert silent.any()
    zeroed = Clamp(SITE, dictionary, LATENTS, "set", 0.0)(acts)
    assert zeroed[silent].equal(acts[silent]) and not zeroed.equal(acts)


def test_one_value_is_that_value_for_every_latent_in_any_order() -> None:
    dictionary, acts = dictionary_of("jumprelu"), some_acts()
    one = Clamp(SITE, dictionary, LATENTS, "set", 2)(acts)
    assert one.equal(Clamp(SITE, dictionary, LATENTS, "set", torch.full((3,), 2.0))(acts))
    torch.testing.assert_close(one, Clamp(SITE, dictionary, LATENTS.flip(0), "set", 2.0)(acts))
    by_latent = Clamp(SITE, dictionary, LATENTS, "set", torch.tensor([1.0, 2.0, 3.0]))(acts)
    torch.testing.assert_close(
        by_latent, Clamp(SITE, dictionary, LATENTS.flip(0), "set", torch.tensor([3.0, 2.0, 1.0]))(acts)
    )
    assert not torch.allclose(one, by_latent)


def test_latents_of_a_planted_concept_are_taken_out_exactly() -> None:
    """Where decoder rows are orthonormal and the code is known, the clamped activation is what it was built from."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q[:F]
    dictionary = Dictionary(
        W_enc=rows.mT.contiguous(),
        b_enc=torch.zeros(F),
        W_dec=rows,
        b_dec=torch.zeros(D),
        nonlinearity=ReLUActivation(),
    )
    code = torch.rand(3, 7, F, generator=rng)
    rest = torch.randn(3, 7, D, generator=rng)
    rest = rest - rest @ rows.mT @ rows  # what the dictionary cannot see
    without = code.clone()
    without[..., LATENTS] = 0
    edited = Clamp(SITE, dictionary, LATENTS, "set", 0.0)(code @ rows + rest)
    torch.testing.assert_close(edited, without @ rows + rest)


def test_it_steers_a_model_and_a_closed_gate_does_not() -> None:
    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), prompts(lengths=(3, 8, 5))
    dictionary = dictionary_of("topk")

    def answers(*edits: Clamp) -> list[list[int]]:
        return generate(model, tokenizer, rows, max_new_tokens=8, interventions=edits, stop=())

    def shut(acts: Tensor) -> Tensor:
        return torch.zeros(acts.shape[:2], dtype=torch.bool)

    assert answers(Clamp(SITE, dictionary, LATENTS, "set", 9.0)) != answers()
    assert answers(Clamp(SITE, dictionary, LATENTS, "set", 9.0, gate=shut)) == answers()
    wide = replace(dictionary, W_enc=torch.ones(D + 1, F), W_dec=torch.ones(F, D + 1), b_dec=torch.zeros(D + 1))
    with pytest.raises(UsageError, match=f"reads {D + 1} values a token, and was given {D}"):
        answers(Clamp(SITE, wide, LATENTS, "set", 9.0))


@pytest.mark.parametrize(
    ("latents", "mode", "value", "said"),
    [
        ([], "set", 0.0, "at least one latent"),
        ([0, F], "set", 0.0, f"no latent {F}: this dictionary has 0 to {F - 1}"),
        ([-1], "set", 0.0, "no latent -1"),
        ([2, 5, 2], "set", 0.0, "given twice among 3"),
        ([1], "set", float("nan"), "one finite value"),
        ([1], "scale", float("inf"), "one finite value"),
        ([1, 2], "set", torch.tensor([0.0, float("nan")]), "one finite value"),
        ([1, 2], "set", torch.zeros(3), "one for each of 2 latents"),
        ([1], "negative-if-active", -5.0, "give it as 0 or more"),
    ],
)
def test_what_cannot_be_clamped_is_refused(latents: list[int], mode: str, value: float | Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Clamp(SITE, dictionary_of("relu"), torch.tensor(latents, dtype=torch.long), mode, value)


def test_dictionaries_that_do_not_write_to_this_site_are_refused() -> None:
    dictionary = dictionary_of("relu")
    for wrong, said in (
        (replace(dictionary, pairing=Pairing(kind="difference")), "reads both models .its pairing is `difference`"),
        (replace(dictionary, pairing=Pairing(kind="both")), "reads both models"),
        (replace(dictionary, site=Site(2)), r"of L2\.resid and cannot be clamped at L1\.resid"),
        (replace(dictionary, W_skip=torch.eye(D)), "transcoder"),
        (replace(dictionary, W_dec=torch.zeros(F, 5), b_dec=torch.zeros(5)), "transcoder"),
    ):
        with pytest.raises(UsageError, match=said):
            Clamp(SITE, wrong, LATENTS, "set", 0.0)
    Clamp(SITE, replace(dictionary, site=SITE, pairing=Pairing(kind="base")), LATENTS, "set", 0.0)
