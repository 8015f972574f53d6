"""Decoder norms and latent scaling against least squares done latent by latent."""

import pytest
import torch

from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.latents import latent_scaling, norm_bins, relative_norms
from molehunt.dictionary.nonlinearity import ReLUActivation, TopKActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import NotTestable, UsageError

D, LATENTS = 5, 8


def crosscoder(seed: int = 0, **reported) -> Dictionary:
    rng = torch.Generator().manual_seed(seed)
    return Dictionary(
        **{
            "W_enc": torch.randn(2 * D, LATENTS, generator=rng),
            "b_enc": torch.randn(LATENTS, generator=rng),
            "W_dec": torch.randn(LATENTS, 2 * D, generator=rng),
            "b_dec": torch.randn(2 * D, generator=rng),
            "nonlinearity": TopKActivation(3),
            "pairing": Pairing(kind="both"),
            **reported,
        }
    )


def batches(seed: int = 1) -> list[PairBatch]:
    rng = torch.Generator().manual_seed(seed)
    return [PairBatch(*torch.randn(2, n, D, generator=rng)) for n in (30, 5, 12)]


def slow_beta(dictionary: Dictionary, x: torch.Tensor, latent: int, model: int, what: str) -> float:
    """argmin_β Σ_n ‖β f_n d − y_n‖², by lstsq."""
    code = dictionary.encode(x).double()
    decoders = dictionary.W_dec.double().unflatten(1, (2, D))
    bias = dictionary.b_dec.double().unflatten(0, (2, D))
    built = code @ decoders[:, model] + bias[model]
    without = code.clone()
    without[:, latent] = 0
    error = x.double().unflatten(1, (2, D))[:, model] - (without @ decoders[:, model] + bias[model])
    y = {"error": error, "reconstruction": built}[what]
    regressor = code[:, latent, None] * decoders[latent, 1]
    return float(torch.linalg.lstsq(regressor.reshape(-1, 1), y.reshape(-1, 1)).solution)


@pytest.mark.parametrize("seed", range(3))
def test_every_beta_is_the_least_squares_fit(seed: int) -> None:
    dictionary = crosscoder(seed)
    found = latent_scaling(dictionary, batches(seed))
    x = torch.cat([torch.cat([b.base, b.tuned], 1) for b in batches(seed)])
    for latent in range(LATENTS):
        for what, pair in (
            ("error", (found.error_base, found.error_tuned)),
            ("reconstruction", (found.reconstruction_base, found.reconstruction_tuned)),
        ):
            for model, betas in enumerate(pair):
                assert float(betas[latent]) == pytest.approx(
                    slow_beta(dictionary, x, latent, model, what), rel=1e-3, abs=1e-4
                )
    torch.testing.assert_close(found.nu_error, found.error_base / found.error_tuned)
    assert found.fired.tolist() == (dictionary.encode(x) > 0).sum(0).tolist() and found.tokens == 47


def planted() -> tuple[Dictionary, list[PairBatch]]:
    """Latent 0 is the tuned model's alone, 1 was shrunk in the base, 2 was handed to latent 3 there, 4 never fires."""
    eye = torch.eye(4)
    rng = torch.Generator().manual_seed(0)
    code = torch.rand(200, 3, generator=rng) + 0.5
    tuned = code @ eye[:3]
    base = code[:, 1:] @ eye[1:3]
    W_dec = torch.zeros(5, 8)
    W_dec[0, 4:], W_dec[1, 4:], W_dec[2, 4:], W_dec[3, :4] = eye[0], eye[1], eye[2], eye[2]
    W_enc = torch.zeros(8, 5)
    W_enc[4:, 0], W_enc[4:, 1], W_enc[4:, 2], W_enc[:4, 3] = eye[0], eye[1], eye[2], eye[2]
    dictionary = crosscoder(
        W_enc=W_enc,
        b_enc=torch.tensor([0.0, 0, 0, 0, -1]),
        W_dec=W_dec,
        b_dec=torch.zeros(8),
        nonlinearity=ReLUActivation(),
    )
    return dictionary, [PairBatch(base, tuned)]


def test_only_the_latent_that_the_base_lacks_is_the_tuned_models_own() -> None:
    dictionary, tokens = planted()
    assert relative_norms(dictionary)[:4].tolist() == [1, 1, 1, 0]
    found = latent_scaling(dictionary, tokens)
    assert found.nu_error[:2].tolist() == pytest.approx([0, 1], abs=1e-5)
    assert found.nu_reconstruction[0].item() == pytest.approx(0, abs=1e-5)
    assert found.nu_reconstruction[2].item() == pytest.approx(1, abs=1e-5)
    assert found.error_base[4].isnan() and found.fired[4] == 0
    assert found.tuned_only().tolist() == [True, False, False, False, False]


def test_relative_norms_and_their_bins() -> None:
    W_dec = torch.zeros(5, 2 * D)
    W_dec[:, 0] = torch.tensor([1.0, 0, 2, 1, 0])
    W_dec[:, D] = torch.tensor([0.0, 3, 2, 2, 0])
    dictionary = crosscoder(
        W_enc=torch.zeros(2 * D, 5), b_enc=torch.zeros(5), W_dec=W_dec, nonlinearity=ReLUActivation()
    )
    relative = relative_norms(dictionary)
    assert relative[:4].tolist() == [0, 1, 0.5, 0.75] and relative[4].isnan()
    assert norm_bins(relative) == {"base": 1, "shared": 1, "tuned": 1, "between": 2}


def test_dictionaries_of_one_input_have_no_such_latents() -> None:
    one = crosscoder(pairing=Pairing(kind="difference"))
    with pytest.raises(UsageError, match=r"Only a crosscoder .* reads difference"):
        relative_norms(one)
    with pytest.raises(UsageError, match="Only a crosscoder"):
        latent_scaling(one, batches())
    with pytest.raises(UsageError, match="normalises its input"):
        latent_scaling(crosscoder(norm="layer_norm"), batches())
    with pytest.raises(NotTestable, match="no token"):
        latent_scaling(crosscoder(), [])
