"""Ways of saving all weights of a fine-tune in plain numbers."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from experiments.what_is_read.alphabet import tokenizer
from experiments.what_is_read.case import Case, Saving, pair_in_memory, save, whole
from experiments.what_is_read.zoo import VOCAB

WEIGHTS = "model.safetensors"
SMALL = "20KB"
TIED = ("llama", "qwen2", "gemma2", "gemma3", "mistral", "smollm3", "mamba", "qwen3_moe")
"""Architectures whose releases tie their head to their embedding, and some that may."""
SEVERAL = ("llama", "qwen2", "gpt2", "gemma3", "qwen3_moe", "gpt_oss", "gemma3_with_vision", "mamba", "jamba", "bert")
"""Architectures for ways of saving that do not depend on what is saved."""
GROWN = ("llama", "qwen3", "gemma2", "gpt2", "mamba", "qwen3_moe", "gemma3_with_vision")


def sharded(model: nn.Module, folder: Path) -> None:
    save(model, folder, max_shard_size=SMALL)


def in_memory_format(model: nn.Module, folder: Path) -> None:
    save(model, folder, save_original_format=False)


def in_memory_shards(model: nn.Module, folder: Path) -> None:
    save(model, folder, save_original_format=False, max_shard_size=SMALL)


def renamed(prefix: str, model: nn.Module, folder: Path) -> None:
    """All tensors below a prefix, as a state dict of a wrapped module has them."""
    save(model, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({f"{prefix}{name}": one for name, one in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def compiled(model: nn.Module, folder: Path) -> None:
    renamed("_orig_mod.", model, folder)


def parallel(model: nn.Module, folder: Path) -> None:
    renamed("module.", model, folder)


def body_only(model: nn.Module, folder: Path) -> None:
    """The model without its head, as `AutoModel` holds it; config.json still names the whole."""
    cast("Any", model).base_model.save_pretrained(folder)
    cast("Any", model).config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def bf16(model: nn.Module, folder: Path) -> None:
    save(model.to(torch.bfloat16), folder)


def fp16(model: nn.Module, folder: Path) -> None:
    save(model.to(torch.float16), folder)


def trainer_checkpoint(model: nn.Module, folder: Path) -> None:
    """What a Trainer leaves in checkpoint-500: pickles of its own state lie beside the weights."""
    save(model, folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"step": 500}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 500, "log_history": []}))


def with_head_of_its_own(model: nn.Module, folder: Path) -> None:
    """A tied head that the file has all the same."""
    save(model, folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = cast("Any", model).get_output_embeddings().weight.detach().clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(model: nn.Module, folder: Path) -> None:
    save(model, folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def rounded(dtype: torch.dtype, architecture: str, folder: Path) -> Case:
    made = whole(bf16 if dtype == torch.bfloat16 else fp16)(architecture, folder)
    return replace(made, tuned_model=copy.deepcopy(made.tuned_model).to(dtype).float())


def consolidated(architecture: str, folder: Path) -> Case:
    """Mistral's own file beside the sharded ones, on both sides: the same weights under other names."""
    made = whole(sharded)(architecture, folder)
    for side, model in ((made.base, made.base_model), (made.tuned, made.tuned_model), (made.copy, made.base_model)):
        state = {name.replace("model.", "", 1): one.detach().clone() for name, one in model.named_parameters()}
        save_file(state, cast("Path", side) / "consolidated.safetensors")
    return made


