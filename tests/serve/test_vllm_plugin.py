"""The watch inside vLLM: on a stand-in of its blocks, runner and worker, and on vLLM itself where it is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import molehunt
from folders import good_folder
from guarded import FPR, clean_rows
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import CannotTap, InvalidInput, NotTestable, UsageError
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.roles import roled_prompt
from molehunt.serve.packed import Chunk, packed_columns, summed
from molehunt.serve.vllm_plugin import (
    REQUIRED,
    RunnerWatch,
    WatchExtension,
    features_of,
    read_directions,
    save_directions,
    write_directions,
)
from molehunt.site import Site
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.columns import watched
from molehunt.watch.state import WatchState
from packed_llama import ANSWERS, PROMPTS, TEXTS, Block, PackedLlama, Runner, schedule
from tiny_models import hooks, prompts, tiny_model, tiny_tokenizer
from watched_banks import bank_of


def config(**changed: object) -> SimpleNamespace:
    """What vLLM's config says where it can be watched, but for what is changed."""
    reported = SimpleNamespace()
    for path, wanted, _ in REQUIRED:
        *parents, name = path.split(".")
        at = reported
        for parent in parents:
            if not hasattr(at, parent):
                setattr(at, parent, SimpleNamespace())
            at = getattr(at, parent)
        setattr(at, name, changed.get(path.replace(".", "_"), wanted))
    return reported


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", 1)


def watch(model: Any, bank: Bank, calibrated_state: WatchState, *, v2: bool = False) -> tuple[Runner, RunnerWatch]:
    runner = Runner(PackedLlama(model), TEXTS, v2=v2)
    return runner, RunnerWatch(runner, bank, calibrated_state, fpr=FPR)


@torch.inference_mode()
def reported(runner: Runner, following: RunnerWatch, steps: Iterator[Any]) -> dict[str, dict[str, Any]]:
    for scheduled in steps:
        runner.execute_model(scheduled, None)
    return {one["request"]: one for one in (verdict.to_dict() for verdict in following.watch.verdicts())}


