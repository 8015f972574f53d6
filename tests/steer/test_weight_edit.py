"""Permanent fixes: what they take out, what they leave alone, and the folders they are saved as."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from folders import edit_json, good_folder, lora_folder, sharded_folder
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.direction import Directions
from molehunt.direction.weight import change_directions, weight_directions
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, UsageError
from molehunt.model.adapters import apply_adapter
from molehunt.model.blocks import decoder_blocks, module_role
from molehunt.model.loading import load_model
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer import saved_model
from molehunt.steer.ablate import Ablate
from molehunt.steer.saved_model import SavedModel, new_folder, write_adapter, write_model
from molehunt.steer.weight_edit import orthogonalisation, subtraction
from tiny_models import ARCHITECTURES, D_MODEL, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 51], [20, 21, 22, 90, 3, 4, 44]])
CPU = torch.device("cpu")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(folder: Path) -> nn.Module:
    return load_model(folder, CPU, torch.float32)


def tuned_folder(base: Path, into: Path, *, rank: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    """A fine-tune of `base` whose changes have that rank, in every writer."""
    shutil.copytree(base, into)
    rng = torch.Generator().manual_seed(11)
    for shard in sorted(into.glob("model*.safetensors")):
        tensors = load_file(shard)
        for name, value in tensors.items():
            role = module_role(name, Checkpoint.open(base).model_type) if value.ndim == 2 else None
            if role is not None and role.writes:
                left = torch.randn(value.shape[0], rank, generator=rng)
                right = torch.randn(rank, value.shape[1], generator=rng)
                tensors[name] = value + 0.05 * left @ right
        save_file({name: value.to(dtype) for name, value in tensors.items()}, shard, {"format": "pt"})
    return into


def flagged(base: Path, tuned: Path, *, k: int = 8) -> list[Directions]:
    found = compare_weights(base, tuned, k=k)
    return [row.directions for row in found.matrices if row.directions is not None and len(row.directions.strength)]


def unit(seed: int = 0, d_model: int = D_MODEL) -> torch.Tensor:
    drawn = torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def odd_model(kind: str) -> nn.Module:
    """Architectures besides `ARCHITECTURES`: norms after the writers without an offset, tied embeddings, biases."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(3)
    if kind == "olmo2":
        return hf.Olmo2ForCausalLM(hf.Olmo2Config(**common, tie_word_embeddings=False)).eval()
    if kind == "tied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common, tie_word_embeddings=True)).eval()
    if kind == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**common, num_local_experts=3, sliding_window=None)).eval()
    assert kind == "biased"
    config = hf.LlamaConfig(**common, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    return hf.LlamaForCausalLM(config).eval()


def folder_of(kind: str, into: Path) -> Path:
    """A folder of a model whose norms and biases are random, too."""
    model = tiny_model(kind) if kind in ARCHITECTURES else odd_model(kind)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=rng)
    model.save_pretrained(into)
    tiny_tokenizer().save_pretrained(into)
    return into


