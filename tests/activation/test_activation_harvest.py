"""A pass of traffic through tiny pairs: to disk and in memory, in one go and interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.activation.batching import padded, plan
from molehunt.activation.harvest import harvest, stream
from molehunt.activation.identity import tokenizer_hash
from molehunt.activation.manifest import Expected, Identity
from molehunt.activation.piece import Piece
from molehunt.activation.scale import Moments
from molehunt.activation.shuffle import batches
from molehunt.activation.store import ActivationStore
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model import pair as pair_module
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from tiny_models import D_MODEL, prompts, tiny_model, tiny_tokenizer, with_lora
from watched_track import WatchedTrack

SITES = (Site(0), Site(2, "mlp"))
IDENTITY = Identity(base="b" * 64, tuned="t" * 64, tokenizer="k" * 64)
LENGTHS = (3, 9, 5, 17, 30, 2, 41, 12, 20, 7)
SIZES = {"shard_tokens": 60, "batch_tokens": 50}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair(tiny_model("llama", 0), tiny_model("llama", 1), tiny_tokenizer())


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return prompts(lengths=LENGTHS)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a: Piece, b: Piece) -> None:
    for name in ("tokens", "document", "position", "sink"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for side in ("base", "tuned", "delta"):
        assert getattr(a, side).keys() == getattr(b, side).keys()
        for site, acts in getattr(a, side).items():
            assert acts.dtype == getattr(b, side)[site].dtype
            assert torch.equal(acts, getattr(b, side)[site])


def by_token(
    pieces: list[Piece], site: Site = SITES[0]
) -> dict[tuple[int, int], tuple[int, torch.Tensor, torch.Tensor]]:
    return {
        (int(p.document[i]), int(p.position[i])): (int(p.tokens[i]), p.base[site][i], p.tuned[site][i])
        for p in pieces
        for i in range(len(p.tokens))
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_stream_is_what_a_store_holds(pair, rows, tmp_path: Path, dtype: str) -> None:
    store = harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, dtype=dtype, **SIZES)
    streamed = list(stream(pair, rows, SITES, dtype=dtype, **SIZES))
    assert len(streamed) == len(store.manifest.shards) > 2
    for kept, passed in zip(store.pieces(), streamed, strict=True):
        same(kept, passed)
        assert str(kept.base[SITES[0]].dtype) == f"torch.{dtype}"
        assert len(kept.tokens) <= 60
    options = {"size": 16, "seed": 1, "buffer_tokens": 40, "epochs": 2}
    from_disk, from_memory = batches(store, SITES[1], **options), batches(streamed, SITES[1], **options)
    for a, b in zip(from_disk, from_memory, strict=True):
        assert torch.equal(a.base, b.base) and torch.equal(a.tuned, b.tuned)


def test_every_token_is_there_once_with_what_the_pair_reads(pair, rows, tmp_path: Path) -> None:
    store = harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, dtype="float32", **SIZES)
    found = by_token(list(store.pieces()))
    assert set(found) == {(d, p) for d, n in enumerate(LENGTHS) for p in range(n)}
    for document, row in enumerate(rows):
        alone = pair.read([row], sites=SITES)
        for position, token in enumerate(row):
            reported, base, tuned = found[document, position]
            assert reported == token
            torch.testing.assert_close(base, alone.base[SITES[0]][0, position], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tuned, alone.tuned[SITES[0]][0, position], rtol=1e-4, atol=1e-5)
    sinks = sum(int(p.sink.sum()) for p in store.pieces())
    assert sinks == store.manifest.sinks >= len(rows)
    assert all(bool(p.sink[p.position == 0].all()) for p in store.pieces())


def test_padding_and_batching_change_nothing_but_rounding(pair, rows) -> None:
    apart = by_token(list(stream(pair, rows, SITES, dtype="float32", batch_tokens=1)))
    together = by_token(list(stream(pair, rows, SITES, dtype="float32", batch_tokens=4096)))
    assert apart.keys() == together.keys()
    for at, (token, base, tuned) in apart.items():
        assert together[at][0] == token
        torch.testing.assert_close(together[at][1], base, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[at][2], tuned, rtol=1e-4, atol=1e-5)


def test_lora_in_one_pass_is_lora_in_two(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_model("llama"), "llama")
    shared = ModelPair(model, model, tiny_tokenizer())
    passes: list[int] = []
    forward = ModelPair._forward
    monkeypatch.setattr(ModelPair, "_forward", lambda self, *args: passes.append(1) or forward(self, *args))
    one = list(stream(shared, rows, SITES, dtype="float32", batch_tokens=200))
    n_one = len(passes)
    monkeypatch.setattr(pair_module, "ONE_PASS_UP_TO", 0)
    two = list(stream(shared, rows, SITES, dtype="float32", batch_tokens=200))
    assert len(passes) - n_one == 2 * n_one
    for a, b in zip(one, two, strict=True):
        for site in SITES:
            torch.testing.assert_close(a.base[site], b.base[site], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.tuned[site], b.tuned[site], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(a.base[site], a.tuned[site])


def test_the_scale_is_that_of_all_tokens_that_are_no_sinks(pair, rows, tmp_path: Path) -> None:
    store = harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, dtype="float32", **SIZES)
    pieces = list(store.pieces())
    content = torch.cat([~p.sink for p in pieces])
    for site in SITES:
        base = torch.cat([p.base[site] for p in pieces])[content]
        tuned = torch.cat([p.tuned[site] for p in pieces])[content]
        for side, acts in (("base", base), ("tuned", tuned), ("delta", tuned - base)):
            one = Moments.of(acts)
            torch.testing.assert_close(store.mean(site, side), one.mean, rtol=1e-9, atol=1e-9)
            assert store.rms(site, side) == pytest.approx(one.rms, rel=1e-9)
            scale = store.manifest.scale[str(site)][side]
            assert scale.spread == pytest.approx(one.spread, rel=1e-9) and scale.count == int(content.sum())


def test_int8_differences_are_off_by_half_a_step_at_most_and_smaller(pair, rows, tmp_path: Path) -> None:
    whole = harvest(pair, rows, sites=SITES, into=tmp_path / "a", identity=IDENTITY, dtype="float32", **SIZES)
    small = harvest(pair, rows, sites=SITES, into=tmp_path / "b", identity=IDENTITY, delta_int8=True, **SIZES)
    assert [s.tokens for s in whole.manifest.shards] == [s.tokens for s in small.manifest.shards]
    for full, alone in zip(whole.pieces(), small.pieces(), strict=True):
        assert not alone.base and not alone.tuned
        for site in SITES:
            exact = full.tuned[site] - full.base[site]
            step = exact.abs().amax(1, keepdim=True) / 127
            assert bool(((alone.delta[site] - exact).abs() <= step * 0.501).all())
    assert small.rms(SITES[0], "base") == whole.rms(SITES[0], "base")
    with pytest.raises(UsageError, match="differences alone"):
        batches(small, SITES[0], size=4, seed=0, buffer_tokens=8)
    options = {"size": 50, "seed": 0, "buffer_tokens": 100, "epochs": 1, "delta_only": True}
    a, b = next(batches(whole, SITES[0], **options)), next(batches(small, SITES[0], **options))
    assert torch.nn.functional.cosine_similarity(a.tuned, b.tuned).min() > 0.999


def test_equal_models_have_no_difference(tmp_path: Path, rows) -> None:
    twins = ModelPair(tiny_model("llama"), tiny_model("llama"), tiny_tokenizer())
    store = harvest(twins, rows, sites=SITES, into=tmp_path, identity=IDENTITY, delta_int8=True, **SIZES)
    assert not any(bool(p.delta[SITES[0]].any()) for p in store.pieces())
    assert store.rms(SITES[0], "delta") == 0


def test_a_second_harvest_reads_nothing_and_leaves_the_same_bytes(pair, rows, tmp_path: Path, monkeypatch) -> None:
    harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ModelPair, "read", lambda *args, **options: pytest.fail("nothing is missing"))
        harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    assert tree(tmp_path) == before
    victim = next(tmp_path.glob("units/*/activations.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    assert tree(tmp_path) == before, "a damaged shard is made again"


def test_an_exception_in_between_loses_one_shard(pair, rows, tmp_path: Path, monkeypatch) -> None:
    harvest(pair, rows, sites=SITES, into=tmp_path / "whole", identity=IDENTITY, **SIZES)
    calls: list[int] = []
    real = ModelPair.read

    def fails_later(self: ModelPair, *args: object, **options: object):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ModelPair, "read", fails_later)
        with pytest.raises(KeyboardInterrupt):
            harvest(pair, rows, sites=SITES, into=tmp_path / "cut", identity=IDENTITY, **SIZES)
    with pytest.raises(InvalidInput, match="has not finished"):
        ActivationStore.open(tmp_path / "cut")
    assert len(list(tmp_path.glob("cut/units/*/activations.safetensors"))) > 0
    harvest(pair, rows, sites=SITES, into=tmp_path / "cut", identity=IDENTITY, **SIZES)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_progress_counts_rows_inside_a_shard_and_those_of_an_earlier_run(
    pair, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = WatchedTrack()
    seen: list[int] = []
    was = pair.read

    def read(*arguments, **named):
        seen.append(track.last.done)
        return was(*arguments, **named)

    monkeypatch.setattr(pair, "read", read)
    store = harvest(pair, rows, sites=SITES, into=tmp_path / "a", identity=IDENTITY, **SIZES, track=track)
    shown = track.last
    assert (shown.what, shown.total, shown.unit, shown.start) == ("harvesting activations", len(rows), "rows", 0)
    assert (shown.done, shown.open) == (len(rows), False)
    assert seen == sorted(seen) and len(set(seen)) == len(seen) > len(store.manifest.shards), "batch by batch"

    rmtree((tmp_path / "a" / store.manifest.shards[0].file).parent)
    first = sum(len(batch.documents) for batch in plan(rows, **SIZES)[0])
    harvest(pair, rows, sites=SITES, into=tmp_path / "a", identity=IDENTITY, **SIZES, track=track)
    assert (track.last.done, track.last.start) == (first, len(rows) - first)

    list(stream(pair, rows, SITES, **SIZES, track=track))
    assert (track.last.what, track.last.done, track.last.unit) == ("reading activations", len(rows), "rows")
    next(stream(pair, rows, SITES, **SIZES, track=track))
    assert not track.last.open, "a stream that is left early closes its track"


WORK = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
sys.path.insert(0, sys.argv[2])
from tiny_models import prompts, tiny_model, tiny_tokenizer
from molehunt.activation.harvest import harvest
from molehunt.activation.manifest import Identity
from molehunt.model.pair import ModelPair
from molehunt.site import Site
pair = ModelPair(tiny_model("llama", 0), tiny_model("llama", 1), tiny_tokenizer())
def slowly(items, what, total=None):
    for item in items:
        print("row", flush=True)
        yield item
        time.sleep(0.005)
identity = Identity(base="b" * 64, tuned="t" * 64, tokenizer="k" * 64)
rows = prompts(lengths=(20,) * 60)
harvest(pair, rows, sites=[Site(1)], into=Path(sys.argv[1]), identity=identity, shard_tokens=40, track=slowly)
"""


