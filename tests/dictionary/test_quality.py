"""What a dictionary misses and what that costs the models, against sums done the slow way."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy

from molehunt.activation.scale import sinks
from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation, TopKActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.quality import Measured, SplicedLoss, measure_quality, spliced_loss
from molehunt.errors import NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from tiny_models import D_MODEL, prompts, tiny_model, tiny_tokenizer, with_lora

SITE = Site(1)
ROWS = prompts(seed=1, lengths=(3, 9, 5, 17, 1))


def random_dictionary(d_in: int, pairing: Pairing, *, d_dict: int = 24, k: int = 5, **reported) -> Dictionary:
    rng = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(d_in, d_dict, generator=rng), 0.1 * torch.randn(d_dict, d_in, generator=rng)
    return Dictionary(
        **{
            "W_enc": W_enc,
            "b_enc": torch.zeros(d_dict),
            "W_dec": W_dec,
            "b_dec": torch.randn(d_in, generator=rng),
            "nonlinearity": TopKActivation(k),
            "pairing": pairing,
            "site": SITE,
            **reported,
        }
    )


def identity(pairing: Pairing) -> Dictionary:
    """x̂ = x."""
    d = D_MODEL * pairing.blocks
    eye = torch.eye(d)
    return random_dictionary(
        d,
        pairing,
        W_enc=torch.cat([eye, -eye], 1),
        b_enc=torch.zeros(2 * d),
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(d),
        nonlinearity=ReLUActivation(),
    )


def batches(d: int = 6) -> list[PairBatch]:
    rng = torch.Generator().manual_seed(2)
    return [PairBatch(*(3 + torch.randn(2, n, d, generator=rng))) for n in (40, 7, 1)]


@pytest.mark.parametrize(
    "pairing",
    [Pairing(kind="difference"), Pairing(kind="base"), Pairing(kind="both"), Pairing(kind="both", joint=-0.7)],
    ids=str,
)
def test_fit_and_sparsity_are_those_of_all_tokens_at_once(pairing: Pairing) -> None:
    dictionary = random_dictionary(6 * pairing.blocks, pairing)
    x = torch.cat([pairing.input(b.base, b.tuned) for b in batches()])
    found = measure_quality(dictionary, batches())
    code = dictionary.encode(x)
    missed = pairing.squared_error(x - dictionary.reconstruct(x)).sum()
    assert found.fvu.value == pytest.approx(float(missed / pairing.squared_error(x - x.mean(0)).sum()), rel=1e-4)
    assert found.fvu.n == found.l0.n == found.dead.n == 48
    assert found.l0.value == pytest.approx(float((code > 0).sum(1).float().mean()))
    assert found.dead.value == pytest.approx(float((code.amax(0) == 0).float().mean()))
    assert found.loss is None and found.loss_recovered is None and found.to_json()["loss_recovered"] is None


def test_a_constant_offset_is_no_variance() -> None:
    far = [PairBatch(b.base, b.tuned + 1000) for b in batches()]
    pairing = Pairing(kind="difference")
    mean = torch.cat([b.tuned - b.base for b in far]).mean(0)
    constant = random_dictionary(6, pairing, W_dec=torch.zeros(24, 6), b_dec=mean)
    assert measure_quality(constant, far).fvu.value == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_measured() -> None:
    pairing = Pairing(kind="difference")
    dictionary = random_dictionary(6, pairing)
    with pytest.raises(NotTestable, match="no token"):
        measure_quality(dictionary, [])
    with pytest.raises(NotTestable, match="do not vary"):
        measure_quality(dictionary, [PairBatch(torch.ones(5, 6), 3 * torch.ones(5, 6))])
    with pytest.raises(UsageError, match="reads 6 values a token, and was given 9"):
        measure_quality(dictionary, batches(9))
    transcoder = random_dictionary(6, pairing, W_dec=torch.zeros(24, 4), b_dec=torch.zeros(4))
    with pytest.raises(NotTestable, match="transcoder"):
        measure_quality(transcoder, batches())
    skips = random_dictionary(6, pairing, W_skip=torch.zeros(6, 6))
    with pytest.raises(NotTestable, match="transcoder"):
        measure_quality(skips, batches())


@cache
def pair(kind: str = "full") -> ModelPair:
    base = tiny_model("llama", 0)
    if kind == "lora":
        tuned = with_lora(base, "llama")
        return ModelPair(tuned, tuned, tiny_tokenizer())
    return ModelPair(base, tiny_model("llama", 1), tiny_tokenizer())


def slow_loss(models: ModelPair, dictionary: Dictionary, mean: torch.Tensor, what: str) -> tuple[float, torch.Tensor]:
    """Row by row, with a plain hook: the loss, and the probabilities of every token that follows."""
    total, probs, kind = 0.0, [], dictionary.pairing.kind
    for row in ROWS:
        if len(row) < 2:
            continue
        reading = models.read([row], sites=[SITE])
        base, tuned = reading.base[SITE], reading.tuned[SITE]
        x = dictionary.pairing.input(base, tuned)
        built = {"spliced": dictionary.reconstruct(x), "reference": mean.expand_as(x)}.get(what)
        if built is not None:
            built = base + built if kind == "difference" else built[..., -D_MODEL:]
            keep = sinks(base, reading.mask) | sinks(tuned, reading.mask)
            built = torch.where(keep[..., None], base if kind == "base" else tuned, built)
        with models.base_model() if kind == "base" else models.tuned_model() as model:
            block = next(m for name, m in model.named_modules() if name.endswith("layers.1"))

            def put(module, args, output, built=built):
                return output if built is None else (built, *output[1:]) if isinstance(output, tuple) else built

            handle = block.register_forward_hook(put)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            handle.remove()
        total += float(cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum"))
        probs.append(logits[:-1].softmax(-1))
    return total / len(torch.cat(probs)), torch.cat(probs)


@pytest.mark.parametrize("kind", ["tuned", "base", "difference", "both"])
@pytest.mark.parametrize("models", ["full", "lora"])
def test_spliced_losses_are_those_of_rows_alone(kind, models: str) -> None:
    pairing = Pairing(kind=kind)
    dictionary = random_dictionary(D_MODEL * pairing.blocks, pairing)
    mean = torch.linspace(-1, 1, D_MODEL * pairing.blocks)
    found = spliced_loss(dictionary, pair(models), ROWS, mean=mean)
    _, clean = slow_loss(pair(models), dictionary, mean, "clean")
    for what in ("clean", "spliced", "reference"):
        loss, probs = slow_loss(pair(models), dictionary, mean, what)
        assert (getattr(found, what), found.n) == (pytest.approx(loss, rel=1e-4), len(probs))
        if what != "clean":
            kl = float((clean * (clean.log() - probs.log())).sum(1).mean())
            assert getattr(found, f"kl_{what}") == pytest.approx(kl, rel=1e-3)
    assert found.spliced != found.clean != found.reference


@pytest.mark.parametrize("kind", ["tuned", "base", "difference", "both"])
def test_a_perfect_dictionary_recovers_all(kind) -> None:
    pairing = Pairing(kind=kind)
    site_batches = [PairBatch(*(torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(0))))]
    found = measure_quality(identity(pairing), site_batches, pair=pair(), rows=ROWS)
    assert found.fvu.value < 1e-9 and found.loss is not None
    assert found.loss.spliced == pytest.approx(found.loss.clean, rel=1e-4)
    recovered = found.loss_recovered
    assert recovered is not None and recovered.value == pytest.approx(1, abs=1e-3) and recovered.n == 30
    assert found.to_json()["loss_recovered"] == {"value": recovered.value, "n": 30}
    assert found.kl_recovered is not None and found.kl_recovered.value == pytest.approx(1, abs=1e-3)


def test_where_the_mean_costs_nothing_there_is_nothing_to_recover() -> None:
    reported = SplicedLoss(clean=2.0, spliced=2.5, reference=3.0, kl_spliced=0.2, kl_reference=0.8, n=4)
    assert (reported.recovered, reported.kl_recovered) == (0.5, 0.75)
    assert (
        replace(reported, reference=2.0005).recovered is None
        and replace(reported, kl_reference=0.0005).kl_recovered is None
    )
    assert Measured(1.0, 2) == Measured(1.0, 2)


def test_what_cannot_be_spliced() -> None:
    pairing = Pairing(kind="tuned")
    dictionary, mean = random_dictionary(D_MODEL, pairing), torch.zeros(D_MODEL)
    with pytest.raises(UsageError, match="do not say which site"):
        spliced_loss(random_dictionary(D_MODEL, pairing, site=None), pair(), ROWS, mean=mean)
    with pytest.raises(UsageError, match="reads 6 values a token and model, and these models have 32"):
        spliced_loss(random_dictionary(6, pairing), pair(), ROWS, mean=torch.zeros(6))
    with pytest.raises(NotTestable, match="No row has two tokens"):
        spliced_loss(dictionary, pair(), [[5]], mean=mean)
    elsewhere = spliced_loss(random_dictionary(D_MODEL, pairing, site=None), pair(), ROWS, mean=mean, site=Site(0))
    assert elsewhere.clean == pytest.approx(spliced_loss(dictionary, pair(), ROWS, mean=mean).clean)
