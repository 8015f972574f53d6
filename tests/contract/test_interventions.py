"""What every intervention in the catalogue owes. A new row gets these tests for one example and one slow reference."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from molehunt.contracts import Intervention
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import JumpReLUActivation
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.run.catalog import load
from molehunt.site import Site
from molehunt.steer.catalog import CATALOG
from molehunt.transfer.linear_map import LinearMap
from tiny_models import hooks, prompts, tiny_model, tiny_tokenizer

D = 32
SITE = Site(1)
RNG = torch.Generator().manual_seed(11)
DIRECTIONS = torch.randn(2, D, generator=RNG)
VECTOR = torch.randn(D, generator=RNG)
LO, HI = torch.tensor([-0.2, -0.1]), torch.tensor([0.1, 0.3])
LATENTS = torch.tensor([4, 1, 7])
MAP = LinearMap(SITE, SITE, torch.randn(D, D, generator=torch.Generator().manual_seed(12)) / 4, VECTOR)
DICTIONARY = Dictionary(
    W_enc=torch.randn(D, 9, generator=RNG) / 4,
    b_enc=torch.randn(9, generator=RNG) / 4,
    W_dec=torch.randn(9, D, generator=RNG),
    b_dec=torch.randn(D, generator=RNG),
    nonlinearity=JumpReLUActivation(torch.full((9,), 0.1)),
    center=True,
    norm="layer_norm",
)


@dataclass(frozen=True)
class Example:
    """How the suite builds one intervention, and what it should do to one token, computed the slow way."""

    options: dict
    reference: Callable[[torch.Tensor, float], torch.Tensor]


def add(token, strength):
    return torch.stack([token[i] + strength * VECTOR[i] for i in range(D)])


def replace(token, strength):
    return (1 - strength) * token + strength * VECTOR


def ablate(token, strength):
    first = DIRECTIONS[0] / DIRECTIONS[0].norm()
    second = DIRECTIONS[1] - (DIRECTIONS[1] @ first) * first
    for unit in (first, second / second.norm()):
        token = token + strength * (VECTOR @ unit - token @ unit) * unit
    return token


def clip(token, strength):
    for direction, lo, hi in zip(DIRECTIONS, LO, HI, strict=True):
        unit = direction / direction.norm()
        at = float(token @ unit)
        token = token + strength * (min(max(at, float(lo)), float(hi)) - at) * unit
    return token


def clamp(token, strength):
    """decode(clamped code) + error, with the whole code decoded."""
    mean, scale = token.mean(), token.std() + 1e-5
    pre = ((token - mean) / scale - DICTIONARY.b_dec) @ DICTIONARY.W_enc + DICTIONARY.b_enc
    code = torch.where(pre > 0.1, pre, torch.zeros(9))
    error = token - ((code @ DICTIONARY.W_dec + DICTIONARY.b_dec) * scale + mean)
    for latent in LATENTS.tolist():
        code[latent] = code[latent] + strength * (0.7 - code[latent])
    return (code @ DICTIONARY.W_dec + DICTIONARY.b_dec) * scale + mean + error


def mapped(token, strength):
    reported = torch.stack([sum(token[i] * MAP.weight[i, j] for i in range(D)) + VECTOR[j] for j in range(D)])
    return (1 - strength) * token + strength * reported


def span_clamp(token, strength):
    """By least squares on the normalised token, which keeps its length."""
    token = token.double()
    mean, scale = token.mean(), token.std() + 1e-5
    n = (token - mean) / scale
    held = torch.cat([DICTIONARY.W_enc[:, LATENTS], DIRECTIONS.mT, torch.ones(D, 1)], 1).double()
    bias = DICTIONARY.b_enc[LATENTS] - DICTIONARY.b_dec @ DICTIONARY.W_enc[:, LATENTS]
    wanted = torch.cat([torch.full((3,), 0.7) - bias, HI, torch.zeros(1)]).double()
    inside = torch.linalg.lstsq(held.mT, wanted[:, None], driver="gelsd").solution[:, 0]
    outside = n - held @ torch.linalg.lstsq(held, n[:, None]).solution[:, 0]
    turned = inside + outside / outside.norm() * (n.norm() ** 2 - inside.norm() ** 2) ** 0.5
    return ((1 - strength) * token + strength * (turned * scale + mean)).float()


def error_shrink(token, strength):
    mean, scale = token.mean(), token.std() + 1e-5
    pre = ((token - mean) / scale - DICTIONARY.b_dec) @ DICTIONARY.W_enc + DICTIONARY.b_enc
    code = torch.where(pre > 0.1, pre, torch.zeros(9))
    rebuilt = (code @ DICTIONARY.W_dec + DICTIONARY.b_dec) * scale + mean
    away = token - rebuilt - VECTOR
    kept = DIRECTIONS.mT @ torch.linalg.lstsq(DIRECTIONS.mT, away[:, None]).solution[:, 0]
    return rebuilt + VECTOR + kept + (1 - strength) * (away - kept)


EXAMPLES = {
    "add": Example({"direction": VECTOR}, add),
    "replace": Example({"source": VECTOR.expand(1, 1, D)}, replace),
    "ablate": Example({"directions": DIRECTIONS, "center": VECTOR}, ablate),
    "clamp": Example({"dictionary": DICTIONARY, "latents": LATENTS, "mode": "set", "value": 0.7}, clamp),
    "clip": Example({"directions": DIRECTIONS, "lo": LO, "hi": HI}, clip),
    "error-shrink": Example({"dictionary": DICTIONARY, "components": DIRECTIONS, "mean": VECTOR}, error_shrink),
    "mapped": Example({"map": MAP}, mapped),
    "span-clamp": Example(
        {"dictionary": DICTIONARY, "latents": LATENTS, "value": 0.7, "directions": DIRECTIONS, "held": HI}, span_clamp
    ),
}


def build(name: str, strength: float, gate=None) -> Intervention:
    kind = load(CATALOG, name, "molehunt.interventions")
    return kind(site=SITE, strength=strength, gate=gate, **EXAMPLES[name].options)


def some_acts(dtype=torch.float32):
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(4)).to(dtype)


def half(acts):
    return acts[..., 0] > 0


def never(acts):
    return torch.zeros(acts.shape[:-1], dtype=torch.bool)


def test_every_row_has_an_example_here():
    assert set(EXAMPLES) == set(CATALOG)


every = pytest.mark.parametrize("name", sorted(CATALOG))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@every
def test_fulfils_the_contract(name):
    intervention = build(name, 1.0)
    assert isinstance(intervention, Intervention)
    assert intervention.site == SITE


@every
@both_dtypes
def test_strength_0_is_bit_equal(name, dtype):
    acts = some_acts(dtype)
    assert build(name, 0.0)(acts) is acts
    assert build(name, 0.0, gate=half)(acts) is acts


@every
@both_dtypes
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_matches_the_slow_reference_token_by_token(name, dtype, strength):
    acts = some_acts(dtype)
    before = acts.clone()
    edited = build(name, strength)(acts)
    expected = torch.stack([torch.stack([EXAMPLES[name].reference(t.float(), strength) for t in row]) for row in acts])
    assert acts.equal(before)  # not in place
    assert (edited.shape, edited.dtype) == (acts.shape, dtype)
    torch.testing.assert_close(edited.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
    assert not torch.allclose(edited.float(), acts.float(), atol=1e-2)


@every
@both_dtypes
def test_a_closed_gate_is_bit_equal_and_an_open_one_acts_where_it_says(name, dtype):
    acts = some_acts(dtype)
    assert build(name, 1.0, gate=never)(acts).equal(acts)
    gated, plain, open_ = build(name, 1.0, gate=half)(acts), build(name, 1.0)(acts), half(acts)
    assert open_.any()
    assert not open_.all()
    assert gated[open_].equal(plain[open_])
    assert gated[~open_].equal(acts[~open_])


@every
def test_each_row_is_edited_by_itself(name):
    acts = some_acts()
    intervention = build(name, 1.0)
    for row in range(3):
        torch.testing.assert_close(intervention(acts[row : row + 1])[0], intervention(acts)[row])


@every
def test_right_rows_and_steps_under_a_cache(name):
    """Greedy text from padded, cached batches equals that of one row at a time without a cache."""
    model, rows = tiny_model("llama"), prompts(lengths=(3, 8, 5))
    intervention = build(name, 1.0, gate=half)
    cached = generate(model, tiny_tokenizer(), rows, max_new_tokens=8, interventions=[intervention], stop=())
    with torch.no_grad(), edit_sites(model, [intervention]) as edits:
        for row, completion in zip(rows, cached, strict=True):
            logits = model(torch.tensor([[*row, *completion]]), use_cache=False).logits[0]
            assert logits[len(row) - 1 : -1].argmax(-1).tolist() == completion
    assert edits.firings[SITE] == 3
    assert cached != generate(model, tiny_tokenizer(), rows, max_new_tokens=8, stop=())


@every
def test_hooks_are_gone_after_an_exception_and_the_model_is_as_it_was(name):
    model, ids = tiny_model("llama"), torch.tensor(prompts(lengths=(6,)))
    with torch.no_grad():
        plain = model(ids).logits
        with pytest.raises(ZeroDivisionError), edit_sites(model, [build(name, 1.0)]):
            assert not model(ids).logits.equal(plain)
            raise ZeroDivisionError
        assert hooks(model) == 0
        assert model(ids).logits.equal(plain)
        with edit_sites(model, [build(name, 0.0), build(name, 1.0, gate=never)]), read_sites(model, [SITE]):
            assert model(ids).logits.equal(plain)
