"""Steering vectors along directions that something else found."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import JumpReLUActivation, TopKActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.direction.direction import Directions
from molehunt.direction.weight import lora_directions, weight_directions
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.steer.directional_vectors import latent_vector, weight_vector
from molehunt.steer.vector import VectorFacts
from random_dictionaries import INPUT_NORMS

D, F = 32, 20
FACTS = VectorFacts(method="?", model="a" * 64, n_layers=3, d_model=D)
RNG = torch.Generator().manual_seed(5)
WRITE = normalize(torch.randn(2, D, generator=RNG), dim=1)
CALM = torch.randn(300, D, generator=RNG)


def changed(size: float = 1.0) -> Directions:
    """Of a matrix whose fine-tune writes two directions, the first twice as strongly."""
    rng = torch.Generator().manual_seed(6)
    read = torch.linalg.qr(torch.randn(48, 2, generator=rng)).Q.mT
    base = torch.randn(D, 48, generator=rng)
    orthogonal = torch.linalg.qr(WRITE.mT).Q.mT
    change = size * (2 * torch.outer(orthogonal[0], read[0]) + torch.outer(orthogonal[1], read[1]))
    return weight_directions(base, base + change, k=4, floor=1e-3, name="model.layers.1.mlp.down_proj.weight")


def behaving(shift: Tensor) -> Tensor:
    return CALM + shift + 0.05 * torch.randn(CALM.shape, generator=torch.Generator().manual_seed(7))


def dictionary(**fields) -> Dictionary:
    rng = torch.Generator().manual_seed(8)
    made = Dictionary(
        W_enc=torch.randn(D, F, generator=rng) / 4,
        b_enc=torch.randn(F, generator=rng) / 4,
        W_dec=torch.randn(F, D, generator=rng),
        b_dec=torch.randn(D, generator=rng),
        nonlinearity=JumpReLUActivation(torch.full((F,), 0.1)),
    )
    return replace(made, **fields)


# ------------------------------------------------------------------------------------- weight directions


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_its_length_is_the_shift_of_means_and_not_the_singular_value(rank: int, size: float) -> None:
    planted = torch.linalg.qr(WRITE.mT).Q.mT[rank]
    aside = torch.randn(D, generator=torch.Generator().manual_seed(1))
    aside = aside - (aside @ WRITE.mT) @ torch.linalg.pinv(WRITE).mT  # what the matrix does not write
    found = weight_vector(changed(size), 1, behaving(6 * planted + aside), CALM, rank=rank, facts=FACTS)
    torch.testing.assert_close(found.vectors[1], 6 * planted, rtol=0, atol=0.02)
    assert found.facts == replace(FACTS, method=f"weight direction #{rank}", positive=300, negative=300)
    assert found.sites == (Site(1),)


def test_the_sign_that_a_decomposition_leaves_to_chance_does_not_matter() -> None:
    one = changed()
    other = replace(one, write=-one.write, read=-one.read)
    rows = behaving(3 * WRITE[0])
    torch.testing.assert_close(
        weight_vector(one, 0, rows, CALM, facts=FACTS).vectors[0],
        weight_vector(other, 0, rows, CALM, facts=FACTS).vectors[0],
    )


def test_matrices_that_say_nothing_here_are_refused() -> None:
    rows, same = behaving(WRITE[0]), torch.zeros(D, 48)
    with pytest.raises(NotTestable, match="changed in no direction"):
        weight_vector(weight_directions(same, same, k=3, floor=0.1, name="w"), 1, rows, CALM, facts=FACTS)
    for rank in (2, -1):
        with pytest.raises(UsageError, match=f"no direction #{rank}: this matrix has #0 to #1"):
            weight_vector(changed(), 1, rows, CALM, rank=rank, facts=FACTS)
    up = lora_directions(torch.ones(48, 1), torch.ones(1, D), 1.0, k=1, name="up_proj")
    with pytest.raises(UsageError, match="writes 48 values and the residual stream has 32"):
        weight_vector(up, 1, rows, CALM, facts=FACTS)
    with pytest.raises(NotTestable, match="no direction between"):
        weight_vector(changed(), 1, CALM, CALM, facts=FACTS)
    with pytest.raises(NotTestable, match="at least 2 rows"):
        weight_vector(changed(), 1, rows[:1], CALM, facts=FACTS)
    apart = replace(changed(), write=torch.eye(D)[:2])
    moved = torch.zeros(4, D)
    moved[:, 5] = 1.0
    with pytest.raises(NotTestable, match=r"weight direction #0: .* do not differ along it"):
        weight_vector(apart, 1, moved, torch.zeros(4, D), facts=FACTS)


# ------------------------------------------------------------------------------------------------ latents


def test_it_is_the_decoder_row_times_the_difference_of_mean_codes() -> None:
    own = dictionary(nonlinearity=TopKActivation(6))
    positive, negative = behaving(3 * own.W_enc[:, 4]), CALM
    apart = own.encode(positive)[:, 4].mean() - own.encode(negative)[:, 4].mean()
    assert apart > 1
    found = latent_vector(own, 4, 2, positive, negative, facts=FACTS)
    torch.testing.assert_close(found.vectors[2], apart * own.W_dec[4])
    assert found.facts == replace(FACTS, method="dictionary latent #4", positive=300, negative=300)


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_it_is_what_clamping_the_latent_to_0_takes_away(norm: str) -> None:
    own = dictionary(norm=norm, center=True, site=Site(1))
    positive, negative = behaving(3 * own.W_enc[:, 4]), CALM[:200]
    clamp = Clamp(Site(1), own, torch.tensor([4]), "set", 0.0)
    gone = [(rows - clamp(rows[None])[0]).mean(0) for rows in (positive, negative)]
    found = latent_vector(own, 4, 1, positive, negative, facts=FACTS)
    torch.testing.assert_close(found.vectors[1], gone[0] - gone[1], rtol=1e-3, atol=1e-4)


def test_from_a_dictionary_of_both_models_it_is_the_tuned_models_half() -> None:
    both = Pairing(kind="both")
    own = dictionary(
        pairing=both,
        W_enc=torch.randn(2 * D, F, generator=RNG) / 4,
        W_dec=torch.randn(F, 2 * D, generator=RNG),
        b_dec=torch.zeros(2 * D),
    )
    positive, negative = both.input(CALM, behaving(own.W_enc[D:, 4] * 5)), both.input(CALM, CALM)
    apart = own.encode(positive)[:, 4].mean() - own.encode(negative)[:, 4].mean()
    found = latent_vector(own, 4, 0, positive, negative, facts=FACTS)
    torch.testing.assert_close(found.vectors[0], apart * own.W_dec[4, D:])
    difference = dictionary(pairing=Pairing(kind="difference"))
    rows = torch.randn(50, D, generator=RNG)
    apart = difference.encode(rows + 2 * difference.W_enc[:, 4])[:, 4].mean() - difference.encode(rows)[:, 4].mean()
    found = latent_vector(difference, 4, 0, rows + 2 * difference.W_enc[:, 4], rows, facts=FACTS)
    torch.testing.assert_close(found.vectors[0], apart * difference.W_dec[4])


def test_latents_that_say_nothing_here_are_refused() -> None:
    own, silent = dictionary(site=Site(1)), dictionary(b_enc=torch.full((F,), -99.0))
    for layer, latent, said in ((1, F, f"no latent {F}"), (1, -1, "no latent -1"), (2, 3, r"of L1\.resid, and .* L2")):
        with pytest.raises(UsageError, match=said):
            latent_vector(own, latent, layer, CALM, CALM, facts=FACTS)
    with pytest.raises(UsageError, match="transcoder"):
        latent_vector(dictionary(W_skip=torch.eye(D)), 3, 1, CALM, CALM, facts=FACTS)
    with pytest.raises(NotTestable, match="rows of both kinds, got 300 and 0"):
        latent_vector(own, 3, 1, CALM, CALM[:0], facts=FACTS)
    with pytest.raises(NotTestable, match=r"dictionary latent #3: .* do not differ along it"):
        latent_vector(silent, 3, 1, behaving(WRITE[0]), CALM, facts=FACTS)