def test_kill_9_and_resume_give_the_same_bytes(pair, tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        rows = prompts(lengths=(20,) * 60)
        harvest(pair, rows, sites=[Site(1)], into=folder, identity=IDENTITY, shard_tokens=40)

    work(tmp_path / "whole")
    shards = []
    for begun, moment in ((7, 0.003), (13, 0.012)):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK, tmp_path / "cut", Path(__file__).parents[1], str(torch.get_num_threads())],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(begun)] == ["row\n"] * begun
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "cut" / "manifest.json").exists()
        shards.append({p.name for p in tmp_path.glob("cut/units/*") if len(p.name) == 64})
    assert shards[0] < shards[1], "the second process took up what the first had finished"
    work(tmp_path / "cut")
    left = {name: data for name, data in tree(tmp_path / "cut").items() if not name.endswith(".lock")}
    assert left == tree(tmp_path / "whole")
    assert ActivationStore.open(tmp_path / "cut").tokens == 1200


def test_a_folder_of_another_harvest_is_left_alone(pair, rows, tmp_path: Path) -> None:
    harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    before = tree(tmp_path)
    for change in ({"sites": SITES[:1]}, {"dtype": "float32"}, {"delta_int8": True}, {"shard_tokens": 61}):
        with pytest.raises(UsageError, match=next(iter(change))):
            harvest(pair, rows, **{"sites": SITES, "into": tmp_path, "identity": IDENTITY, **SIZES} | change)
    with pytest.raises(UsageError, match="rows"):
        harvest(pair, rows[1:], sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": "float32", "delta_int8": True}, "dtype float32 does not apply"),
        ({"sites": ()}, "at least one site"),
        ({"sites": (SITES[0], SITES[0])}, "none twice"),
        ({"sites": (Site(3),)}, "there is no L3.resid; the models have blocks L0 to L2"),
        ({"rows": []}, "no rows"),
        ({"rows": [[5], []]}, "row 2 of the traffic has no tokens"),
        ({"rows": [[5, 96]]}, "row 1 of the traffic has token ids outside 0 to 95"),
        ({"rows": [[5] * 257]}, "257 tokens; the models read 256 at most"),
    ],
)
def test_what_cannot_be_harvested_is_said_before_anything_is_written(pair, rows, tmp_path, changed, reported) -> None:
    requested = {"rows": rows, "sites": SITES, "into": tmp_path / "out", "identity": IDENTITY} | changed
    with pytest.raises(UsageError, match=reported):
        harvest(pair, requested.pop("rows"), **requested)
    assert not (tmp_path / "out").exists()