@pytest.mark.parametrize("make", [good_folder, sharded_folder], ids=["single", "sharded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_all_its_directions_the_fine_tune_is_its_base(tmp_path: Path, architecture: str, make: Any) -> None:
    base = make(tmp_path / "base", architecture)
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned"))
    directions = flagged(base, tuned.path)
    assert len(directions) == 6 and all(len(one.strength) == 3 for one in directions)
    assert (logits(loaded(tuned.path)) - logits(loaded(base))).abs().max() > 0.1
    saved = write_model(tuned, subtraction(tuned, directions), tmp_path / "fixed")
    for name in Checkpoint.open(base).names():
        wanted, got = (Checkpoint.open(folder).tensor(name) for folder in (base, saved.folder))
        assert torch.allclose(got, wanted, atol=2e-6)
        assert (name in saved.edited) != torch.equal(got, tuned.tensor(name))
    assert torch.allclose(logits(loaded(saved.folder)), logits(loaded(base)), atol=1e-4)
    assert saved.rounding < 1e-5 and saved.left_out == ()


def test_in_bf16_the_base_is_there_again_up_to_its_rounding(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base")
    rounded = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(rounded, base / "model.safetensors", {"format": "pt"})
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned", dtype=torch.bfloat16))
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = rounded[name], tuned.tensor(name)
    whole = weight_directions(before, after, k=32, floor=0.0, name=name)
    assert len(whole.strength) == 32  # rounding has full rank
    saved = write_model(tuned, subtraction(tuned, [whole]), tmp_path / "all")
    got = Checkpoint.open(saved.folder).tensor(name)
    assert got.dtype == torch.bfloat16 and torch.equal(got, before)
    saved = write_model(tuned, subtraction(tuned, [whole], {name: [0]}), tmp_path / "one")
    strongest = whole.strength[0] * torch.outer(whole.write[0], whole.read[0])
    got = Checkpoint.open(saved.folder).tensor(name)
    assert torch.equal(got, (after.float() - strongest).bfloat16())
    lost = (got.float() - (after.float() - strongest)).norm() / strongest.norm()
    assert saved.rounding == pytest.approx(float(lost), rel=1e-4) and saved.rounding > 1e-3


def test_chosen_directions_alone_go(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base", "gpt2")
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned"))
    directions = flagged(base, tuned.path)
    one = next(each for each in directions if "attn.c_proj" in each.name)
    saved = write_model(tuned, subtraction(tuned, directions, {one.name: [0, 2]}), tmp_path / "fixed")
    assert saved.edited == (one.name,)
    before, after = (Checkpoint.open(folder).tensor(one.name) for folder in (base, saved.folder))
    left = change_directions((after - before).mT, k=4, floor=1e-4, name=one.name)  # GPT-2 stores [in out]
    assert left.strength.tolist() == pytest.approx([float(one.strength[1])], rel=1e-4)
    assert torch.allclose(left.write[0], one.write[1], atol=1e-4)
    model = loaded(tuned.path)
    step = (one.write[[0, 2]] * one.strength[[0, 2], None]).mT @ one.read[[0, 2]]
    with torch.no_grad():
        model.get_parameter(one.name).sub_(step.mT)
    assert torch.allclose(logits(model), logits(loaded(saved.folder)), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_adapter_does_what_the_folder_does(tmp_path: Path, architecture: str) -> None:
    base = good_folder(tmp_path / "base", architecture)
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned"))
    directions = flagged(base, tuned.path)
    chosen = {one.name: [0] if i else [0, 1, 2] for i, one in enumerate(directions)}  # of unequal ranks
    edits = subtraction(tuned, directions, chosen)
    folder = write_model(tuned, edits, tmp_path / "folder").folder
    adapter = write_adapter(tuned, edits, tmp_path / "adapter")
    assert sorted(path.name for path in adapter.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = logits(loaded(tuned.path))
    got = logits(apply_adapter(loaded(tuned.path), adapter.folder))
    assert torch.allclose(got, logits(loaded(folder)), atol=1e-4)
    assert (got - plain).abs().max() > 0.05
    read = Checkpoint.open(adapter.folder)
    assert sorted({*read.adapter.rank_pattern.values(), read.adapter.r}) == [1, 3]
    named = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in read.names()}
    assert {f"{name}.weight" for name in named} == {*adapter.edited}


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "olmo2", "tied", "biased"])
def test_an_orthogonalised_model_cannot_write_the_direction(tmp_path: Path, kind: str) -> None:
    tuned = Checkpoint.open(folder_of(kind, tmp_path / "tuned"))
    directions = torch.stack([3 * unit(1), unit(2)])  # neither of length 1 nor orthogonal
    saved = write_model(tuned, orthogonalisation(tuned, directions), tmp_path / "fixed")
    sites = [Site(layer) for layer in range(3)]
    shares = []
    for folder in (tuned.path, saved.folder):
        model = loaded(folder)
        with read_sites(model, sites) as tap:
            logits(model)
        shares.append(
            max(float((tap[s] @ d).abs().max() / tap[s].norm(dim=-1).max()) for s in sites for d in directions)
        )
    assert shares[0] > 0.1 and shares[1] < 1e-5
    model = loaded(saved.folder)
    assert float((model.get_input_embeddings().weight.detach() @ directions.mT).abs().max()) < 1e-5
    assert saved.rounding < 1e-5


@pytest.mark.parametrize("kind", ["llama", "biased", "gpt_neox"])
def test_it_is_ablation_at_every_write(tmp_path: Path, kind: str) -> None:
    tuned = Checkpoint.open(folder_of(kind, tmp_path / "tuned"))
    r = unit(4)
    fixed = write_model(tuned, orthogonalisation(tuned, r[None]), tmp_path / "fixed").folder
    model = loaded(tuned.path)
    embed = model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, args, out: out - (out @ r)[..., None] * r)
    streams = ("attn", "mlp")
    edits = [Ablate(Site(layer, stream), r[None]) for layer in range(len(decoder_blocks(model))) for stream in streams]
    with edit_sites(model, edits):
        wanted = logits(model)
    handle.remove()
    assert torch.allclose(logits(loaded(fixed)), wanted, atol=2e-5)
    assert (logits(model) - wanted).abs().max() > 0.05


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_tied_embeddings_are_edited_together(tmp_path: Path, stored: str) -> None:
    tuned = folder_of("tied", tmp_path / "tuned")
    if stored == "twice":  # as some converters write them: loaders differ in which they read
        tensors = load_file(tuned / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tuned)
    r = unit(6)
    saved = write_model(checkpoint, orthogonalisation(checkpoint, r[None]), tmp_path / "fixed")
    assert ("lm_head.weight" in saved.edited) == (stored == "twice")
    model = loaded(tuned)
    with torch.no_grad():  # the edit, by hand, in memory
        for name, parameter in model.named_parameters():
            role = module_role(name, "llama")
            if name == "model.embed_tokens.weight":
                parameter.sub_((parameter @ r)[:, None] * r)
            elif role is not None and role.writes:
                parameter.sub_(torch.outer(r, r @ parameter))
    assert torch.allclose(logits(loaded(saved.folder)), logits(model), atol=1e-5)
    with_head = Checkpoint.open(saved.folder)
    for name in {"lm_head.weight", "model.embed_tokens.weight"} & {*with_head.names()}:
        assert float((with_head.tensor(name) @ r).abs().max()) < 1e-5


def test_an_untied_unembedding_is_left_alone(tmp_path: Path) -> None:
    tuned = Checkpoint.open(good_folder(tmp_path / "tuned"))
    edits = orthogonalisation(tuned, unit()[None])
    assert "lm_head.weight" not in edits and "model.norm.weight" not in edits
    writers = {name for name in tuned.names() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert {*edits} == writers | {"model.embed_tokens.weight"}


def test_files_are_copied_as_they_are_and_other_weights_stay_behind(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "tuned")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("card")
    (folder / "LICENSE").write_text("free")
    shutil.copy(min(folder.glob("model-*")), folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "original").mkdir()
    tuned = Checkpoint.open(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    seen: list[str] = []

    def track(items: Any, what: str, total: int | None = None) -> Any:
        for item in items:
            seen.append(item)
            yield item

    saved = write_model(tuned, orthogonalisation(tuned, unit()[None]), tmp_path / "fixed", track=track)
    assert tuple(seen) == saved.edited and len(seen) == 7
    assert saved.left_out == ("consolidated.safetensors", "model.gguf", "original", "pytorch_model.bin")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    written = {path.name: path.read_bytes() for path in saved.folder.iterdir()}
    assert {*written} == {*before} - {*saved.left_out}
    for name, raw in written.items():
        if not name.endswith(".safetensors"):
            assert raw == before[name]
            continue
        length = 8 + int.from_bytes(raw[:8], "little")
        assert raw[:length] == before[name][:length]  # header, metadata and order
    fixed = Checkpoint.open(saved.folder)
    assert fixed.layout.files == tuned.layout.files and len(fixed.layout.files) > 2
    for name in tuned.names():
        assert torch.equal(fixed.tensor(name), tuned.tensor(name)) == (name not in saved.edited)


def test_an_index_beside_a_single_file_is_left_out(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "tuned")
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "model.safetensors"})
    tuned = Checkpoint.open(folder)
    saved = write_model(tuned, orthogonalisation(tuned, unit()[None]), tmp_path / "fixed")
    assert saved.left_out == ("model.safetensors.index.json",)


@pytest.mark.parametrize(
    ("directions", "match"),
    [
        (torch.zeros(1, D_MODEL), "all zero"),
        (torch.stack([unit(), torch.zeros(D_MODEL)]), "all zero"),
        (torch.full((1, D_MODEL), torch.nan), "NaN"),
        (torch.zeros(0, D_MODEL), "all zero"),
        (unit(0, 16)[None], "the directions have 16 values; .* writes 32"),
    ],
)
def test_bad_directions_are_refused(tmp_path: Path, directions: torch.Tensor, match: str) -> None:
    tuned = Checkpoint.open(good_folder(tmp_path / "tuned"))
    with pytest.raises(UsageError, match=match):
        orthogonalisation(tuned, directions)


def test_directions_of_another_model_are_refused(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base")
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned"))
    one = flagged(base, tuned.path)[0]
    wrong: list[tuple[Any, str]] = [
        (([replace(one, name="model.layers.7.mlp.down_proj.weight")],), "the model has no model.layers.7"),
        (([replace(one, write=one.write[:, :16])],), r"is \[32, 48\] in this model; .* a matrix of \[16, 48\]"),
        (([replace(one, strength=0 * one.strength)],), "is all zero"),
        (([change_directions(torch.zeros(32, 32), k=1, floor=1.0, name=one.name)],), "no direction above"),
        (([one], {one.name: [3]}), "has 3 directions, from 0 to 2; asked for"),
        (([one], {one.name: [1, 1]}), "asked for"),
        (([one], {one.name: []}), "asked for"),
        (([one], {"lm_head.weight": [0]}), "no directions of lm_head.weight were given"),
        (([one], {}), "no direction is to be taken away"),
        (([],), "no direction is to be taken away"),
    ]
    for arguments, match in wrong:
        with pytest.raises(UsageError, match=match):
            subtraction(tuned, *arguments)


def test_what_is_no_plain_model_is_refused(tmp_path: Path) -> None:
    adapter = Checkpoint.open(lora_folder(tmp_path / "adapter"))
    folder = good_folder(tmp_path / "tuned")
    plain = Checkpoint.open(folder)
    edits = orthogonalisation(plain, unit()[None])
    for ask in (lambda: orthogonalisation(adapter, unit()[None]), lambda: subtraction(adapter, [])):
        with pytest.raises(NotTestable, match="an adapter holds no weights"):
            ask()
    with pytest.raises(UsageError, match="bias or an embedding"):
        write_adapter(plain, edits, tmp_path / "x")
    for path in adapter.path.glob("adapter_*"):
        shutil.copy(path, folder / path.name)
    beside = Checkpoint.open(folder, adapter="ignore")
    with pytest.raises(UsageError, match="an adapter beside its weights"):
        write_model(beside, edits, tmp_path / "x")
    quantised = good_folder(tmp_path / "quantised")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(NotTestable, match="these weights are quantised"):
        orthogonalisation(Checkpoint.open(quantised), unit()[None])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.post_mlp_layernorm.weight", "post_mlp_layernorm"),
        ("model.layers.0.mlp.experts.down_proj_bias", "down_proj_bias"),
        ("model.embed_tokens_per_layer.weight", "embed_tokens_per_layer"),
        ("model.layers.0.altup.proj.weight", "altup"),
    ],
)
def test_a_tensor_that_may_write_in_an_unknown_way_is_refused(tmp_path: Path, name: str, says: str) -> None:
    folder = good_folder(tmp_path / "tuned")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(D_MODEL)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotTestable, match=f"whether .*{says}.* is not known"):
        orthogonalisation(Checkpoint.open(folder), unit()[None])


