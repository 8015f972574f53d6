"""Many trainings in one pass: each as if alone, resumed to the same bits, and reported what is wrong."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, Trained, TrainingConfig, train_dictionaries
from molehunt.dictionary.trainee import InputScale
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.site import Site
from planted_atoms import Planted

HERE, THERE = Site(1), Site(2, "mlp")
PLANTED = Planted.of(d=8, atoms=10)
BATCHES = {HERE: PLANTED.batches(24, n=64), THERE: PLANTED.batches(24, n=64, seed=1)}
CONFIG = TrainingConfig(steps=24, batch=64, checkpoint_every=7)
BOTH = Pairing(kind="both", exclusive=0.25)


def spec(architecture: str = "topk", site: Site = HERE, **reported) -> DictionarySpec:
    few = {"relu": {}, "gated": {}, "jumprelu": {"target_l0": 2.0}}.get(architecture, {"k": 2})
    return DictionarySpec(**{"site": site, "architecture": architecture, "expansion": 2, "settings": few, **reported})


EVERY = [spec(name, site, pairing=BOTH) for name, site in zip(CATALOG, [HERE, THERE] * 3, strict=True)]


def train(specs: list[DictionarySpec], *, config: TrainingConfig = CONFIG, batches=None, **reported) -> list[Trained]:
    return train_dictionaries(specs, batches or BATCHES, config, d_model=8, **reported)


def tensors(dictionary: Dictionary) -> dict[str, torch.Tensor]:
    reported = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return reported | {k: v for k, v in vars(dictionary.nonlinearity).items() if isinstance(v, torch.Tensor)}


def same(one: Trained, other: Trained) -> bool:
    a, b = tensors(one.dictionary), tensors(other.dictionary)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and one.history == other.history


def test_many_at_once_are_as_one_by_one() -> None:
    together = train(EVERY)
    assert all(same(one, train([one.spec])[0]) for one in together)
    first = together[0].dictionary
    assert first.site == HERE and first.pairing == BOTH
    assert first.meta["family"] == "molehunt" and first.meta["spec"] == EVERY[0].to_json()


def test_exclusive_latents_stay_with_their_model() -> None:
    for one in train(EVERY):
        W_enc, W_dec = one.dictionary.W_enc.T, one.dictionary.W_dec
        for weights in (W_enc, W_dec):
            assert not weights[:4, 8:].any() and not weights[4:8, :8].any()
            assert weights[:4, :8].any() and weights[4:8, 8:].any()


def test_seeds_differ_and_equal_ones_do_not() -> None:
    one, other, again = train([spec(seed=0), spec(seed=1), spec(seed=0)])
    assert same(one, again) and not same(one, other)


class Killed(Exception):
    pass


def killed(after: int) -> Callable[..., Iterator]:
    def track(items: Iterable, what: str, total: int | None = None) -> Iterator:
        for i, item in enumerate(items):
            if i == after:
                raise Killed
            yield item

    return track


@pytest.mark.parametrize("after", [[3], [7], [8, 2, 9]])
def test_a_killed_training_resumes_to_the_same_bits(after: list[int], tmp_path: Path) -> None:
    # long enough that k has settled, the threshold is tracked and latents have died
    whole, file = train(EVERY), tmp_path / "runs" / "checkpoint.safetensors"
    for steps in after:
        with pytest.raises(Killed):
            train(EVERY, checkpoint=file, track=killed(steps))
    assert file.exists() == (after != [3])
    requested: list[int] = []

    def rest(site: Site) -> Callable[[int], Iterable[PairBatch]]:
        def of(skip: int) -> Iterable[PairBatch]:
            requested.append(skip)
            return BATCHES[site][skip:]

        return of

    resumed = train(EVERY, checkpoint=file, batches={site: rest(site) for site in BATCHES})
    assert all(same(one, other) for one, other in zip(whole, resumed, strict=True))
    assert requested == [{1: 0 if after == [3] else 7, 3: 14}[len(after)]] * 2
    assert list(file.parent.iterdir()) == [] if file.parent.exists() else True


def test_a_checkpoint_of_other_settings_or_none_at_all(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train([spec()], checkpoint=file, track=killed(8))
    with pytest.raises(UsageError, match="a checkpoint of other dictionaries or settings"):
        train([spec(seed=3)], checkpoint=file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InvalidInput, match="cannot be read as a checkpoint"):
        train([spec()], checkpoint=file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="a checkpoint of other dictionaries or settings"):
        train([spec()], checkpoint=file)


def test_dead_latents_are_counted_and_revived() -> None:
    batches = {HERE: PLANTED.batches(60, n=64)}
    (one,) = train([spec(expansion=8, settings={"k": 1})], config=TrainingConfig(steps=60, batch=64), batches=batches)
    assert any(row["dead"] > 0 for row in one.history) and any("dead latents" in row for row in one.history)


def test_bf16_products_train(tmp_path: Path) -> None:
    config = TrainingConfig(steps=24, batch=64, autocast=True)
    for one in train(EVERY, config=config):
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors(one.dictionary).values())


def test_with_one_step_the_threshold_is_that_of_its_batch() -> None:
    (one,) = train([spec("batch-topk", settings={"k": 2, "start_k": 2})], config=TrainingConfig(steps=1, batch=64))
    x = one.spec.pairing.input(BATCHES[HERE][0].base, BATCHES[HERE][0].tuned)
    assert float((one.dictionary.encode(x) > 0).sum(1).float().mean()) == pytest.approx(2, rel=0.3)


def test_scale_is_one_a_model_and_one_for_both_where_errors_are_subtracted() -> None:
    loud = [PairBatch(10 * b.base, b.tuned) for b in BATCHES[HERE]]
    x = torch.cat([loud[0].base, loud[0].tuned], 1)
    scale = InputScale.of(x, 2)
    parts = scale(x).unflatten(1, (2, -1)).square().mean((0, 2))
    torch.testing.assert_close(parts, torch.ones(2))
    assert scale.rms[0] != scale.rms[-1] and scale.rms[:8].unique().numel() == 1
    (one,) = train([spec(pairing=Pairing(kind="both", joint=-1.0))], batches={HERE: loud})
    dictionary = one.dictionary
    error = x - dictionary.reconstruct(x)
    reported = one.spec.pairing.squared_error(error)
    torch.testing.assert_close(reported, (error[:, 8:] - error[:, :8]).square().sum(1), rtol=1e-3, atol=1e-3)
    assert one.history[0]["reconstruction"] == pytest.approx(
        float(Pairing(kind="difference").squared_error(first_error(one, x)).mean()) / 16, rel=1e-3
    )


def first_error(one: Trained, x: torch.Tensor) -> torch.Tensor:
    """Of the difference, before any step, in the training's units: one scale for both models."""
    scale = InputScale.of(x, 1)
    start = one.spec.build(8).eval()
    with torch.no_grad():
        error = x - start.finished(scale).reconstruct(x)
    return (error[:, 8:] - error[:, :8]) / scale.rms[0]


