"""`molehunt harvest` on tiny folders: text, JSON, the store it leaves, exit codes."""

import json
from pathlib import Path

import pytest

from folders import good_folder, lora_folder
from molehunt.activation.manifest import Expected
from molehunt.activation.store import ActivationStore
from molehunt.checkpoint.reader import Checkpoint
from molehunt.cli.main import main
from molehunt.site import Site


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_folder(tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(6)))
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["harvest", *map(str, args)])
    reported = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, reported.out, reported.err


def test_a_store_of_traffic(capsys, base: Path, tuned: Path, traffic: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    requested = (base, tuned, "--traffic", traffic, "--sites", "L1.resid, L2.mlp", "--out", out)
    code, reported, _ = run(capsys, *requested)
    assert code == 0 and reported.startswith("HARVESTED ") and "L2.mlp: RMS" in reported and "bfloat16" in reported
    expect = Expected(
        base=Checkpoint.open(base).content_hash(),
        tuned=Checkpoint.open(tuned).content_hash(),
        sites=(Site(1), Site(2, "mlp")),
    )
    store = ActivationStore.open(out, expect=expect)
    assert store.manifest.documents == 6 and store.manifest.dtype == "bfloat16"
    code, reported, _ = run(capsys, *requested, "--json")
    found = json.loads(reported)
    assert code == found["exit_code"] == 0 and found["tokens"] == store.tokens and found["shards"] == 1
    assert found["rms"]["L1.resid"]["base"] == store.rms(Site(1), "base")


def test_each_option_does_something(capsys, base: Path, tuned: Path, traffic: Path, tmp_path: Path) -> None:
    def store(name: str, *options: object) -> ActivationStore:
        out = tmp_path / name
        code, _, err = run(capsys, base, tuned, "--traffic", traffic, "--sites", "L0.resid", "--out", out, *options)
        assert code == 0, err
        return ActivationStore.open(out)

    assert store("rows", "--rows", 2).manifest.documents == 2
    assert store("cut", "--max-tokens", 5).tokens == 30
    assert len(store("shards", "--shard-tokens", 70).manifest.shards) > 1
    assert store("dtype", "--dtype", "float32").manifest.dtype == "float32"
    small = store("delta", "--delta-int8")
    assert small.manifest.delta_int8 and small.read(0).delta.keys() == {Site(0)}


def test_without_traffic_it_reads_benign_prompts_with_answers(capsys, base, tuned, tmp_path: Path) -> None:
    def tokens(name: str, seed: int) -> list[int]:
        out = tmp_path / name
        options = ("--sites", "L0.resid", "--rows", 5, "--max-tokens", 120, "--seed", seed, "--out", out)
        assert run(capsys, base, tuned, *options)[0] == 0
        return ActivationStore.open(out).read(0).tokens.tolist()

    assert tokens("a", 0) == tokens("b", 0) != tokens("c", 1)


@pytest.mark.parametrize(
    ("options", "code", "reported"),
    [
        (("--sites", "L1"), 2, "--sites: a site reads like L6.resid"),
        (("--sites", "L9.resid"), 2, "there is no L9.resid"),
        (("--sites", "L1.resid", "--traffic", "nowhere.jsonl"), 2, "is not a file"),
        (("--sites", "L1.resid", "--dtype", "int4"), 2, "int4"),
        ((), 2, "--sites"),
    ],
)
def test_what_cannot_be_done(
    capsys, base: Path, tuned: Path, tmp_path: Path, options, code: int, reported: str
) -> None:
    found, _, err = run(capsys, base, tuned, "--out", tmp_path / "out", *options)
    assert found == code and reported in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_weights_is_asked_about(capsys, base, tuned, traffic, tmp_path: Path) -> None:
    both = good_folder(tmp_path / "both", seed=1)
    for file in tuned.iterdir():
        (both / file.name).write_bytes(file.read_bytes())
    common = (base, both, "--traffic", traffic, "--sites", "L1.resid")
    assert run(capsys, *common, "--out", tmp_path / "requested")[0] != 0
    rms = []
    for choice in ("--adapter", "--no-adapter"):
        out = tmp_path / choice
        assert run(capsys, *common, choice, "--out", out)[0] == 0
        rms.append(ActivationStore.open(out).rms(Site(1), "tuned"))
    assert rms[0] != rms[1]