@pytest.mark.parametrize("v2", [False, True])
def test_columns_of_packed_chunks_are_those_of_hugging_faces_forward_pass(model: Any, bank: Bank, v2: bool) -> None:
    packed = PackedLlama(model.double())  # in fp32 the two attentions alone round apart by more
    before = hooks(packed)
    runner = Runner(packed, TEXTS, v2=v2)
    got: dict[str, list[Tensor]] = {name: [] for name in TEXTS}
    most = 0
    with torch.inference_mode(), packed_columns(packed, bank) as columns:
        for scheduled in schedule():
            runner.execute_model(scheduled)
            taken = columns.take(sum(scheduled.num_scheduled_tokens.values()))
            most = max(most, len(packed.packed))
            if taken is None:
                assert not scheduled.num_scheduled_tokens
                continue
            for (name, _, _), rows in zip(packed.packed, taken.split([n for _, _, n in packed.packed]), strict=True):
                got[name].append(rows)
    assert most == 4 and len(got["long-1"]) > 5, "several requests in a step, and a prompt in chunks"
    assert hooks(packed) == before
    with torch.inference_mode(), watched(model, bank) as expected:
        for name, text in TEXTS.items():
            model(torch.tensor([text]))
            torch.testing.assert_close(torch.cat(got[name]), expected.take()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v2", [False, True])
def test_verdicts_are_those_of_a_teacher_forced_pass(
    model: Any, bank: Bank, calibrated_state: WatchState, v2: bool
) -> None:
    runner, following = watch(model, bank, calibrated_state, v2=v2)
    found = reported(runner, following, schedule())
    profiles = answer_profiles(model, bank, list(PROMPTS.values()), list(ANSWERS.values()))
    for name, profile in zip(PROMPTS, profiles, strict=True):
        judged = calibrated_state.monitor.judge(profile)
        one = found[name]
        assert one["coverage"] == 1 and one["finished"]
        assert one["score"] == pytest.approx(judged.score, abs=1e-3)
        assert one["status"] == ("flagged" if judged.score > calibrated_state.monitor.threshold else "not flagged")
        assert one["p_value"] == pytest.approx(judged.p_value, abs=0.01)
        assert one["direction"] == bank.direction(judged.columns[0]).name
        assert one["token"] == int(profile.peaks[judged.columns[0]]) + len(PROMPTS[name]) - 1
    assert json.loads(json.dumps(found)) == found
    following.watch.end(["a stranger"])
    assert following.watch.verdicts() == [], "collected once"


def test_a_verdict_can_be_asked_for_while_a_request_runs(model: Any, bank: Bank, calibrated_state: WatchState) -> None:
    runner, following = watch(model, bank, calibrated_state)
    steps = schedule(99)
    with torch.inference_mode():
        for _ in range(3):
            runner.execute_model(next(steps))
    (so_far,) = answer_profiles(model, bank, [PROMPTS["short-0"]], [ANSWERS["short-0"][:3]])
    (one, *_) = following.watch.verdicts()
    assert not one.finished and one.verdict.coverage == 1
    assert one.verdict.score == pytest.approx(calibrated_state.monitor.judge(so_far).score, abs=1e-3)
    assert reported(runner, following, steps)["short-0"]["finished"]


def test_what_a_prefix_cache_skips_leaves_a_request_unmonitored(
    model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    runner, following = watch(model, bank, calibrated_state)
    kept = reported(*watch(model, bank, calibrated_state), schedule())["long-1"]
    with torch.inference_mode():  # what was cached, was computed at some time
        runner.model.packed[:] = [("long-1", 0, 4)]
        runner.model(input_ids=torch.tensor(TEXTS["long-1"][:4]), positions=torch.arange(4))
    found = reported(runner, following, schedule(cached={"long-1": 4}))
    one = found.pop("long-1")
    assert one["status"] == "unmonitored" and one["flagged"]
    assert one["coverage"] == pytest.approx((len(TEXTS["long-1"]) - 4) / len(TEXTS["long-1"]))
    assert one["score"] == pytest.approx(kept["score"], abs=1e-3), "and yet its answer was seen"
    assert {other["coverage"] for other in found.values()} == {1}


def test_a_preempted_request_is_judged_as_if_it_had_not_been(
    model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    plain = reported(*watch(model, bank, calibrated_state), schedule())
    again = reported(*watch(model, bank, calibrated_state), schedule(preempt="short-0"))
    assert again["short-0"]["coverage"] == 1
    for name, one in again.items():
        assert one["score"] == pytest.approx(plain[name]["score"], abs=1e-3) and one["token"] == plain[name]["token"]


def test_requests_from_before_the_watch_and_without_token_ids_are_unmonitored(
    model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    runner, following = watch(model, bank, calibrated_state)
    steps = list(schedule())
    early, (late,) = steps[0], [new for one in steps for new in one.scheduled_new_reqs if new.req_id == "late-3"]
    early.scheduled_new_reqs, late.prompt_token_ids = [], None
    early.scheduled_cached_reqs = SimpleNamespace(req_ids=["short-0"], num_computed_tokens=[0])
    found = reported(runner, following, iter(steps))
    for name in ("short-0", "late-3"):
        assert found[name]["status"] == "unmonitored" and found[name]["coverage"] == 0
        assert found[name]["score"] is None and found[name]["flagged"]
    assert found["long-1"]["coverage"] == 1


def test_nan_is_no_score(model: Any, bank: Bank, calibrated_state: WatchState) -> None:
    runner, following = watch(model, bank, calibrated_state)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(torch.nan)
    assert {(one["status"], one["coverage"]) for one in reported(runner, following, schedule()).values()} == {
        ("unmonitored", 0.0)
    }


class Swapped(Runner):
    """Tells another order than it packed."""

    def execute_model(self, scheduled: Any, intermediate_tensors: None = None, dummy_run: bool = False) -> None:
        super().execute_model(scheduled)
        self.input_batch.req_ids = self.input_batch.req_ids[::-1]


class Halved(Runner):
    """Runs each step in two halves, as with overlapped batches."""

    def execute_model(self, scheduled: Any, intermediate_tensors: None = None, dummy_run: bool = False) -> None:
        super().execute_model(scheduled)
        if scheduled.num_scheduled_tokens:
            super().execute_model(scheduled)


class Spatial(Runner):
    """Gives each token three positions, as in images."""

    axes = 3


@pytest.mark.parametrize("kind", [Swapped, Halved, Spatial])
def test_steps_that_cannot_be_told_apart_are_not_judged(
    model: Any, bank: Bank, calibrated_state: WatchState, kind: type[Runner], caplog: pytest.LogCaptureFixture
) -> None:
    runner = kind(PackedLlama(model), TEXTS)
    found = reported(runner, RunnerWatch(runner, bank, calibrated_state, fpr=FPR), schedule())
    assert len(found) == len(TEXTS) and any(one["coverage"] < 1 for one in found.values())
    assert all(one["status"] == "unmonitored" and one["flagged"] for one in found.values() if one["coverage"] < 1)
    assert len([line for line in caplog.records if "unmonitored" in line.message]) == 1
    if kind is not Swapped:  # where one request has a step to itself, no order is wrong
        assert {one["coverage"] for one in found.values()} == {0}


def test_a_place_that_is_not_reached_leaves_everybody_unmonitored(
    model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    runner, following = watch(model, bank, calibrated_state)
    packed = runner.model
    packed.model.layers[1] = Block(model.model.layers[1], model.model.rotary_emb, packed.packed)  # nobody hooked it
    assert {one["coverage"] for one in reported(runner, following, schedule()).values()} == {0}


def test_the_order_of_the_chunks_is_held_to_what_the_model_was_given(
    model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    _, following = watch(model, bank, calibrated_state)
    given = {"input_ids": torch.tensor([7, 8, 9, 0]), "positions": torch.tensor([0, 1, 5, 0])}
    chunks = [Chunk(request="a", start=0, tokens=2), Chunk(request="b", start=5, tokens=1)]
    following._given = given
    assert following._in_order(chunks, {"a": [7, 8, 99]})
    assert not following._in_order(chunks[::-1], {}), "by their positions"
    assert not following._in_order(chunks, {"a": [7, 9]}), "by a new prompt's tokens"
    assert not following._in_order([*chunks, Chunk(request="c", start=0, tokens=2)], {}), "fewer tokens than scheduled"
    for name in given:
        following._given = given | {name: None}
        assert not following._in_order(chunks, {})


def test_dummy_runs_are_of_nobody(model: Any, bank: Bank, calibrated_state: WatchState) -> None:
    runner, following = watch(model, bank, calibrated_state)
    with torch.inference_mode():
        runner.execute_model(next(schedule()), dummy_run=True)
    assert following.watch.verdicts() == []


class Worker(WatchExtension):
    """What vLLM makes of its worker and the extension."""

    def __init__(self, served: Path, model: Any, **changed: object) -> None:
        self.vllm_config = config(**changed)
        self.vllm_config.model_config.model = str(served)
        self.model_runner = Runner(PackedLlama(model), TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("served") / "tuned", seed=1)


@pytest.fixture
def kept(folder: Path, bank: Bank, calibrated_state: WatchState, tmp_path: Path) -> tuple[str, str]:
    """Files with the directions, and with the state as a server would have written it."""
    identity = {
        "base model": "another",
        "tuned model": Checkpoint.open(folder).content_hash(),
        "set of directions": bank.sha256(),
        "false-alarm rate": f"{FPR:g}",
    }
    save_directions(bank, tmp_path / "directions.safetensors")
    replace(calibrated_state, identity=identity).save(tmp_path / "state.safetensors")
    return str(tmp_path / "directions.safetensors"), str(tmp_path / "state.safetensors")


def test_a_worker_is_watched_from_two_files_until_it_is_told_to_stop(
    folder: Path, kept: tuple[str, str], model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    worker = Worker(folder, model)
    before = hooks(worker.model_runner.model)
    with pytest.raises(UsageError, match="not watched"):
        worker.molehunt_verdicts()
    assert worker.molehunt_watch(*kept, FPR) == {
        "directions": len(bank.names),
        "threshold": calibrated_state.monitor.threshold,
    }
    with pytest.raises(UsageError, match="already"):
        worker.molehunt_watch(*kept, FPR)
    with torch.inference_mode():
        for scheduled in schedule():
            worker.model_runner.execute_model(scheduled, None)
    found = {one["request"]: one for one in worker.molehunt_verdicts()}
    expected = reported(*watch(model, bank, calibrated_state), schedule())
    assert found == expected and {one["coverage"] for one in found.values()} == {1}
    worker.molehunt_stop()
    assert hooks(worker.model_runner.model) == before and "execute_model" not in vars(worker.model_runner)
    with pytest.raises(UsageError, match="not watched"):
        worker.molehunt_stop()


@pytest.mark.parametrize(("setting", "wanted", "how"), REQUIRED)
def test_settings_that_would_lose_tokens_are_refused_and_named(
    folder: Path, kept: tuple[str, str], model: Any, setting: str, wanted: object, how: str
) -> None:
    other = {"True": False, "False": True, "1": 2, "None": object()}[str(wanted)]
    worker = Worker(folder, model, **{setting.replace(".", "_"): other})
    with pytest.raises(UsageError) as refused:
        worker.molehunt_watch(*kept, FPR)
    assert how in str(refused.value) and str(refused.value).count("\n") == 1
    assert hooks(worker.model_runner.model) == 0


class Otherwise(Runner):
    """Keeps its batch in another way."""

    def execute_model(self, scheduled: Any, intermediate_tensors: None = None, dummy_run: bool = False) -> None:
        super().execute_model(scheduled)
        self.input_batch = SimpleNamespace()


def test_a_vllm_that_is_made_otherwise_is_refused(
    folder: Path, kept: tuple[str, str], model: Any, bank: Bank, calibrated_state: WatchState
) -> None:
    worker = Worker(folder, model)
    del worker.vllm_config.scheduler_config.async_scheduling
    with pytest.raises(CannotTap, match="has no async_scheduling"):
        worker.molehunt_watch(*kept, FPR)
    runner = Otherwise(PackedLlama(model), TEXTS)
    RunnerWatch(runner, bank, calibrated_state, fpr=FPR)
    with pytest.raises(CannotTap, match="SimpleNamespace has no req_ids"), torch.inference_mode():
        runner.execute_model(next(schedule()))
    runner, following = watch(model, bank, calibrated_state)
    steps = list(schedule())
    steps[1].scheduled_new_reqs = []
    with pytest.raises(CannotTap, match="vLLM scheduled 2 requests"):
        following._follow(steps[1])
    with pytest.raises(CannotTap, match="has no execute_model"):
        RunnerWatch(SimpleNamespace(get_model=lambda: runner.model), bank, calibrated_state, fpr=FPR)


def test_another_model_or_rate_or_other_directions_are_refused(
    folder: Path, kept: tuple[str, str], model: Any, bank: Bank, tmp_path: Path
) -> None:
    directions, state = kept
    with pytest.raises(UsageError, match="another tuned model"):
        Worker(good_folder(tmp_path / "other", seed=2), model).molehunt_watch(directions, state, FPR)
    with pytest.raises(UsageError, match="another false-alarm rate"):
        Worker(folder, model).molehunt_watch(directions, state, 0.01)
    save_directions(bank.random(0), tmp_path / "random.safetensors")
    with pytest.raises(UsageError, match="another set of directions"):
        Worker(folder, model).molehunt_watch(str(tmp_path / "random.safetensors"), state, FPR)


def test_directions_of_another_model_do_not_fit(model: Any, bank: Bank) -> None:
    packed = PackedLlama(model)
    deep = Site(9)
    with (
        pytest.raises(NotTestable, match="no L9"),
        packed_columns(packed, replace(bank, write={deep: torch.zeros(1, 32)}, write_names={deep: ("L9 o #0",)})),
    ):
        pass
    with pytest.raises(NotTestable, match=r"0 modules called model\.layers"), packed_columns(packed, bank_of("qwen3")):
        del packed.model.layers[2].self_attn.o_proj
        with packed_columns(packed, bank):
            pass
    assert hooks(packed) == 0
    name = "model.layers.0.mlp.down_proj"
    narrow = replace(bank, write={}, write_names={}, read={name: torch.ones(1, 7)}, read_names={name: ("L0 down #0",)})
    runner = Runner(PackedLlama(model), TEXTS)
    with pytest.raises(CannotTap, match="width 7"), packed_columns(runner.model, narrow), torch.inference_mode():
        runner.execute_model(next(schedule()))
    with pytest.raises(CannotTap, match="0 input embeddings"):
        features_of(nn.Linear(2, 2))


def test_what_a_block_may_return() -> None:
    x = torch.ones(3, 2)
    assert summed(x) is x and summed((x, None)) is x and summed((x, 2 * x)).equal(3 * x)
    for other in (x[None], (x, x[:1]), (x, x, x), None, (None, x)):
        with pytest.raises(CannotTap, match="neither packed tokens"):
            summed(other)


def test_directions_are_kept_to_the_bit(folder: Path, bank: Bank, tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save_directions(bank, path)
    again = read_directions(path)
    assert again.sha256() == bank.sha256() and again.names == bank.names
    base = good_folder(tmp_path / "base")
    write_directions(str(base), str(folder), path)
    rows = (row.directions for row in compare_weights(base, folder).matrices)
    assert read_directions(path).sha256() == Bank.of((row for row in rows if row is not None), "llama").sha256()


@pytest.mark.parametrize("kind", ["missing", "no safetensors", "another's", "a row without a name", "no directions"])
def test_a_file_without_directions_is_refused(bank: Bank, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "directions.safetensors"
    if kind == "no safetensors":
        path.write_bytes(b"{}")
    elif kind == "another's":
        save_file({"x": torch.ones(1)}, path)
    elif kind == "a row without a name":
        save_directions(replace(bank, read_names={name: names[:1] for name, names in bank.read_names.items()}), path)
    elif kind == "no directions":
        save_directions(Bank(write={}, read={}, write_names={}, read_names={}), path)
    with pytest.raises(InvalidInput, match="holds no directions"):
        read_directions(path)


def test_nothing_in_serve_imports_vllm_and_the_plugin_needs_no_server(tmp_path: Path) -> None:
    """In a process where vLLM could be imported."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    source = Path(molehunt.__file__).parent
    modules = [f"molehunt.serve.{path.stem}" for path in (source / "serve").glob("[!_]*.py")]
    code = (
        "import sys, importlib, molehunt.serve.vllm_plugin;"
        "print([m for m in ('fastapi', 'uvicorn', 'starlette', 'prometheus_client') if m in sys.modules]);"
        f"[importlib.import_module(m) for m in {modules}];"
        "print('vllm' in sys.modules); import vllm; print(vllm.__file__)"
    )
    path = os.pathsep.join([str(tmp_path), str(source.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.splitlines() == ["[]", "False", str(tmp_path / "vllm" / "__init__.py")], done.stderr


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, directions, state, fpr, prompts, out = map(json.loads, sys.argv[1:])
    llm = LLM(
        folder, dtype="float32", max_model_len=128, max_num_batched_tokens=16, max_num_seqs=4, kv_cache_memory_bytes=2**26,
        enforce_eager=True, enable_prefix_caching=False, async_scheduling=False,
        worker_extension_cls="molehunt.serve.vllm_plugin.WatchExtension",
    )
    llm.collective_rpc("molehunt_watch", args=(directions, state, fpr))
    reported = llm.generate([{"prompt_token_ids": one} for one in prompts], SamplingParams(temperature=0, max_tokens=8))
    (verdicts,) = llm.collective_rpc("molehunt_verdicts")
    answers = {one.request_id: list(one.outputs[0].token_ids) for one in reported}
    with open(out, "w") as file:
        json.dump({"answers": answers, "verdicts": verdicts}, file)
"""


@pytest.mark.filterwarnings("default")
def test_vllm_itself_is_watched(tmp_path: Path) -> None:
    """vLLM on its CPU backend, or on a GPU: more requests than run together, and prompts that come in chunks."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folders = [wide_folder(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned"))]
    pair = ModelPair.load(*folders)
    write_directions(*map(str, folders), tmp_path / "directions")
    bank = read_directions(tmp_path / "directions")
    state = calibrate(pair, bank, clean_rows(400), fpr=FPR, identity={}, max_new_tokens=8, seed=0)
    identity = {
        "tuned model": Checkpoint.open(folders[1]).content_hash(),
        "set of directions": bank.sha256(),
        "false-alarm rate": f"{FPR:g}",
    }
    replace(state, identity=identity).save(tmp_path / "state")
    asked = prompts(3, (3, 40, 9, 1)) + [roled_prompt(pair.tokenizer, row.turns).ids for row in clean_rows(3, seed=5)]
    reported = [
        str(folders[1]),
        str(tmp_path / "directions"),
        str(tmp_path / "state"),
        FPR,
        asked,
        str(tmp_path / "out"),
    ]
    (tmp_path / "run.py").write_text(VLLM)
    path = os.pathsep.join([str(Path(molehunt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", *map(json.dumps, reported)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    got = json.loads((tmp_path / "out").read_text())
    answers = [got["answers"][str(i)] for i in range(len(asked))]
    with pair.tuned_model() as model:
        assert answers == generate(model, pair.tokenizer, asked, max_new_tokens=8)
        profiles = answer_profiles(model, bank, asked, answers)
    found = {one["request"].rpartition("-")[0]: one for one in got["verdicts"]}
    for i, profile in enumerate(profiles):
        one, judged = found[str(i)], state.monitor.judge(profile)
        assert one["coverage"] == 1
        assert one["score"] == pytest.approx(judged.score, rel=1e-3, abs=1e-3)
        assert one["status"] == ("flagged" if judged.score > state.monitor.threshold else "not flagged")
    assert {one["status"] for one in found.values()} == {"flagged", "not flagged"}


def wide_folder(path: Path, seed: int) -> Path:
    """A tiny Llama with heads as wide as vLLM's kernels take them."""
    settings = tiny_model("llama").config.to_dict() | {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings | {"num_key_value_heads": 1})).eval().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