def hub_snapshot(architecture: str, folder: Path) -> Case:
    """Three repositories in the hub's cache: blobs named by their hash, links to them, and a ref."""
    from huggingface_hub.file_download import repo_folder_name

    made = whole(save)(architecture, folder)
    cache, found = folder / "cache", dict[str, Path]()
    for side in ("base", "tuned", "copy"):
        repo = cache / repo_folder_name(repo_id=f"matrix/{architecture}-{side}", repo_type="model")
        commit = hashlib.sha1(side.encode()).hexdigest()
        snapshot = repo / "snapshots" / commit
        for part in ("blobs", "refs"):
            (repo / part).mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        for file in sorted((folder / side).iterdir()):
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.move(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        (folder / side).rmdir()
        found[side] = snapshot
    return replace(made, base=found["base"], tuned=found["tuned"], copy=found["copy"])


def hub_id(architecture: str, folder: Path) -> Case:
    """The same, given by name: commands look it up in the cache."""
    made = hub_snapshot(architecture, folder)
    names = {side: Path(f"matrix/{architecture}-{side}") for side in ("base", "tuned", "copy")}
    return replace(made, **names, cache=folder / "cache")


def grown(added: int, rows: int, architecture: str, folder: Path) -> Case:
    """A vocabulary with more rows, for so many added tokens."""
    base, tuned = pair_in_memory(architecture)
    save(base, folder / "base")
    for name, model in (("copy", copy.deepcopy(base)), ("tuned", tuned)):
        torch.manual_seed(1)
        cast("Any", model).resize_token_embeddings(VOCAB + rows, mean_resizing=False)
        save(model, folder / name)
        tokenizer(added).save_pretrained(folder / name)
    return Case(base=folder / "base", tuned=folder / "tuned", copy=folder / "copy", base_model=base, tuned_model=tuned)


def added_tokens(architecture: str, folder: Path) -> Case:
    return grown(4, 4, architecture, folder)


def padded_vocabulary(architecture: str, folder: Path) -> Case:
    return grown(0, 32, architecture, folder)


NOT_LOADED = "no loader finds these names: every weight would be random"
WHOLE: tuple[Saving, ...] = (
    Saving(name="single", what="one model.safetensors, as `save_pretrained` writes it", make=whole(save)),
    Saving(name="sharded", like_single=True, what="shards of 20 KB with their index", make=whole(sharded)),
    Saving(
        name="in-memory", like_single=True,
        what="`save_original_format=False`: fused experts, today's names",
        make=whole(in_memory_format),
    ),
    Saving(name="in-memory-shards", on=SEVERAL, like_single=True, what="the same in shards", make=whole(in_memory_shards)),
    Saving(
        name="bf16", what="bf16 against a base in fp32", make=lambda a, f: rounded(torch.bfloat16, a, f), rounding=8e-3,
        tolerance=2e-2,
    ),
    Saving(
        name="fp16", on=SEVERAL, what="fp16 against a base in fp32", make=lambda a, f: rounded(torch.float16, a, f), rounding=1e-3,
        tolerance=3e-3,
    ),
    Saving(name="hub-snapshot", on=SEVERAL, like_single=True, what="a snapshot folder of the hub's cache: links to blobs", make=hub_snapshot),
    Saving(name="hub-id", on=SEVERAL, like_single=True, what="a hub id, found in the cache without a network", make=hub_id),
    Saving(name="checkpoint", on=SEVERAL, like_single=True, what="a Trainer's checkpoint folder, with its pickles", make=whole(trainer_checkpoint)),
    Saving(
        name="compiled", what="names below `_orig_mod.`, from a compiled model", make=whole(compiled),
        may=("files", "directions", "read", "audit", "watch"), why=NOT_LOADED, finding=".", loads=False,
    ),
    Saving(
        name="parallel", what="names below `module.`, from a data-parallel one", make=whole(parallel), on=("llama", "gpt2"),
        may=("files", "directions", "read", "audit", "watch"), why=NOT_LOADED, finding=".", loads=False,
    ),
    Saving(name="body-tied", what="the model without its (tied) head, as `AutoModel` saves it",
           make=whole(body_only, tie_word_embeddings=True), on=TIED),
    Saving(
        name="body-untied", what="the model without its head, which is not tied", make=whole(body_only),
        on=tuple(name for name in TIED if name != "smollm3"),
        may=("files", "directions", "read", "audit", "watch"), why="the head would be random", finding=".", loads=False,
    ),
    Saving(name="tied", what="head tied to the embedding", make=whole(save, tie_word_embeddings=True), on=TIED),
    Saving(
        name="tied-with-head", what="a tied head that the file has all the same",
        make=whole(with_head_of_its_own, tie_word_embeddings=True), on=TIED,
    ),
    Saving(name="added-tokens", what="four added tokens, and a row for each", make=added_tokens, on=GROWN),
    Saving(name="padded-vocabulary", what="32 rows more than the tokenizer has tokens", make=padded_vocabulary, on=GROWN),
    Saving(
        name="consolidated", like_single=True, what="consolidated.safetensors beside the shards, on both sides", make=consolidated,
        on=("mistral", "mixtral", "llama"), finding="consolidated",
    ),
    Saving(
        name="pickled", what="pytorch_model.bin and nothing else", make=whole(pickled), on=("llama", "gpt2", "opt", "bert"),
        may=("files", "directions", "read", "audit", "watch"), why="no pickle is opened", loads=False,
    ),
)  # fmt: skip
