"""`molehunt.transfer`: every map of the catalogue, plugins, and vectors that are carried."""

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

import molehunt as mh
from changed_folders import base_and_tuned
from molehunt.cli.main import main
from molehunt.errors import UsageError
from molehunt.run import catalog as plugins
from molehunt.steer.vector import VectorFacts
from molehunt.transfer.catalog import CATALOG
from molehunt.transfer.collect import PairActs
from molehunt.transfer.fidelity import ablation_at
from molehunt.transfer.method import FromActivations, FromMoments, map_method
from molehunt.transfer.saved import FittedMap, load_map
from molehunt.transfer.statistics import PairMoments
from molehunt.transfer.trained import affine
from molehunt.workflows.result import WorkflowResult
from molehunt.workflows.transfer import TransferResult, carry

TEXTS = [
    f"Name {a} things that a {b} needs on day {i}."
    for i, (a, b) in enumerate(zip("abcdefgh" * 15, "stuvwxyz" * 15, strict=True))
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a fine-tune that changed every weight a little."""
    return base_and_tuned(tmp_path_factory.mktemp("carried"))


@pytest.fixture(scope="module")
def vector(here: Path) -> mh.SteeringVector:
    pair = mh.ModelPair.load(here / "base", here / "tuned")
    return mh.steer(pair, positive=TEXTS[:20], negative=TEXTS[20:40], layer=1).vector


def fitted(here: Path, **options: object) -> TransferResult:
    return mh.transfer(here / "tuned", here / "base", texts=TEXTS, **{"from_layer": 1, "to_layer": 1, **options})


def test_a_vector_chooses_the_block_and_is_carried_as_from_disk(
    here: Path, vector: mh.SteeringVector, tmp_path: Path
) -> None:
    found = mh.transfer(here / "tuned", here / "base", texts=TEXTS, vector=vector, out=tmp_path / "map")
    assert isinstance(found, WorkflowResult) and found.map.source == mh.Site(1) and len(found.fitted.grid.pairs) == 3
    assert found.vector is not None and found.vector.facts.n_layers == 3
    assert sorted(path.name for path in (tmp_path / "map").iterdir()) == [
        "map.safetensors", "moments.safetensors", "transfer.json", "vector.safetensors",
    ]  # fmt: skip
    (layer,) = found.vector.vectors
    for again in (
        found.carry(vector),
        carry(tmp_path / "map", vector),
        carry(tmp_path / "map", vector.save(tmp_path / "v")),
    ):
        assert again.facts == found.vector.facts and again.vectors[layer].equal(found.vector.vectors[layer])
    numbers = json.loads((tmp_path / "map" / "transfer.json").read_text())
    assert numbers == json.loads(json.dumps(found.to_dict())) and numbers["target"] == f"L{layer}.resid"
    assert set(found.fitted.fidelity) == {"map", "shuffled", ablation_at(found.map.target)}
    assert repr(found).startswith("TransferResult(L1.resid to L") and "\n" not in repr(found)
    assert repr(found)[len("TransferResult(") : -1] in found.summary()
    assert "held-out FVU" in found.summary() and found.summary().splitlines()[0] in found._repr_html_()


def test_a_loaded_pair_stands_for_its_fine_tune(here: Path, vector: mh.SteeringVector) -> None:
    pair = mh.ModelPair.load(here / "base", here / "tuned")
    by_pair = mh.transfer(pair, here / "base", texts=TEXTS, from_layer=1, to_layer=1)
    by_path = fitted(here)
    assert by_pair.to_dict() == by_path.to_dict() and by_pair.map.facts == by_path.map.facts
    with pytest.raises(UsageError, match="holds its base"):
        mh.transfer(pair, here / "base", texts=TEXTS, source_base=here / "base")


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_every_map_of_the_catalogue_can_be_fitted_and_says_how_faithful_it_is(
    name: str, here: Path, vector: mh.SteeringVector, tmp_path: Path
) -> None:
    found = fitted(here, map=name, out=tmp_path / "map")
    saved = load_map(tmp_path / "map" / "map.safetensors")
    assert type(saved) is type(found.map) and saved.facts == found.map.facts
    assert found.map.facts.models.source and found.map.facts.models.target
    recovered = {of: one.ce_recovered().estimate for of, one in found.fitted.fidelity.items()}
    if name in ("ridge", "reduced-rank", "procrustes", "identity", "random-features"):
        assert recovered["map"] > recovered["shuffled"] and found.fitted.fvu < 0.5
    if name in ("autoencoder", "random-features"):
        with pytest.raises(UsageError, match=r"affine map alone.*\n.*--map ridge"):
            carry(tmp_path / "map", vector)
    else:
        assert carry(tmp_path / "map", vector).facts.model == found.map.facts.models.target


def test_what_a_map_is_fitted_on_is_what_its_function_takes() -> None:
    from_activations = {name for name in CATALOG if isinstance(map_method(name), FromActivations)}
    assert from_activations == {"affine", "autoencoder", "random-features"}
    assert all(isinstance(map_method(name), FromMoments) for name in {*CATALOG} - from_activations)


def test_an_unknown_map_lists_the_known_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="Did you mean ridge"):
        fitted(here, map="rigde")
    with pytest.raises(SystemExit) as left:
        main(["transfer", "fit", str(here / "tuned"), str(here / "base"), "--out", "x", "--map", "nonsense"])
    message = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and all(name in message for name in CATALOG)


def plugin_of_activations(fit: PairActs, held_out: PairActs) -> FittedMap:
    return affine(fit, held_out)


def plugin_of_moments(fit: PairMoments, held_out: PairMoments) -> FittedMap:
    return fit.map(torch.ones(fit.cross.shape), "all ones")


def plugin_of_nothing(fit: object, held_out: object) -> None: ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """Maps of another package, as entry points."""
    points = [
        EntryPoint(name=f"of-{what}", value=f"{__name__}:plugin_of_{what}", group="molehunt.maps")
        for what in ("activations", "moments", "nothing")
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints(points).select(group=group))
    return "of-moments"


def test_a_plugin_is_fitted_by_its_name(plugin: str, here: Path) -> None:
    found = fitted(here, map=plugin)
    assert found.map.facts.method == "all ones" and found.fitted.fvu > 1
    assert fitted(here, map="of-activations").map.facts.method == "affine by AdamW"
    with pytest.raises(UsageError, match="does not say what it is fitted on"):
        fitted(here, map="of-nothing")


def test_a_vector_of_another_block_is_refused_with_the_layer_that_fits(here: Path) -> None:
    found = fitted(here)
    facts = VectorFacts(method="given", n_layers=3, d_model=32)
    other = mh.SteeringVector({2: torch.ones(32)}, facts)
    with pytest.raises(UsageError, match=r"the vector is of L2.resid(.|\n)*--from-layer 2`"):
        found.carry(other)
    several = mh.SteeringVector({0: torch.ones(32), 2: torch.ones(32)}, facts)
    with pytest.raises(UsageError, match="--from-layer N`, where N is 0 or 2"):
        found.carry(several)
    wide = mh.SteeringVector({1: torch.ones(8)}, VectorFacts(method="given", n_layers=3, d_model=8))
    with pytest.raises(UsageError, match="from the model that the vector was fitted to"):
        found.carry(wide)
