"""A store that lies: every kind of damage is named by file and field, and nothing of it is trained on."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molehunt.activation.harvest import harvest
from molehunt.activation.manifest import Expected, Identity, read_manifest
from molehunt.activation.piece import from_int8, pack, to_int8, unpack
from molehunt.activation.shuffle import batches
from molehunt.activation.store import SHARD_KEY, ActivationStore
from molehunt.errors import InvalidInput, MolehuntError, UsageError
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
IDENTITY = Identity(base="b" * 64, tuned="t" * 64, tokenizer="k" * 64)


def made(path: Path, **options: Any) -> Path:
    pair = ModelPair(tiny_model("llama", 0), tiny_model("llama", 1), tiny_tokenizer())
    rows = prompts(lengths=(9, 5, 17, 30, 12, 20))
    requested = {"sites": (SITE,), "into": path, "identity": IDENTITY, "shard_tokens": 40}
    harvest(pair, rows, **requested | options)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("store") / "good")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "store"))


def shard(folder: Path, i: int = 0) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["shards"][i]["file"]


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    reported = json.loads((folder / "manifest.json").read_text())
    change(reported)
    (folder / "manifest.json").write_text(json.dumps(reported))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *, seal: bool = True) -> None:
    """Change the tensors of the first shard, with a manifest that vouches for the new bytes."""
    path = shard(folder)
    with safe_open(str(path), framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    if seal:
        edit(folder, lambda m: m["shards"][0].update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def use(folder: Path) -> None:
    """Open, and train an epoch."""
    list(batches(ActivationStore.open(folder), SITE, size=8, seed=0, buffer_tokens=32, epochs=1))


def test_a_good_store_is_read_whole_and_in_slices(good: Path) -> None:
    use(good)
    store = ActivationStore.open(good)
    whole = store.read(0)
    part = store.read(0, 3, 11, sites=[SITE])
    assert torch.equal(part.base[SITE], whole.base[SITE][3:11])
    assert torch.equal(part.tuned[SITE], whole.tuned[SITE][3:11])
    assert torch.equal(part.position, whole.position[3:11]) and part.position.dtype == torch.int32
    assert not store.read(0, sites=()).base
    with pytest.raises(UsageError, match=r"L7\.mlp was not harvested; there are L1\.resid"):
        store.read(0, sites=[Site(7, "mlp")])
    with pytest.raises(UsageError, match="was not harvested"):
        store.rms(Site(2), "base")
    with pytest.raises(UsageError, match="was not harvested"):
        batches(store, Site(2), size=8, seed=0, buffer_tokens=32)


def test_a_manifest_survives_the_way_to_the_disk(good: Path) -> None:
    manifest = read_manifest(good)
    assert manifest.to_json() == (good / "manifest.json").read_text()


def test_a_store_may_move(folder: Path, tmp_path: Path) -> None:
    use(folder.rename(tmp_path / "elsewhere"))


def test_bytes_are_compared_once(folder: Path) -> None:
    store = ActivationStore.open(folder)
    store.read(0)
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)
    store.read(0)
    with pytest.raises(InvalidInput, match="sha256"):
        ActivationStore.open(folder).read(0)


def flip(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[len(data) // 2] ^= 4
    shard(folder).write_bytes(data)


def swap(folder: Path) -> None:
    first, second = shard(folder), shard(folder, 1)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def relabel(folder: Path) -> None:
    save_file(load_file(shard(folder)), shard(folder), metadata={SHARD_KEY: "0" * 64})


def stray(folder: Path) -> None:
    shutil.copytree(shard(folder).parent, folder / "units" / ("0" * 64))


def cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def at(tensors: dict[str, torch.Tensor], name: str, value: float) -> None:
    tensors[name][3, 1] = value


def constant(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:1].expand_as(tensors[name]).contiguous()


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shard(f).unlink(), r"activations\.safetensors, field shards\.0\.file: the file is missing"),
    "cut off": (cut, r"activations\.safetensors.*is cut off"),
    "empty": (lambda f: shard(f).write_bytes(b""), r"activations\.safetensors.*0 bytes"),
    "one bit": (flip, r"activations\.safetensors, field shards\.0\.sha256"),
    "two shards swapped": (swap, r"field (tokens|base|document|position|sink|tuned|__metadata__)"),
    "of another harvest": (relabel, r"field __metadata__\.molehunt_shard: it was written as a shard of another"),
    "not listed": (stray, r"manifest\.json, field shards: units/0{64}/activations\.safetensors is in the folder"),
    "NaN": (lambda f: rewrite(f, lambda t: at(t, "base.L1.resid", torch.nan)), r"field base\.L1\.resid: it holds NaN"),
    "infinity": (lambda f: rewrite(f, lambda t: at(t, "tuned.L1.resid", torch.inf)), r"field tuned\.L1\.resid: .*infi"),
    "constant base": (lambda f: rewrite(f, lambda t: constant(t, "base.L1.resid")), r"field base\.L1\.resid: .*same at"),
    "constant tuned": (lambda f: rewrite(f, lambda t: constant(t, "tuned.L1.resid")), r"field tuned\.L1\.resid.*same at"),
    "sinks": (lambda f: rewrite(f, lambda t: t["sink"].logical_not_()), r"field sink: \d+ tokens are sinks"),
    "a tensor too few": (lambda f: rewrite(f, lambda t: t.pop("document")), r"field document: a shard of this store has"),
    "a tensor too many": (
        lambda f: rewrite(f, lambda t: t.update({"base.L0.resid": t["base.L1.resid"].clone()})),
        r"field base\.L0\.resid: it does not belong",
    ),
    "another width": (
        lambda f: rewrite(f, lambda t: t.update({"base.L1.resid": t["base.L1.resid"][:, :-1].contiguous()})),
        r"field base\.L1\.resid: it is BF16 \[\d+, 31\]",
    ),
    "another dtype": (
        lambda f: rewrite(f, lambda t: t.update({"tuned.L1.resid": t["tuned.L1.resid"].half()})),
        r"field tuned\.L1\.resid: it is F16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARDS)
def test_a_bad_shard_is_named_by_file_and_field(folder: Path, kind: str) -> None:
    damage, reported = SHARDS[kind]
    damage(folder)
    with pytest.raises(InvalidInput, match=reported):
        use(folder)


def test_a_shard_that_goes_after_opening(folder: Path) -> None:
    store = ActivationStore.open(folder)
    shard(folder).unlink()
    with pytest.raises(InvalidInput, match="missing"):
        store.read(0)


def test_equal_rows_of_one_and_the_same_token_are_right(folder: Path) -> None:
    def same_token(tensors: dict[str, torch.Tensor]) -> None:
        tensors["tokens"].fill_(7)
        constant(tensors, "base.L1.resid")

    rewrite(folder, same_token)
    use(folder)


def scale_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["scale"]["L1.resid"]["tuned"]


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "molehunt_activations": (lambda m: m.update(molehunt_activations=0), "0 is no format"),
    "dtype": (lambda m: m.update(dtype="float8"), "Input should be"),
    "d_model": (lambda m: m.update(d_model=0), "positive"),
    "documents": (lambda m: m.update(documents=0), "positive"),
    "extra": (lambda m: m.update(extra=1), "Unexpected"),
    "sites": (lambda m: m.update(sites=["L1"]), "a site reads like"),
    "sites ": (lambda m: m.update(sites=["L1.resid", "L1.resid"]), "stands twice"),
    "identity.base": (lambda m: m["identity"].pop("base"), "required"),
    "shards": (lambda m: m.update(shards=[]), "there is none"),
    "shards ": (lambda m: m["shards"].append(m["shards"][0]), "a file stands twice"),
    "shards.0.file": (lambda m: m["shards"][0].update(file="../activations.safetensors"), "no shard of a store"),
    "shards.1.tokens": (lambda m: m["shards"][1].update(sinks=99), "99 of them sinks"),
    "shards.1.tokens ": (lambda m: m["shards"][1].update(tokens=0, sinks=0), "0 tokens"),
    "scale": (lambda m: m["scale"].update({"L0.resid": m["scale"]["L1.resid"]}), "not those of the store"),
    "scale.L1.resid.tuned": (lambda m: m["scale"]["L1.resid"].pop("tuned"), "missing"),
    "scale.L1.resid.tuned.mean": (lambda m: scale_of(m)["mean"].pop(), "31 values at d_model 32"),
    "scale.L1.resid.tuned ": (lambda m: scale_of(m).update(rms=float("nan")), "NaN or infinity"),
    "scale.L1.resid.tuned.count": (lambda m: scale_of(m).update(count=1), "not the number"),
    "scale.L1.resid.tuned.spread": (lambda m: scale_of(m).update(spread=0.0), "same at every token"),
}  # fmt: skip


@pytest.mark.parametrize("field", MANIFESTS)
def test_a_bad_manifest_is_named_by_field(folder: Path, field: str) -> None:
    change, reported = MANIFESTS[field]
    edit(folder, change)
    with pytest.raises(InvalidInput, match=rf"manifest\.json, field {field.strip()}: .*{reported}"):
        ActivationStore.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"3", b"null"])
def test_a_manifest_that_is_no_object(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"manifest\.json, field whole"):
        ActivationStore.open(folder)


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(InvalidInput, match="more than any store needs"):
        ActivationStore.open(folder)


def test_a_later_format_no_store_and_no_folder(folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda m: m.update(molehunt_activations=2))
    with pytest.raises(UsageError, match="has format 2; this version reads 1"):
        ActivationStore.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(InvalidInput, match="has not finished"):
        ActivationStore.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no store"):
        ActivationStore.open(tmp_path / "empty")
    with pytest.raises(UsageError, match="not a folder"):
        ActivationStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("expect", "reported"),
    [
        (Expected(base="x"), "field base: the store has b"),
        (Expected(tuned="x"), "field tuned: the store has t"),
        (Expected(tokenizer="x"), "field tokenizer: the store has k"),
        (Expected(d_model=64), "field d_model: the store has 32, and 64 is needed"),
        (Expected(sites=(SITE, Site(2))), r"field sites: L2\.resid was not harvested; there are L1\.resid"),
    ],
)
def test_a_store_of_other_models_is_refused(good: Path, expect: Expected, reported: str) -> None:
    with pytest.raises(UsageError, match=reported):
        ActivationStore.open(good, expect=expect)


@given(st.data())
def test_no_change_of_a_byte_gets_through(good: Path, data: st.DataObject) -> None:
    path = shard(good)
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed)
        with pytest.raises(MolehuntError):
            use(good)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("delta_int8", [False, True])
def test_pack_and_unpack(tmp_path: Path, delta_int8: bool) -> None:
    store = ActivationStore.open(made(tmp_path, delta_int8=delta_int8))
    tensors = load_file(shard(tmp_path))
    names = {"delta.L1.resid", "delta.L1.resid.scale"} if delta_int8 else {"base.L1.resid", "tuned.L1.resid"}
    assert tensors.keys() == {"tokens", "document", "position", "sink"} | names
    if delta_int8:
        store.read(0)
        rewrite(tmp_path, lambda t: t["delta.L1.resid.scale"].fill_(torch.nan))
        with pytest.raises(InvalidInput, match=r"field delta\.L1\.resid\.scale: it holds NaN"):
            ActivationStore.open(tmp_path).read(0)
    else:
        again = pack(unpack(tensors, [SITE]), "bfloat16", delta_int8=False)
        assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@given(st.integers(0, 20), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_int8_is_off_by_half_a_step(n: int, seed: int, size: float) -> None:
    acts = size * torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    acts[n // 2 :] *= 1e-3
    if n:
        acts[0] = 0
    steps, scale = to_int8(acts)
    off = (from_int8(steps, scale) - acts).abs()
    assert bool((off <= 0.5001 * scale[:, None]).all())
    assert n == 0 or not from_int8(steps, scale)[0].any()