def test_damaged_and_dead_models_are_named(rows, tmp_path: Path) -> None:
    broken = tiny_model("llama", 1)
    with torch.no_grad():
        broken.get_parameter("model.embed_tokens.weight")[rows[3][0]] = torch.nan
    pair = ModelPair(tiny_model("llama"), broken, tiny_tokenizer())
    with pytest.raises(InvalidInput, match=r"tuned\.L0\.resid: the tuned model gives NaN or infinity in row \d+"):
        harvest(pair, rows, sites=SITES, into=tmp_path / "nan", identity=IDENTITY)
    dead = tiny_model("llama", 1)
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
    pair = ModelPair(dead, tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(InvalidInput, match=r"base\.L0\.resid: the base model's activations are the same"):
        harvest(pair, rows, sites=SITES, into=tmp_path / "dead", identity=IDENTITY)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_values_that_a_dtype_cannot_hold(rows, tmp_path: Path) -> None:
    large = tiny_model("llama", 1)
    with torch.no_grad():
        large.get_parameter("model.embed_tokens.weight").mul_(1e7)
    pair = ModelPair(tiny_model("llama"), large, tiny_tokenizer())
    with pytest.raises(UsageError, match=r"tuned\.L0\.resid holds values that float16 cannot"):
        harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, dtype="float16")
    next(stream(pair, rows, SITES))