def test_experts(tmp_path: Path) -> None:
    tuned = Checkpoint.open(folder_of("mixtral", tmp_path / "tuned"))
    r = unit(1)
    apart = sum(name.endswith("w2.weight") for name in tuned.names())
    fixed = write_model(tuned, orthogonalisation(tuned, r[None]), tmp_path / "fixed")
    assert apart == 9 and sum(name.endswith("w2.weight") for name in fixed.edited) == 9
    model = loaded(fixed.folder)
    with read_sites(model, [Site(2)]) as tap:
        logits(model)
    assert float((tap[Site(2)] @ r).abs().max()) < 1e-5
    tensors = load_file(tuned.path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.ones(3, D_MODEL, 48)
    save_file(tensors, tuned.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotTestable, match=r"\[3, 32, 48\]: experts in one tensor"):
        orthogonalisation(Checkpoint.open(tuned.path), r[None])
    name = next(name for name in fixed.edited if name.endswith("w2.weight"))
    edits = orthogonalisation(Checkpoint.open(fixed.folder), r[None])
    with pytest.raises(NotTestable, match="no linear layer"):  # transformers fuses experts when it loads them
        write_adapter(tuned, {name: edits[name]}, tmp_path / "adapter")


def test_an_edited_tensor_must_be_one_tensor_of_numbers(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "tuned")
    tuned = Checkpoint.open(folder)
    edits = orthogonalisation(tuned, unit()[None])
    name = "model.embed_tokens.weight"
    holder, other = (next(f for f in tuned.layout.files if (name in tuned.layout.entries[f]) == has) for has in (1, 0))
    twice = {**load_file(folder / other), name: load_file(folder / holder)[name]}
    save_file(twice, folder / other, {"format": "pt"})
    with pytest.raises(InvalidInput, match="stored in 2 files"):
        write_model(Checkpoint.open(folder), edits, tmp_path / "x")
    single = good_folder(tmp_path / "single")
    tensors = load_file(single / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotTestable, match=r"stored as torch.float8_e4m3fn"):
        write_model(Checkpoint.open(single), edits, tmp_path / "x")
    tensors[name] = torch.full_like(tensors[name].float(), torch.nan)
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInput, match="NaN"):
        write_model(Checkpoint.open(single), edits, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["single", "tuned"]


def test_nothing_is_overwritten_and_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Checkpoint.open(good_folder(tmp_path / "in" / "tuned"))
    edits = orthogonalisation(tuned, unit()[None])
    taken = tmp_path / "taken"
    taken.mkdir()
    for write in (write_model, write_adapter):
        with pytest.raises(MolehuntError):
            write(tuned, edits, taken)
    with pytest.raises(UsageError, match="is there already"), new_folder(taken):
        raise AssertionError("nothing may run")
    out = tmp_path / "out"
    out.mkdir()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_model, "_put", full)
        with pytest.raises(UsageError, match="No space left on device"):
            write_model(tuned, edits, out / "fixed")
    assert list(out.iterdir()) == []
    with pytest.raises(UsageError, match="could not be written"):
        write_model(tuned, edits, tuned.path / "config.json" / "fixed")
    with pytest.raises(RuntimeError, match="stop"), new_folder(out / "fixed") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(out.iterdir()) == []
    saved = write_model(tuned, edits, out / "deep" / "fixed")
    assert isinstance(saved, SavedModel) and (saved.folder.stat().st_mode & 0o777) == 0o755
    assert [path.name for path in (out / "deep").iterdir()] == ["fixed"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "tuned")
    (tmp_path / "secret").write_text("key")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match="link to a file outside"):
        Checkpoint.open(folder)


def test_a_config_that_builds_no_model_is_refused(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base")
    tuned = Checkpoint.open(tuned_folder(base, tmp_path / "tuned"))
    edits = subtraction(tuned, flagged(base, tuned.path))
    edit_json(tuned.path / "config.json", model_type="no-such-model")
    with pytest.raises(InvalidInput, match="no causal language model that can be built"):
        write_adapter(tuned, edits, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_folder_loads_in_plain_transformers(tmp_path: Path) -> None:
    tuned = Checkpoint.open(sharded_folder(tmp_path / "tuned"))
    saved = write_model(tuned, orthogonalisation(tuned, unit()[None]), tmp_path / "fixed")
    model = AutoModelForCausalLM.from_pretrained(saved.folder, use_safetensors=True)
    assert torch.equal(logits(model.eval()), logits(loaded(saved.folder)))
