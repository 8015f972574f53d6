import json
import shutil
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molehunt.checkpoint.hub import local_folder
from molehunt.errors import InvalidInput, NotTestable, ShapeMismatch, UsageError
from molehunt.model import pair as pair_module
from molehunt.model.pair import ModelPair
from molehunt.model.taps import read_sites
from molehunt.site import Site
from tiny_models import (
    ARCHITECTURES,
    D_MODEL,
    N_LAYERS,
    VOCAB,
    hooks,
    prompts,
    save,
    tiny_model,
    with_lora,
)

PROMPTS = prompts(lengths=(3, 9, 5, 12))
COMPLETIONS = prompts(seed=1, lengths=(2, 4, 1, 3))
ROWS = [[*p, *c] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
SITES = [Site(0), Site(1, "attn"), Site(1, "mlp")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders by name, read-only: for each architecture a base, a fine-tune and an adapter."""
    root = tmp_path_factory.mktemp("pairs")
    for architecture in ARCHITECTURES:
        save(tiny_model(architecture, seed=0), root / architecture / "base")
        save(tiny_model(architecture, seed=1), root / architecture / "tuned")
        with_lora(tiny_model(architecture, seed=0), architecture).save_pretrained(root / architecture / "lora")
    return root


@torch.inference_mode()
def plain_pass(model, row, sites=SITES):
    """Logits and activations of one row alone, without padding."""
    with read_sites(model, sites) as tap:
        logits = model(torch.tensor([row])).logits
    return logits[0], {site: tap[site][0] for site in sites}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_reading_a_padded_batch_equals_each_row_alone(folders, architecture, padding_side):
    pair = ModelPair.load(folders / architecture / "base", folders / architecture / "tuned")
    assert (pair.n_layers, pair.d_model, pair.vocab_size) == (N_LAYERS, D_MODEL, VOCAB)
    assert (pair.shared, pair.device.type) == (False, "cpu")

    reading = pair.read(PROMPTS, COMPLETIONS, sites=SITES, logits=True, pad_to=20, padding_side=padding_side)

    assert reading.tokens.shape == reading.mask.shape == (4, 20)
    assert reading.base_logits.dtype == torch.float32
    for i, row in enumerate(ROWS):
        assert reading.tokens[i][reading.mask[i]].tolist() == row
        assert bool(reading.mask[i, -1 if padding_side == "left" else 0])
        assert int(reading.mask[i, : reading.decision[i] + 1].sum()) == len(PROMPTS[i])
        for seed, logits, acts in ((0, reading.base_logits, reading.base), (1, reading.tuned_logits, reading.tuned)):
            own_logits, own_acts = plain_pass(tiny_model(architecture, seed=seed), row)
            torch.testing.assert_close(logits[i][reading.mask[i]], own_logits, rtol=1e-4, atol=1e-4)
            for site in SITES:
                torch.testing.assert_close(acts[site][i][reading.mask[i]], own_acts[site], rtol=1e-4, atol=1e-4)


def test_without_logits_the_same_is_read_and_later_blocks_rest(folders):
    pair = ModelPair.load(folders / "llama/base", folders / "llama/tuned")
    full = pair.read(PROMPTS, sites=SITES, logits=True)
    ran = []
    with ExitStack() as stack:
        for enter in (pair.base_model, pair.tuned_model):
            blocks = stack.enter_context(enter()).model.layers
            for i, block in enumerate(blocks):
                block.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))

    short = pair.read(PROMPTS, sites=SITES)

    assert ran == [0, 1, 0, 1]
    assert short.base_logits is short.tuned_logits is None
    assert short.tokens.shape[1] == max(map(len, PROMPTS))
    assert short.decision.tolist() == [len(p) - 1 for p in PROMPTS]
    for site in SITES:
        assert short.base[site].equal(full.base[site])
        assert short.tuned[site].equal(full.tuned[site])


def test_reading_refuses_what_cannot_be_meant(folders):
    pair = ModelPair.load(folders / "llama/base", folders / "llama/tuned")
    with pytest.raises(ValueError, match="nothing to read"):
        pair.read(PROMPTS)
    with pytest.raises(ValueError, match="without tokens"):
        pair.read([[3], []], logits=True)
    with pytest.raises(ValueError, match="12 tokens is longer than pad_to=11"):
        pair.read(PROMPTS, logits=True, pad_to=11)
    with pytest.raises(ValueError, match="padding_side"):
        pair.read(PROMPTS, logits=True, padding_side="both")
    with pytest.raises(ValueError, match="zip"):
        pair.read(PROMPTS, COMPLETIONS[:2], logits=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_off_is_the_base_bit_for_bit_and_on_is_the_merged_model(folders, architecture):
    pair = ModelPair.load(folders / architecture / "base", folders / architecture / "lora")
    assert pair.shared
    with pair.base_model() as base, pair.tuned_model() as tuned:
        assert base is tuned
    plain = tiny_model(architecture)
    merged = with_lora(tiny_model(architecture), architecture).merge_and_unload()
    for row in ROWS:
        with pair.base_model() as base:
            logits, acts = plain_pass(base, row)
        own_logits, own_acts = plain_pass(plain, row)
        assert logits.equal(own_logits)
        assert all(acts[site].equal(own_acts[site]) for site in SITES)

        with pair.tuned_model() as tuned:
            logits, acts = plain_pass(tuned, row)
        own_logits, own_acts = plain_pass(merged, row)
        torch.testing.assert_close(logits, own_logits, rtol=1e-3, atol=1e-3)
        for site in SITES:
            torch.testing.assert_close(acts[site], own_acts[site], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(acts[SITES[0]], plain_pass(plain, row)[1][SITES[0]], atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("logits", [True, False])
def test_one_mixed_pass_reads_what_two_passes_read(folders, architecture, logits, monkeypatch):
    pair = ModelPair.load(folders / architecture / "base", folders / architecture / "lora")
    with pair.tuned_model() as model:
        pass
    before = hooks(model)
    batches = []
    first = dict(model.named_modules())[SITE_ZERO[architecture]]
    counter = first.register_forward_pre_hook(lambda m, args: batches.append(args[0].shape[0]))
    mixed = pair.read(PROMPTS, COMPLETIONS, sites=SITES, logits=logits)
    monkeypatch.setattr(pair_module, "ONE_PASS_UP_TO", 0)
    two = pair.read(PROMPTS, COMPLETIONS, sites=SITES, logits=logits)
    counter.remove()

    assert batches == [8, 4, 4]
    assert hooks(model) == before
    real = mixed.mask
    for site in SITES:
        for ours, theirs in ((mixed.base, two.base), (mixed.tuned, two.tuned)):
            torch.testing.assert_close(ours[site][real], theirs[site][real], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mixed.base[site][real], mixed.tuned[site][real], atol=1e-2)
    if logits:
        torch.testing.assert_close(mixed.base_logits[real], two.base_logits[real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed.tuned_logits[real], two.tuned_logits[real], rtol=1e-4, atol=1e-4)


SITE_ZERO = {
    "gpt2": "base_model.model.transformer.h.0",
    "gpt_neox": "base_model.model.gpt_neox.layers.0",
    **{a: "base_model.model.model.layers.0" for a in ("llama", "qwen3", "gemma3")},
}


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({}, True),
        ({"use_rslora": True, "use_dora": True}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"bias": "all"}, False),
        ({"init_lora_weights": "pissa"}, False),  # takes the adapter's first value out of the base
    ],
)
def test_kinds_of_lora_give_the_base_back_or_load_it_twice(folders, tmp_path, options, shared):
    architecture = "gpt_neox"  # its linear layers have biases
    model = with_lora(tiny_model(architecture), architecture, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert any("modules_to_save" in name for name, _ in model.named_parameters()) == ("modules_to_save" in options)
    model.save_pretrained(tmp_path / "lora")
    pair = ModelPair.load(folders / architecture / "base", tmp_path / "lora")

    reading = pair.read(PROMPTS, sites=SITES, logits=True)

    assert pair.shared == shared
    plain = tiny_model(architecture)
    for i, row in enumerate(PROMPTS):
        base_logits, _ = plain_pass(plain, row)
        tuned_logits, _ = plain_pass(model, row)
        torch.testing.assert_close(reading.base_logits[i][: len(row)], base_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reading.tuned_logits[i][: len(row)], tuned_logits, rtol=1e-4, atol=1e-4)


def copied(folder, to, **changes):
    """A copy of a model folder with keys of its config changed."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def test_an_adapter_beside_weights_must_be_asked_for(folders, tmp_path):
    base, both = folders / "llama/base", shutil.copytree(folders / "llama/tuned", tmp_path / "both")
    for file in (folders / "llama/lora").glob("adapter_*"):
        shutil.copy(file, both)

    with pytest.raises(UsageError, match=r"--adapter applies it, --no-adapter"):
        ModelPair.load(base, both)
    without = ModelPair.load(base, both, adapter=False).read(PROMPTS, logits=True)
    weights_alone = ModelPair.load(base, folders / "llama/tuned").read(PROMPTS, logits=True)
    assert without.tuned_logits.equal(weights_alone.tuned_logits)

    applied = ModelPair.load(base, both, adapter=True)
    assert not applied.shared
    own, _ = plain_pass(with_lora(tiny_model("llama", seed=1), "llama"), PROMPTS[0])
    reading = applied.read(PROMPTS, logits=True)
    torch.testing.assert_close(reading.tuned_logits[0][: len(PROMPTS[0])], own, rtol=1e-4, atol=1e-4)
    assert reading.base_logits.equal(weights_alone.base_logits)

    with pytest.raises(UsageError, match="both holds an adapter"):
        ModelPair.load(both, base)
    with pytest.raises(UsageError, match="holds no adapter"):
        ModelPair.load(base, folders / "llama/tuned", adapter=True)
    with pytest.raises(UsageError, match="only an adapter"):
        ModelPair.load(base, folders / "llama/lora", adapter=False)


def test_tokenizers_that_encode_differently_are_no_pair(folders, tmp_path):
    tuned = shutil.copytree(folders / "llama/tuned", tmp_path / "tuned")
    file = tuned / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["z"] = vocab["z"], vocab["x"]
    file.write_text(json.dumps(content))
    with pytest.raises(NotTestable, match=r"encode .The quick brown fox"):
        ModelPair.load(folders / "llama/base", tuned)


def test_a_fine_tune_without_tokenizer_uses_the_bases_and_padding_is_chosen(folders, tmp_path):
    base = shutil.copytree(folders / "llama/base", tmp_path / "base")
    for file in base.glob("tokenizer_config.json"):
        config = json.loads(file.read_text())
        config.pop("pad_token")
        file.write_text(json.dumps(config))
    tuned = shutil.copytree(folders / "llama/tuned", tmp_path / "tuned")
    for file in tuned.glob("token*"):
        file.unlink()
    pair = ModelPair.load(base, tuned)
    assert pair.tokenizer.pad_token == "</s>"
    assert pair.read(PROMPTS, logits=True).tokens[0, -1] == 2

    for file in (base / "tokenizer.json", base / "tokenizer_config.json"):
        file.unlink()
    with pytest.raises(InvalidInput, match="base cannot be loaded as a tokenizer"):
        ModelPair.load(base, tuned)


def test_pairs_of_other_shapes_are_refused(folders, tmp_path):
    config = type(tiny_model("llama").config)
    narrow = {**tiny_model("llama").config.to_dict(), "intermediate_size": 40}
    save(type(tiny_model("llama"))(config(**narrow)), tmp_path / "narrow")
    with pytest.raises(ShapeMismatch, match=r"mlp.\w+.weight is \[.*48.*\] in the base and \[.*40.*\]"):
        ModelPair.load(folders / "llama/base", tmp_path / "narrow")
    save(tiny_model("llama", n_layers=4), tmp_path / "deeper")
    with pytest.raises(NotTestable, match=r"only the fine-tune has model\.layers\.3"):
        ModelPair.load(folders / "llama/base", tmp_path / "deeper")
    with pytest.raises(NotTestable, match="only the base has"):
        ModelPair.load(tmp_path / "deeper", folders / "llama/base")


def test_broken_folders_are_invalid_input(folders, tmp_path):
    base = folders / "llama/base"
    weights = load_file(base / "model.safetensors")

    lacking = shutil.copytree(base, tmp_path / "lacking")
    kept = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"no model\.layers\.1\.mlp\.down_proj\.weight and lacks 2 tensors more"):
        ModelPair.load(base, lacking)
    kept = {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"no model\.layers\.1\.mlp\.up_proj\.weight; loaders"):
        ModelPair.load(base, lacking)

    truncated = shutil.copytree(base, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="truncated cannot be loaded as a causal language model"):
        ModelPair.load(base, truncated)

    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="safetensors"):
        ModelPair.load(base, pickled)

    for i, changes in enumerate(
        ({"num_hidden_layers": 10_000_000}, {"num_hidden_layers": -1}, {"model_type": "unheard-of"}, {"hidden_size": 7})
    ):
        with pytest.raises(
            (InvalidInput, NotTestable), match=r"cannot be loaded|is believed|not know|no language model|cannot build"
        ):
            ModelPair.load(base, copied(base, tmp_path / f"config-{i}", **changes))

    coded = copied(
        base, tmp_path / "coded", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    )
    (coded / "mine.py").write_text("raise SystemExit('ran the code of a stranger')")
    with pytest.raises((InvalidInput, NotTestable), match=r"coded"):
        ModelPair.load(base, coded)


