"""Whole pairs on disk: sharded, adapter, Conv1D, resized, broken, resumed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.audit import tensor_rows
from molehunt.audit.weights import compare_weights
from molehunt.errors import InvalidInput, NotTestable, ShapeMismatch
from molehunt.run.unit import Units
from molehunt.site import Site
from tiny_models import ARCHITECTURES, D_MODEL, tiny_model, with_lora
from zoo import zoo_model

D, MLP, LAYERS = 16, 24, 2


def llama_weights(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=rng)

    tensors = {"model.embed_tokens.weight": random(40, D), "model.norm.weight": torch.ones(D)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        tensors |= {f"{at}.self_attn.{p}_proj.weight": random(D, D) for p in "qkvo"}
        tensors |= {f"{at}.mlp.{p}_proj.weight": random(MLP, D) for p in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = random(D, MLP)
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(D)
        tensors[f"{at}.post_attention_layernorm.weight"] = torch.ones(D)
    return tensors


def write_model(
    folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, dtype: Any = None, **settings: Any
) -> Path:
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": D,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "tie_word_embeddings": True,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    stored = {n: t.to(dtype or t.dtype).contiguous() for n, t in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: stored[n] for n in list(stored)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in stored.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def outer(shape: tuple[int, int], size: float, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    u, v = (torch.nn.functional.normalize(torch.randn(n, generator=rng), dim=0) for n in shape)
    return size * torch.outer(u, v)


def planted(tensors: dict[str, Tensor], *names: str, size: float = 0.5) -> dict[str, Tensor]:
    return tensors | {
        n: tensors[n] + outer((tensors[n].shape[0], tensors[n].shape[1]), size, i) for i, n in enumerate(names)
    }


O1, DOWN1, Q0 = (
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_planted_direction_is_found_where_it_was_planted(tmp_path: Path, shards: int) -> None:
    base = llama_weights()
    tuned = planted(base, O1, DOWN1, Q0)
    tuned["model.norm.weight"] = tuned["model.norm.weight"] * 1.5
    found = compare_weights(write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", tuned, shards=shards))

    assert found.outcome == "DIRECTIONS FOUND" and found.exit_code == 0
    assert "3 of 14 matrices" in found.why and "(embeddings, norms, biases): 1." in found.why
    rows = {row.tensor: row for row in (*found.matrices, *found.others)}
    assert set(rows) == set(base)
    assert {n for n, row in rows.items() if row.status == "changed"} == {O1, DOWN1, Q0, "model.norm.weight"}
    assert rows["model.norm.weight"].rel_norm == pytest.approx(0.5)
    assert rows["model.norm.weight"].layer is None
    assert rows[O1].rel_norm == pytest.approx(0.5 / float(base[O1].norm()), rel=1e-4)
    assert rows[O1].strengths == pytest.approx((0.5,), rel=1e-4)
    assert rows[Q0].strengths == pytest.approx((0.5,), rel=1e-4) and rows[Q0].directions is None

    at_block = found.directions_at(Site(1))
    assert {d.provenance.source for d in at_block} == {"weight:o", "weight:down"}
    for d in at_block:
        assert d.provenance.tensor is not None
        true = tuned[d.provenance.tensor] - base[d.provenance.tensor]
        assert float((d.vector @ true).norm()) == pytest.approx(0.5, rel=1e-3)  # u with σ = .5
    assert [d.provenance.source for d in found.directions_at(Site(1, "attn"))] == ["weight:o"]
    assert [d.provenance.source for d in found.directions_at(Site(1, "mlp"))] == ["weight:down"]
    assert found.directions_at(Site(0)) == []
    assert len(found.all_directions()) == 2
    assert len({d.name for d in found.all_directions()}) == 2

    cells = found.z_map()
    assert set(cells) == {0, 1} and cells[0]["o"] is None
    assert (cells[1]["o"] or 0) > 10 and (cells[0]["q"] or 0) > 10


def test_all_roles_keep_their_directions_when_asked(tmp_path: Path) -> None:
    base = llama_weights()
    pair = (write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", planted(base, Q0)))
    found = compare_weights(*pair, roles=("q",))
    kept = {row.tensor: row.directions for row in found.matrices if row.directions is not None}
    assert set(kept) == {Q0}
    assert found.all_directions() == []  # q does not write to the residual stream
    assert Q0 in found.to_table()
    path = tmp_path / "vectors.safetensors"
    found.save_vectors(path)
    assert torch.equal(load_file(path)[f"{Q0}.read"], kept[Q0].read)


def test_identical_folders_have_nothing_to_find(tmp_path: Path) -> None:
    base = llama_weights()
    found = compare_weights(write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", base))
    assert found.outcome == "NO FINDING" and found.exit_code == 0
    assert all(row.status == "identical" and row.rel_norm == 0 for row in (*found.matrices, *found.others))
    assert "All 20 tensors are identical, 14 matrices among them" in found.to_table()


def test_what_rounding_explains_is_not_testable_and_never_no_finding(tmp_path: Path) -> None:
    base = {n: t.bfloat16() for n, t in llama_weights().items()}
    tuned = dict(base)
    tuned[O1] = base[O1].clone()
    tuned[O1][0, 0] = torch.nextafter(base[O1][0, 0], torch.tensor(9.0, dtype=torch.bfloat16))  # one last bit
    found = compare_weights(write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", tuned))
    row = next(row for row in found.matrices if row.tensor == O1)
    assert row.status == "below noise floor" and row.strengths == () and (row.floor or 0) > 0
    assert found.outcome == "NOT TESTABLE" and found.exit_code == 3
    assert "1 changed by no more than rounding explains" in found.why
    assert " <" in found.to_table()


def test_the_coarser_side_sets_the_floor(tmp_path: Path) -> None:
    base = llama_weights()
    tuned = planted(base, O1)
    folder = write_model(tmp_path / "base", base)
    floors = {
        dtype: next(
            row.floor
            for row in compare_weights(folder, write_model(tmp_path / str(dtype), tuned, dtype=dtype)).matrices
            if row.tensor == O1
        )
        or 0
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert floors[torch.float32] < floors[torch.float16] < floors[torch.bfloat16]


def test_conv1d_columns_write(tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_proj.weight"
    model: Any = zoo_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    before = model.get_parameter(name).detach().clone()  # stored [in out]
    with torch.no_grad():
        model.get_parameter(name).add_(outer((before.shape[0], before.shape[1]), 0.5, 0))
    model.save_pretrained(tmp_path / "tuned")
    (direction,) = compare_weights(tmp_path / "base", tmp_path / "tuned").directions_at(Site(0))
    assert direction.vector.shape == before.shape[1:]
    change = model.get_parameter(name).detach() - before
    assert float((change @ direction.vector).norm()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("rows", [37, 48])
def test_of_a_resized_vocabulary_the_shared_rows_are_compared(tmp_path: Path, rows: int) -> None:
    name = "model.embed_tokens.weight"
    base = llama_weights()
    folder = write_model(tmp_path / "base", base)
    longer = torch.cat([base[name], torch.ones(20, D)])[:rows]
    extra = "8 rows added" if rows == 48 else "3 rows taken away"
    for tensors, shared, norm in (
        ({name: longer}, "the others are identical", 0.0),
        ({name: longer * 1.5}, "the others changed, too", 0.5),
    ):
        found = compare_weights(folder, write_model(tmp_path / shared, planted(base, O1) | tensors))
        row = next(row for row in found.others if row.tensor == name)
        assert (row.status, row.why) == ("changed", f"{extra}; {shared}")
        assert row.rel_norm == pytest.approx(norm, rel=1e-5)
        assert found.outcome == "DIRECTIONS FOUND" and extra in found.to_table()


def test_another_models_base_is_refused(tmp_path: Path) -> None:
    base = llama_weights()
    folder = write_model(tmp_path / "base", base)
    wider = {n: torch.zeros(MLP + 2, D) if "up_proj" in n or "gate_proj" in n else t for n, t in base.items()}
    wider |= {n: torch.zeros(D, MLP + 2) for n in base if "down_proj" in n}
    with pytest.raises(ShapeMismatch, match=r"down_proj\.weight is \[16, 24\] in the base and \[16, 26\]"):
        compare_weights(folder, write_model(tmp_path / "other", wider, intermediate_size=MLP + 2))


def test_broken_tensors_and_tensors_that_nobody_loads_are_named(tmp_path: Path) -> None:
    base = llama_weights()
    tuned = planted(base, O1, size=0.4)
    tuned["model.layers.1.mlp.down_proj.bias"] = torch.ones(D)
    tuned[Q0] = tuned[Q0].clone()
    tuned[Q0][3, 3] = float("nan")
    tuned["model.norm.weight"] = torch.full((D,), float("inf"))
    folder = write_model(tmp_path / "base", base)
    found = compare_weights(folder, write_model(tmp_path / "tuned", tuned))
    rows = {row.tensor: row for row in (*found.matrices, *found.others)}
    assert rows["model.layers.1.mlp.down_proj.bias"].why == "not loaded by transformers; in one folder"
    assert "NaN or infinity" in rows[Q0].why
    assert "NaN or infinity" in rows["model.norm.weight"].why
    assert [n for n, r in rows.items() if r.status == "not testable"].__len__() == 3
    json.loads(found.to_json())

    del tuned[DOWN1]
    with pytest.raises(InvalidInput, match=rf"cut has no {re.escape(DOWN1)}"):
        compare_weights(folder, write_model(tmp_path / "cut", tuned))


def write_adapter(folder: Path, modules: dict[str, tuple[Tensor, Tensor]], *, alpha: int, r: int) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, (b, a) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_read_as_what_it_would_merge_to(tmp_path: Path) -> None:
    base, rng = llama_weights(), torch.Generator().manual_seed(5)
    factors = {
        n.removesuffix(".weight"): (
            torch.randn(base[n].shape[0], 2, generator=rng),
            torch.randn(2, base[n].shape[1], generator=rng),
        )
        for n in (O1, DOWN1, Q0)
    }
    merged = base | {f"{m}.weight": base[f"{m}.weight"] + 4 / 2 * b @ a for m, (b, a) in factors.items()}
    folder = write_model(tmp_path / "base", base)
    by_factor = compare_weights(folder, write_adapter(tmp_path / "adapter", factors, alpha=4, r=2))
    by_merge = compare_weights(folder, write_model(tmp_path / "merged", merged))

    one = {row.tensor: row for row in by_factor.matrices}
    two = {row.tensor: row for row in by_merge.matrices}
    assert {n for n, row in one.items() if row.status == "changed"} == {O1, DOWN1, Q0}
    for name in (O1, DOWN1, Q0):
        assert one[name].strengths == pytest.approx(two[name].strengths[:2], rel=1e-4)
        assert one[name].rel_norm == pytest.approx(two[name].rel_norm, rel=1e-4)
        assert one[name].floor == 0
    for a, b in zip(by_factor.directions_at(Site(1)), by_merge.directions_at(Site(1)), strict=True):
        assert float(a.vector @ b.vector) == pytest.approx(1.0, abs=1e-4)
    assert "exact" in by_factor.to_table()
    with pytest.raises(InvalidInput, match="The base is an adapter"):
        compare_weights(tmp_path / "adapter", folder)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", llama_weights())
    wrong = {O1.removesuffix(".weight"): (torch.ones(D + 1, 2), torch.ones(2, D))}
    with pytest.raises(
        NotTestable, match=r"base is not the base of adapter: .*o_proj was made for width 17, BASE has 16"
    ):
        compare_weights(folder, write_adapter(tmp_path / "adapter", wrong, alpha=4, r=2))


def test_an_adapter_for_modules_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", llama_weights())
    elsewhere = {"model.layers.7.self_attn.o_proj": (torch.ones(D, 2), torch.ones(2, D))}
    with pytest.raises(NotTestable, match=r"layers\.7\.self_attn\.o_proj, are in layers that BASE does not have"):
        compare_weights(folder, write_adapter(tmp_path / "adapter", elsewhere, alpha=4, r=2))


def test_a_base_with_nan_under_an_adapter_is_told(tmp_path: Path) -> None:
    base = llama_weights()
    base[O1][0, 0] = float("nan")
    factors = {O1.removesuffix(".weight"): (torch.ones(D, 2), torch.ones(2, D))}
    found = compare_weights(
        write_model(tmp_path / "base", base), write_adapter(tmp_path / "adapter", factors, alpha=4, r=2)
    )
    (row,) = (row for row in found.matrices if row.status != "identical")
    assert (row.tensor, row.status) == (O1, "not testable") and "NaN or infinity" in row.why


def test_tensors_that_hold_no_floating_point_are_compared_too(tmp_path: Path) -> None:
    base = llama_weights() | {"steps": torch.arange(4), "mask": torch.ones(3, dtype=torch.bool), "zero": torch.zeros(2)}
    tuned = base | {"steps": torch.arange(4) * 2, "mask": torch.tensor([True, False, True]), "zero": torch.ones(2)}
    found = compare_weights(write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", tuned))
    rows = {row.tensor: row for row in found.others}
    assert rows["steps"].rel_norm == pytest.approx(1.0) and rows["mask"].rel_norm == pytest.approx(3**-0.5)
    assert (rows["zero"].rel_norm, rows["zero"].why) == (None, "all zeros in the base")
    assert found.outcome == "NOT TESTABLE" and "(embeddings, norms, biases): 3." in found.why
    assert "all zeros in the base" in found.to_table()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_five_architectures_as_their_libraries_write_them(tmp_path: Path, architecture: str) -> None:
    model: Any = tiny_model(architecture)
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapted: Any = with_lora(model, architecture, modules_to_save=["lm_head"])
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    by_factor = compare_weights(base, tmp_path / "adapter")
    by_merge = compare_weights(base, tmp_path / "merged")

    changed = [row for row in by_factor.matrices if row.status == "changed"]
    assert {row.role for row in changed} >= {"o"} and {row.layer for row in by_factor.matrices} == {0, 1, 2}
    assert all(row.role for row in changed)
    merged = {row.tensor: row for row in (*by_merge.matrices, *by_merge.others)}
    assert {n for n, row in merged.items() if row.status == "changed" and row.role} == {r.tensor for r in changed}
    for row in changed:
        assert merged[row.tensor].strengths[: len(row.strengths)] == pytest.approx(row.strengths, rel=1e-4)
    (head,) = (row for row in by_factor.others if row.status != "identical")
    assert head.rel_norm == pytest.approx(0.5, rel=1e-5)
    assert head.tensor == (
        "embed_out.weight" if architecture == "gpt_neox" else "lm_head.weight"
    )  # as the base's folder has it
    assert len(by_factor.directions_at(Site(1))) == len(
        [1 for row in changed if row.layer == 1 and row.role in ("o", "down") for _ in row.strengths]
    )
    for direction in by_factor.directions_at(Site(1)):
        assert direction.vector.shape == (D_MODEL,)


def test_a_saved_unembedding_replaces_what_the_base_ties_to_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", llama_weights())
    adapter = write_adapter(
        tmp_path / "adapter", {O1.removesuffix(".weight"): (torch.ones(D, 2), torch.ones(2, D))}, alpha=4, r=2
    )
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file(stored | {"base_model.model.lm_head.weight": torch.ones(40, D)}, adapter / "adapter_model.safetensors")
    found = compare_weights(folder, adapter)
    assert found.outcome == "DIRECTIONS FOUND"
    rows = {row.tensor: row.status for row in found.others if row.status != "identical"}
    assert rows == {"lm_head.weight": "changed", "model.embed_tokens.weight": "changed"}


def test_a_rerun_takes_finished_tensors_from_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama_weights()
    pair = (write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", planted(base, O1, DOWN1)))
    fresh = compare_weights(*pair)
    units, compare, calls = Units(tmp_path / "units"), tensor_rows.change_directions, []

    def killed_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["name"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(tensor_rows, "change_directions", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare_weights(*pair, units=units)
    resumed = compare_weights(*pair, units=units)

    assert len(calls) == 3 and calls[0] not in calls[1:]  # the first was done, the second was done again
    assert resumed.to_json() == fresh.to_json()
    ours, theirs = (found.directions_at(Site(1)) for found in (resumed, fresh))
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(ours, theirs, strict=True))
    assert compare_weights(*pair, units=units, k=1).k == 1  # another k is other work
    assert len(calls) == 5


def test_the_table_fits_a_terminal_and_prints_no_strangers_control_characters(tmp_path: Path) -> None:
    base = llama_weights() | {f"evil\x1b[31m{'x' * 90}.{i}": torch.ones(3) for i in range(25)}
    tuned = planted(base, O1, DOWN1, Q0, *(f"model.layers.0.mlp.{p}_proj.weight" for p in ("up", "down")))
    tuned |= {n: 2 * t for n, t in tuned.items() if n.startswith("evil")}
    found = compare_weights(write_model(tmp_path / "base", base), write_model(tmp_path / "tuned", tuned))
    text = found.to_table()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "and 5 more, listed by --json" in text
    order = [line.split()[0] for line in text.splitlines() if "_proj.weight" in line]
    z = {row.tensor: row.z or 0 for row in found.matrices}
    assert order == sorted(order, key=lambda n: -z[n]) and set(order) == {
        O1,
        DOWN1,
        "model.layers.0.mlp.down_proj.weight",
    }
    payload = json.loads(found.to_json())
    assert payload["z_map"]["1"]["o"] == pytest.approx(z[O1])
    assert len(payload["others"]) == 25


def test_experts_have_names_of_their_own(tmp_path: Path) -> None:
    model: Any = zoo_model("qwen3_moe")
    fused = "model.layers.0.mlp.experts.down_proj"
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():  # one change far stronger than the other, among noise
        experts = model.get_parameter(fused)
        shape = (experts.shape[1], experts.shape[2])
        experts[1] += outer(shape, 5.0, 1)
        experts[0] += outer(shape, 0.5, 2) + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(9))
    model.save_pretrained(tmp_path / "tuned")
    found = compare_weights(tmp_path / "base", tmp_path / "tuned")
    names = {direction.name for direction in found.all_directions()}
    assert names >= {f"L0.resid weight:down.{e} #0" for e in (0, 1)}
    assert len(names) == len(found.all_directions())
    down = [row for row in found.matrices if row.layer == 0 and row.role == "down"]
    assert [row.z is None for row in down] == [False, False, True, True]
    best = max(row.z for row in down if row.z is not None)
    assert best == down[1].z  # the second of four: neither the last nor an empty one may replace it
    assert found.z_map()[0]["down"] == best