def test_traffic_of_sinks_alone(pair, tmp_path: Path) -> None:
    with pytest.raises(NotTestable, match="fewer than two tokens"):
        harvest(pair, [[5], [6], [7]], sites=SITES, into=tmp_path, identity=IDENTITY)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=40)
def test_a_plan_holds_each_row_once_within_its_sizes(lengths: list[int], shard_tokens: int, batch_tokens: int) -> None:
    rows = [[1] * n for n in lengths]
    shards = plan(rows, shard_tokens=shard_tokens, batch_tokens=batch_tokens)
    documents = [d for shard in shards for batch in shard for d in batch.documents]
    assert sorted(documents) == list(range(len(rows)))
    for shard in shards:
        tokens = sum(lengths[d] for batch in shard for d in batch.documents)
        assert tokens <= shard_tokens or len(shard) == len(shard[0].documents) == 1
        for batch in shard:
            assert all(lengths[d] <= batch.width for d in batch.documents)
            assert len(batch.documents) == 1 or batch.width * len(batch.documents) <= batch_tokens


def test_padded_lengths_are_few() -> None:
    assert [padded(n) for n in (1, 16, 17, 25, 33, 49, 65)] == [16, 16, 24, 32, 48, 64, 96]
    assert len({padded(n) for n in range(1, 4097)}) == 17
    (shard,) = plan([[1] * 90], shard_tokens=100, batch_tokens=100, longest=92)
    assert shard[0].width == 92
    with pytest.raises(ValueError, match="positive"):
        plan([[1]], shard_tokens=0, batch_tokens=1)


def test_a_tokenizer_is_named_by_what_decides_ids() -> None:
    import copy

    tokenizer = tiny_tokenizer()
    name = tokenizer_hash(tokenizer)
    assert name == tokenizer_hash(copy.deepcopy(tokenizer))
    padded_once = copy.deepcopy(tokenizer)
    padded_once(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(padded_once) == name
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(other) != name

    class Slow:
        def __init__(self, **vocabulary: int) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    raw = getattr(tokenizer_hash, "__wrapped__", tokenizer_hash)
    assert raw(Slow(a=1, b=2)) == raw(Slow(b=2, a=1)) != raw(Slow(a=2, b=1))


def test_the_manifest_names_models_and_sizes(pair, rows, tmp_path: Path) -> None:
    store = harvest(pair, rows, sites=SITES, into=tmp_path, identity=IDENTITY, **SIZES)
    reported = json.loads((tmp_path / "manifest.json").read_text())
    assert reported["identity"] == {"base": "b" * 64, "tuned": "t" * 64, "tokenizer": "k" * 64}
    assert reported["d_model"] == D_MODEL == store.d_model and reported["documents"] == len(rows)
    assert sum(s["tokens"] for s in reported["shards"]) == sum(LENGTHS) == store.tokens
    expect = Expected(base="b" * 64, tuned="t" * 64, tokenizer="k" * 64, d_model=D_MODEL, sites=SITES)
    assert ActivationStore.open(tmp_path, expect=expect).sites == SITES