def test_adapters_that_cannot_be_read_are_refused(folders, tmp_path):
    base = folders / "llama/base"
    pickled = shutil.copytree(folders / "llama/lora", tmp_path / "pickled")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"no adapter_model\.safetensors"):
        ModelPair.load(base, pickled)

    other = shutil.copytree(folders / "llama/lora", tmp_path / "other")
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    with pytest.raises(InvalidInput, match=r"loads nothing: none of its 18 tensors \(such as base_model\..*lora_A"):
        ModelPair.load(base, other)
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}))
    with pytest.raises(NotTestable, match="virtual tokens"):
        ModelPair.load(base, other)
    (other / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"adapter_config\.json is not JSON"):
        ModelPair.load(base, other)
    with pytest.raises(NotTestable, match=r"is not the base of lora: none of the modules .* exists in BASE"):
        ModelPair.load(folders / "gpt2/base", folders / "llama/lora")


def test_dtype_is_fp32_on_a_cpu_unless_asked_for(folders, tmp_path):
    save(tiny_model("llama").bfloat16(), tmp_path / "bf16")
    pair = ModelPair.load(tmp_path / "bf16", folders / "llama/tuned")
    assert pair.read(PROMPTS, logits=True).base_logits.dtype == torch.float32
    pair = ModelPair.load(tmp_path / "bf16", folders / "llama/tuned", dtype=torch.bfloat16)
    reading = pair.read(PROMPTS, logits=True)
    assert reading.base_logits.dtype == reading.tuned_logits.dtype == torch.bfloat16