def bad(value: float) -> list[PairBatch]:
    batches = PLANTED.batches(2, n=8)
    batches[1].tuned[3, 4] = value
    return batches


@pytest.mark.parametrize(
    ("specs", "batches", "error", "reported"),
    [
        ([], BATCHES, UsageError, "no dictionary was requested"),
        ([spec(site=Site(5))], BATCHES, UsageError, "no activations of L5.resid; there are L1.resid, L2.mlp"),
        ([spec()], {HERE: BATCHES[HERE][:3]}, UsageError, "ran out at step 3 of 24"),
        ([spec()], {HERE: Planted.of(d=9).batches(1, n=8)}, UsageError, "are 9 wide; the dictionary was made for 8"),
        ([spec()], {HERE: [PairBatch(torch.ones(4, 8), torch.ones(4, 8))]}, UsageError, "do not vary"),
        ([spec()], {HERE: bad(float("nan"))}, InvalidInput, "NaN or infinity .* in batch 1"),
        ([spec()], {HERE: bad(float("inf"))}, InvalidInput, "NaN or infinity .* in batch 1"),
        ([spec(lr=1e30)], BATCHES, NotTestable, "diverged by step"),
        ([spec(settings={"k": 17})], BATCHES, UsageError, "k must lie in 1..d_dict=16"),
        ([spec(settings={"depth": 2})], BATCHES, UsageError, "topk does not take these settings"),
    ],
)
def test_what_cannot_be_trained(specs: list[DictionarySpec], batches, error: type[Exception], reported: str) -> None:
    with pytest.raises(error, match=reported):
        train_dictionaries(specs, batches, CONFIG, d_model=8)


def test_settings_out_of_range() -> None:
    with pytest.raises(UsageError, match="expansion must be 1 or more"):
        spec(expansion=0)
    for reported in ({"steps": 0}, {"steps": 1, "batch": 0}):
        with pytest.raises(UsageError, match="steps and batch of 1 or more"):
            TrainingConfig(**reported)


def test_names_tell_specs_apart() -> None:
    reported = [
        spec(),
        spec(seed=1),
        spec(site=THERE),
        spec(settings={"k": 3}),
        spec(expansion=4),
        spec("relu"),
        spec(pairing=Pairing(kind="both")),
        spec(pairing=Pairing(kind="both", joint=-0.5)),
        spec(pairing=BOTH),
    ]
    assert len({one.name for one in reported}) == len(reported)
    assert spec().name == "topk-difference-L1.resid-2x-k2-s0"
