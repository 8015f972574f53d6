"""Every architecture: gradients against a dense reference, training on planted atoms, and the finished form."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.batch_topk import BatchTopK
from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.jumprelu import SPEED
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, Trained, TrainingConfig, train_dictionaries, untrained
from molehunt.dictionary.trainee import InputScale, Trainee
from molehunt.errors import UsageError
from molehunt.site import Site
from planted_atoms import Planted

SITE = Site(1)
PLANTED = Planted.of()
D = 16
SETTINGS = {
    "batch-topk": {"k": 3},
    "gated": {"l1": 0.6},
    "jumprelu": {"target_l0": 3.0},
    "matryoshka": {"k": 3, "prefixes": (0.5, 1.0)},
    "relu": {"l1": 0.4},
    "topk": {"k": 3},
}
"""Of trainings on `PLANTED`."""
DIFFERENCE, BOTH = Pairing(kind="difference"), Pairing(kind="both")
every_architecture = pytest.mark.parametrize("name", CATALOG)


def spec(name: str, **reported) -> DictionarySpec:
    fixed = {"site": SITE, "architecture": name, "expansion": 2, "settings": SETTINGS[name], "lr": 1e-2}
    return DictionarySpec(**{**fixed, **reported})


@cache
def trained() -> dict[str, Trained]:
    """Every architecture, in one pass over the same batches."""
    specs = [spec(name) for name in CATALOG]
    done = train_dictionaries(specs, {SITE: PLANTED.batches(300)}, TrainingConfig(steps=300, batch=256), d_model=D)
    return {one.spec.architecture: one for one in done}


def trainee(name: str, pairing: Pairing = DIFFERENCE, seed: int = 0, **settings) -> Trainee:
    """Random, far from its start."""
    made = spec(name, pairing=pairing, settings={**SETTINGS[name], **settings}, seed=seed).build(D)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            size = 0.03 if name == "jumprelu" and parameter is made.level else 0.3
            parameter.add_(size * torch.randn(parameter.shape, generator=rng))
    made.after_step()
    return made


def inputs(pairing: Pairing = DIFFERENCE, n: int = 40, seed: int = 0) -> Tensor:
    batch = PLANTED.batch(n, seed)
    return pairing.input(batch.base, batch.tuned)


def test_every_architecture_is_tested() -> None:
    assert set(SETTINGS) == set(CATALOG)


# --- gradients against a slow dense reference that shares nothing with the code


def dense_batch_topk(t: Trainee, x: Tensor, n: int, widths: list[int]) -> Tensor:
    pre = x @ t.encoder.T + t.b_enc
    scores = relu(pre) * t.decoder_norms()
    cut = scores.detach().flatten().sort(descending=True).values[n - 1]
    code = torch.where(scores >= cut, pre, torch.zeros(()))
    errors = [x - code[:, :w] @ t.decoder[:w] - t.b_dec for w in widths]
    return sum(((e**2).mean() for e in errors), torch.zeros(())) / len(widths)


def dense_topk(t: Trainee, x: Tensor, k: int) -> Tensor:
    pre = x @ t.encoder.T + t.b_enc
    scores = pre * t.decoder_norms()
    kth = scores.detach().sort(dim=1, descending=True).values[:, k - 1 : k]
    code = torch.where(scores >= kth, relu(pre), torch.zeros(()))
    return ((x - code @ t.decoder - t.b_dec) ** 2).mean()


def dense_relu(t: Trainee, x: Tensor, l1: float) -> Tensor:
    code = relu(x @ t.encoder.T + t.b_enc)
    size = torch.stack([code[:, j] * t.decoder[j].square().sum().sqrt() for j in range(t.d_dict)], 1).sum(1).mean()
    return ((x - code @ t.decoder - t.b_dec) ** 2).mean() + l1 * size / D**0.5


def dense_gated(t: Trainee, x: Tensor, l1: float) -> Tensor:
    gate = x @ t.encoder.T + t.b_enc
    size = relu((x @ t.encoder.T) * t.r_mag.exp() + t.b_mag)
    code = (gate > 0).float() * size
    decoder, b_dec = t.decoder.detach(), t.b_dec.detach()
    aux = ((x - relu(gate) @ decoder - b_dec) ** 2).mean()
    sparsity = (relu(gate) * decoder.norm(dim=1)).sum(1).mean() / D**0.5
    return ((x - code @ t.decoder - t.b_dec) ** 2).mean() + aux + l1 * sparsity


LATE = 0.9
"""Of a training: every penalty is in force, k has settled."""
DENSE: dict[str, Callable[[Trainee, Tensor], Tensor]] = {
    "batch-topk": lambda t, x: dense_batch_topk(t, x, 3 * len(x), [t.d_dict]),
    "matryoshka": lambda t, x: dense_batch_topk(t, x, 3 * len(x), [16, 32]),
    "topk": lambda t, x: dense_topk(t, x, 3),
    "relu": lambda t, x: dense_relu(t, x, 0.4),
    "gated": lambda t, x: dense_gated(t, x, 0.6),
}


@pytest.mark.parametrize("name", DENSE)
def test_loss_and_gradients_are_those_of_a_dense_reference(name: str) -> None:
    made, x = trainee(name), inputs()
    losses = made.training_pass(x, made.pairing.squared_error, LATE).losses
    total = torch.stack(list(losses.values())).sum()
    reference = DENSE[name](made, x)
    torch.testing.assert_close(total, reference)
    parameters = list(made.parameters())
    ours, theirs = torch.autograd.grad(total, parameters), torch.autograd.grad(reference, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_jumprelu_learns_thresholds_by_the_rectangle_and_all_else_exactly() -> None:
    made, x, width = trainee("jumprelu", l0_weight=0.3), inputs(), 0.1
    losses = made.training_pass(x, made.pairing.squared_error, LATE).losses
    pre, threshold = (x @ made.encoder.T + made.b_enc).detach(), made.threshold().detach()
    fires = (pre > threshold).float()
    l0 = fires.sum(1).mean()
    assert losses["sparsity"].item() == pytest.approx(0.3 * (float(l0) / 3 - 1) ** 2, rel=1e-5)
    code = fires * (x @ made.encoder.T + made.b_enc)
    reference = ((x - code @ made.decoder - made.b_dec) ** 2).mean()
    rest = [made.encoder, made.decoder, made.b_enc, made.b_dec]
    for one, other in zip(
        torch.autograd.grad(losses["reconstruction"], rest, retain_graph=True),
        torch.autograd.grad(reference, rest),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    near = ((pre - threshold).abs() < width / 2).float()
    assert near.any()
    by_code = -2 * (x - (fires * pre) @ made.decoder - made.b_dec).detach() @ made.decoder.detach().T / x.numel()
    wanted = (by_code * -threshold / width * near).sum(0)
    wanted = wanted + 2 * 0.3 * (l0 / 3 - 1) / 3 * -(near / width).sum(0) / len(x)
    total = losses["reconstruction"] + losses["sparsity"]
    (ours,) = torch.autograd.grad(total, made.level)
    torch.testing.assert_close(ours, (SPEED * wanted * threshold).detach(), rtol=1e-4, atol=1e-6)


@every_architecture
def test_a_crosscoder_weighs_errors_by_its_pairing(name: str) -> None:
    x = inputs(BOTH)
    made = trainee(name, Pairing(kind="both", joint=-1.0))
    requested: list[Tensor] = []

    def spy(error: Tensor) -> Tensor:
        requested.append(error)
        return made.pairing.squared_error(error)

    losses = made.training_pass(x, spy, LATE).losses
    base, tuned = requested[0].chunk(2, dim=1)
    if name != "matryoshka":
        alone = (tuned - base).square().sum(1).mean().item() / (2 * D)
        assert losses["reconstruction"].item() == pytest.approx(alone, rel=1e-4)


# --- dead latents


@pytest.mark.parametrize("name", ["batch-topk", "topk", "matryoshka"])
def test_dead_latents_learn_from_the_error_alone(name: str) -> None:
    made, x = trainee(name), inputs()
    alive = made.training_pass(x, made.pairing.squared_error, LATE).losses
    made.dead = torch.zeros(32, dtype=torch.bool)
    made.dead[[4, 5]] = True
    losses = made.training_pass(x, made.pairing.squared_error, LATE).losses
    assert set(losses) - set(alive) == {"dead latents"}
    (gradient,) = torch.autograd.grad(losses["dead latents"], made.encoder)
    assert gradient[[4, 5]].any() and not gradient[[i for i in range(32) if i not in (4, 5)]].any()


@every_architecture
def test_bf16_products_train_with_dead_latents(name: str) -> None:
    made, x = trainee(name), inputs()
    made.dead[:] = True
    exact = made.training_pass(x, made.pairing.squared_error, LATE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = made.training_pass(x, made.pairing.squared_error, LATE)
    torch.stack(list(done.losses.values())).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
    assert done.losses["reconstruction"].item() == pytest.approx(exact.losses["reconstruction"].item(), rel=0.05)
    assert done.l0 == pytest.approx(exact.l0, rel=0.05)


# --- trained on planted atoms


@every_architecture
def test_training_lowers_the_loss_and_finds_the_atoms(name: str) -> None:
    one = trained()[name]
    first, last = one.history[0], one.history[-1]
    assert last["reconstruction"] < 0.4 * first["reconstruction"]
    control = untrained(one.spec, PLANTED.batch(2048, 99), D)
    x = inputs(n=2048, seed=98)
    assert fvu(one.dictionary, x) < 0.3 and fvu(control, x) > 0.6
    assert PLANTED.found(one.dictionary.W_dec) > 0.85
    assert PLANTED.found(control.W_dec) < 0.55


@pytest.mark.parametrize("name", ["batch-topk", "topk", "matryoshka", "jumprelu"])
def test_l0_is_what_was_asked_for_in_training_and_at_inference(name: str) -> None:
    one = trained()[name]
    assert one.history[-1]["l0"] == pytest.approx(3, rel=0.2)
    code = one.dictionary.encode(inputs(n=2048, seed=98))
    assert float((code > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize("name", ["batch-topk", "matryoshka"])
@pytest.mark.parametrize("steps", [40, 120])
def test_the_inference_threshold_follows_a_short_training_too(name: str, steps: int) -> None:
    config = TrainingConfig(steps=steps, batch=256)
    (one,) = train_dictionaries([spec(name)], {SITE: PLANTED.batches(steps)}, config, d_model=D)
    code = one.dictionary.encode(inputs(n=2048, seed=98))
    assert float((code > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_l1_makes_codes_sparse(name: str) -> None:
    assert 1 < trained()[name].history[-1]["l0"] < 6


@pytest.mark.parametrize("name", ["batch-topk", "matryoshka", "topk"])
def test_the_untrained_control_is_as_sparse(name: str) -> None:
    control = untrained(spec(name), PLANTED.batch(2048, 1), D)
    code = control.encode(inputs(n=2048, seed=2))
    assert float((code > 0).sum(1).float().mean()) == pytest.approx(3, rel=0.1)


def fvu(dictionary: Dictionary, x: Tensor) -> float:
    return float((x - dictionary.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())


@every_architecture
def test_inference_does_not_look_at_the_rest_of_the_batch(name: str) -> None:
    dictionary, x = trained()[name].dictionary, inputs(n=64)
    alone = torch.cat([dictionary.encode(row[None]) for row in x])
    torch.testing.assert_close(dictionary.encode(x), alone)
    torch.testing.assert_close(dictionary.encode(x.view(8, 8, D)), alone.view(8, 8, -1))
    torch.testing.assert_close(dictionary.encode_latents(x, torch.tensor([3, 1])), dictionary.encode(x)[:, [3, 1]])


# --- the finished form


def scaled_codes(made: Trainee, x: Tensor) -> Tensor:
    """What the trainee itself would say at inference, in units of decoder norm."""
    norms = made.decoder_norms()
    pre = x @ made.encoder.T + made.b_enc
    form = made.nonlinearity()
    if isinstance(form, nonlinearity.GatedActivation):
        size = relu((pre - made.b_enc) * made.r_mag.exp() + made.b_mag)
        return (pre > 0) * size * norms
    return form(pre * norms)


@pytest.mark.parametrize("pairing", [DIFFERENCE, BOTH, Pairing(kind="both", exclusive=0.25)], ids=str)
@every_architecture
def test_the_finished_dictionary_says_what_the_trainee_said_on_scaled_input(name: str, pairing: Pairing) -> None:
    made, x = trainee(name, pairing), 5 * inputs(pairing) + 2
    scale = InputScale.of(x, pairing.blocks)
    made.training_pass(scale(x), pairing.squared_error, LATE)
    if isinstance(made, BatchTopK):
        made.threshold *= 0.99  # as it is, one code equals it
    dictionary = made.eval().finished(scale)
    with torch.no_grad():
        code = scaled_codes(made, scale(x))
        built = (code / made.decoder_norms()) @ made.decoder + made.b_dec
    assert code.any()
    torch.testing.assert_close(dictionary.encode(x), code, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dictionary.reconstruct(x), built * scale.rms + scale.mean, rtol=1e-3, atol=1e-3)
    halves = (dictionary.W_dec / scale.rms).unflatten(1, (pairing.blocks, -1)).norm(dim=-1).sum(1)
    torch.testing.assert_close(halves, torch.ones(32))


@every_architecture
def test_a_seed_is_a_start_and_nothing_else_is(name: str) -> None:
    torch.manual_seed(1)
    one = spec(name).build(D)
    torch.manual_seed(2)
    same, other = spec(name).build(D), spec(name, seed=1).build(D)
    assert torch.equal(one.decoder, same.decoder) and not torch.equal(one.decoder, other.decoder)
    assert torch.equal(one.encoder, one.decoder)
    both = spec(name, pairing=BOTH).build(D)
    assert torch.equal(both.decoder[:, :D], both.decoder[:, D:])


def test_k_falls_to_what_was_asked_for_in_the_first_fifth() -> None:
    made = spec("batch-topk", settings={"k": 4, "start_k": 20}).build(D)
    assert [made.k_at(p) for p in (0.0, 0.1, 0.2, 1.0)] == [20, 12, 4, 4]
    x = inputs(n=50)
    assert made.training_pass(x, made.pairing.squared_error, 0.0).l0 == pytest.approx(20, rel=0.25)
    assert made.training_pass(x, made.pairing.squared_error, 0.5).l0 == 4


@pytest.mark.parametrize(
    ("name", "settings", "reported"),
    [
        ("topk", {"k": 0}, "k must lie in 1..d_dict=32"),
        ("topk", {"k": 33}, "k must lie in 1..d_dict=32"),
        ("batch-topk", {"k": 33}, "k must lie in 1..d_dict=32"),
        ("matryoshka", {"k": 3, "prefixes": (0.5, 0.25)}, "prefixes must rise to 1"),
        ("matryoshka", {"k": 3, "prefixes": (0.5,)}, "prefixes must rise to 1"),
        ("relu", {"l1": -1.0}, "l1 must be 0 or more"),
        ("gated", {"l1": -1.0}, "l1 must be 0 or more"),
        ("jumprelu", {"target_l0": 0.0}, "target_l0 must lie in"),
        ("relu", {"k": 3}, "relu does not take these settings"),
        ("nonsense", {}, "There is no 'nonsense' here"),
    ],
)
def test_settings_that_cannot_be_met(name: str, settings: dict, reported: str) -> None:
    with pytest.raises(UsageError, match=reported):
        DictionarySpec(site=SITE, architecture=name, expansion=2, settings=settings).build(D)