def test_hub_names_are_looked_up_in_the_cache_when_offline(folders, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny"
    commit = "0" * 40
    shutil.copytree(folders / "llama/base", snapshot / "snapshots" / commit)
    (snapshot / "refs").mkdir()
    (snapshot / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder("someone/tiny") == snapshot / "snapshots" / commit
    assert ModelPair.load("someone/tiny", folders / "llama/tuned").n_layers == N_LAYERS
    for name in ("someone/else", "no folder \x1b[31m", "a/b/c"):
        with pytest.raises(UsageError, match=r"^There is no folder .*, and (the hub's cache has )?no model ") as raised:
            local_folder(name)
        assert "\x1b" not in str(raised.value) and "\\x0a" not in str(raised.value)


def test_what_can_only_be_a_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for name in (tmp_path / "organsm", f"{tmp_path}/organsm", "./organsm", "../demo/organsm"):
        with pytest.raises(UsageError, match=r"^There is no folder \S*organsm\.$"):
            local_folder(name)


def test_progress_bars_are_as_before(folders):
    from transformers.utils import logging

    ModelPair.load(folders / "llama/base", folders / "llama/tuned")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        ModelPair.load(folders / "llama/base", folders / "llama/tuned")
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("name", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there(tmp_path, name: str) -> None:
    save(tiny_model("llama"), tmp_path / "base")
    with pytest.raises(UsageError, match=rf"device {name}"):
        ModelPair.load(tmp_path / "base", tmp_path / "base", device=name)


def test_rows_with_and_without_an_adapter_are_not_mixed_up_where_rows_are_joined() -> None:
    """OPT's MLP takes the tokens of all rows in one dimension."""
    from peft import LoraConfig, get_peft_model

    from molehunt.model.mixed_rows import BASE_ROWS, adapter_by_row, mixes_rows
    from zoo import zoo_model

    config = LoraConfig(target_modules=["fc2", "out_proj"], r=4, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model: Any = get_peft_model(zoo_model("opt"), config).eval()
    assert mixes_rows(model)
    row = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        adapted = model(row).logits[0]
        with model.disable_adapter():
            plain = model(row).logits[0]
        with adapter_by_row(model, [BASE_ROWS, "default"]):
            mixed = model(row.repeat(2, 1)).logits
    torch.testing.assert_close(mixed[0], plain)
    torch.testing.assert_close(mixed[1], adapted)
    assert not torch.allclose(plain, adapted)
