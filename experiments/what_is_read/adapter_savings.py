"""Ways of saving a fine-tune as an adapter of PEFT, and what each one does to the weights, by PEFT's own merge."""

import copy
import importlib
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from experiments.what_is_read.alphabet import tokenizer
from experiments.what_is_read.case import Case, Saving, save
from experiments.what_is_read.planted import Plant, plants
from experiments.what_is_read.zoo import zoo_model

TENSORS = "adapter_model.safetensors"
SEVERAL = ("llama", "gpt2", "gemma3", "qwen3_moe", "gemma3_with_vision", "mamba")
PLAIN = ("llama", "gemma3")
RENAMED = ("qwen3_moe", "gemma3_with_vision")
"""Architectures whose stored names transformers converts; PEFT hands the names of an adapter through the same tables."""
RANK = 4
Options = Callable[[nn.Module, list[str]], dict[str, Any]]


def adapter(
    kind: str = "Lora", options: Options = lambda model, modules: {}, *, tied: bool = False, zero: bool = True
) -> Callable[[str, Path], Case]:
    """A case whose fine-tune is an adapter.

    Args:
        kind: the beginning of the name of PEFT's config class.
        options: settings besides rank and modules, from the model and the modules that are changed.
        tied: whether the base's head is its embedding.
        zero: whether a fresh adapter of this kind changes nothing, so that one can be saved as the unchanged copy.
    """

    def make(architecture: str, folder: Path) -> Case:
        changed = {"tie_word_embeddings": True} if tied else {}
        base = zoo_model(architecture, **changed)
        save(base, folder / "base")
        for name in ("copy", "tuned"):
            model = wrapped(base, kind, options, folder / "base")
            if name == "tuned":
                fill_(model, plants(base, only_linear=True))
            model.save_pretrained(folder / name)
        merged = copy.deepcopy(model).merge_and_unload()
        return Case(
            base=folder / "base",
            tuned=folder / "tuned",
            copy=folder / "copy" if zero else None,
            base_model=base,
            tuned_model=cast("nn.Module", merged),
            running=model,
        )

    return make


def wrapped(base: nn.Module, kind: str, options: Options, folder: Path) -> Any:
    """A PEFT model around a copy of the base."""
    peft: Any = importlib.import_module("peft")
    model: Any = copy.deepcopy(base)
    model.name_or_path = str(folder)
    modules = [one.name.removesuffix(".weight") for one in plants(base, only_linear=True)]
    settings: dict[str, Any] = {"target_modules": modules, "task_type": "CAUSAL_LM"}
    if kind in ("Lora", "LoHa", "Vera"):
        settings["r"] = RANK
    if kind == "Lora":
        settings |= {"lora_alpha": 8, "fan_in_fan_out": type(base).__name__.startswith("GPT2")}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, f"{kind}Config")(**{**settings, **options(base, modules)})
        found = peft.get_peft_model(model, config).eval()
    found.peft_config["default"].base_model_name_or_path = str(folder)
    return found


@torch.no_grad()
def fill_(model: Any, what: list[Plant]) -> None:
    """Give plain LoRA factors the planted change, and every other trained parameter a random one."""
    planted, rng = {one.name.removesuffix(".weight"): one for one in what}, torch.Generator().manual_seed(4)
    factors: set[str] = set()
    for name, module in model.named_modules():
        one = planted.get(name.removeprefix("base_model.model."))
        pairs = getattr(module, "lora_A", None)
        if one is None or not pairs or "default" not in pairs:
            continue
        conv = type(module.base_layer).__name__ == "Conv1D"  # stored [in out]
        read, write = (one.write, one.read) if conv else (one.read, one.write)
        a, b = pairs["default"].weight, module.lora_B["default"].weight
        a[:] = 0
        b[:] = 0
        a[0], b[:, 0] = read, one.sigma / module.scaling["default"] * write
        factors |= {f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in factors:
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)


def merged_lora(architecture: str, folder: Path) -> Case:
    """LoRA, merged, and saved whole."""
    made = adapter()(architecture, folder)
    for side, model in ((made.tuned, made.tuned_model), (made.copy, made.base_model)):
        shutil.rmtree(cast("Path", side))
        save(model, cast("Path", side))
    return replace(made, running=None)


def with_config_beside(architecture: str, folder: Path) -> Case:
    """LoRA with the base's config.json and tokenizer beside, as some trainers leave it; there are no full weights."""
    made = adapter()(architecture, folder)
    for side in (made.tuned, made.copy):
        shutil.copy(made.base / "config.json", cast("Path", side))
        tokenizer().save_pretrained(cast("Path", side))
    return made


def beside_weights(use: bool, architecture: str, folder: Path) -> Case:
    """The base's weights with the adapter in the same folder, with and without which they are read."""
    made = adapter()(architecture, folder)
    for side in (made.tuned, made.copy):
        save(made.base_model, cast("Path", side))
    if use:
        return replace(made, options=("--adapter",))
    return replace(made, options=("--no-adapter",), tuned_model=made.base_model, running=None)


def unprefixed(architecture: str, folder: Path) -> Case:
    """Factors without the prefix that PEFT's own names have."""
    return renamed(lambda name: name.removeprefix("base_model.model."), architecture, folder)


def renamed(change: Callable[[str], str], architecture: str, folder: Path) -> Case:
    """Factors under other names than `save_pretrained` gives them."""
    made = adapter()(architecture, folder)
    for side in (made.tuned, made.copy):
        file = cast("Path", side) / TENSORS
        save_file({change(name): one for name, one in load_file(file).items()}, file)
    return made


def with_adapter_name(name: str) -> str:
    return name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight")


@torch.no_grad()
def halved(architecture: str, folder: Path) -> Case:
    """Factors in bf16, as most training leaves them."""
    made = adapter()(architecture, folder)
    for side in (made.tuned, made.copy):
        file = cast("Path", side) / TENSORS
        save_file({name: one.to(torch.bfloat16) for name, one in load_file(file).items()}, file)
    running: Any = made.running
    for name, parameter in running.named_parameters():
        if ".lora_" in name:
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return replace(made, tuned_model=cast("nn.Module", copy.deepcopy(running).merge_and_unload()))


def ends(modules: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in modules})


def embeddings(base: nn.Module, modules: list[str]) -> dict[str, Any]:
    names = {id(one): name for name, one in base.named_modules()}
    return {"target_modules": [*modules, names[id(cast("Any", base).get_input_embeddings())]]}


def head(base: nn.Module, modules: list[str]) -> dict[str, Any]:
    names = {id(one): name.rpartition(".")[2] for name, one in base.named_modules()}
    return {"modules_to_save": [names[id(cast("Any", base).get_output_embeddings())]]}


def feed_forward(base: nn.Module, modules: list[str]) -> dict[str, Any]:
    return {"feedforward_modules": [name for name in modules if "down" in name]}


NOT_PLAIN = "its change is no product of stored factors"
LORA: tuple[tuple[str, str, Callable[[str, Path], Case], tuple[str, ...] | None], ...] = (
    ("lora", "plain LoRA", adapter(), None),
    ("lora-merged", "LoRA, merged and saved whole", merged_lora, None),
    ("lora-config", "LoRA with the base's config.json and tokenizer beside", with_config_beside, SEVERAL),
    ("lora-layers", "LoRA by `layers_to_transform`", adapter(options=lambda base, modules: {
        "target_modules": ends(modules), "layers_to_transform": [1]}), PLAIN),
    ("lora-patterns", "LoRA with a rank and an alpha of its own for one module", adapter(options=lambda base, modules: {
        "rank_pattern": {modules[0]: 2}, "alpha_pattern": {modules[0]: 5}}), SEVERAL),
    ("lora-bias", "LoRA with `lora_bias`", adapter(options=lambda base, modules: {"lora_bias": True}), ("opt", "starcoder2")),
    ("rslora", "rsLoRA", adapter(options=lambda base, modules: {"use_rslora": True}), SEVERAL),
    ("vera", "VeRA", adapter("Vera"), PLAIN),
    ("loha", "LoHa", adapter("LoHa"), PLAIN),
    ("ia3", "IA³", adapter("IA3", feed_forward), PLAIN),
    ("pissa", "LoRA started by PiSSA", adapter(options=lambda base, modules: {"init_lora_weights": "pissa"}, zero=False),
     PLAIN),
    ("modules-to-save", "LoRA with a trained head", adapter(options=head), SEVERAL),
    ("lora-embedding", "LoRA on the embedding, too", adapter(options=embeddings), PLAIN),
    ("lora-embedding-tied", "the same where the head is the embedding", adapter(options=embeddings, tied=True), PLAIN),
    ("token-indices", "LoRA with `trainable_token_indices`", adapter(options=lambda base, modules: {
        "trainable_token_indices": [5, 9]}), PLAIN),
    ("target-parameters", "LoRA on experts in one parameter", adapter(options=lambda base, modules: {
        "target_modules": modules[:1], "target_parameters": ["mlp.experts.down_proj"]}), ("qwen3_moe", "mixtral")),
)  # fmt: skip
ADAPTERS: tuple[Saving, ...] = (
    *(Saving(name=name, what=what, make=make, on=on) for name, what, make, on in LORA),
    Saving(
        name="dora", what="DoRA", make=adapter(options=lambda base, modules: {"use_dora": True}), on=SEVERAL,
        rounding=1e-6,  # of m · W / ‖W‖, which is computed
    ),
    Saving(name="lora-bf16", what="LoRA with its factors in bf16", make=halved, on=SEVERAL),
    Saving(
        name="beside-used", what="LoRA beside full weights, with `--adapter`", make=lambda a, f: beside_weights(True, a, f),
        on=PLAIN, finding="adapter", may=("directions", "watch"), why="directions come from weights or from an adapter",
    ),
    Saving(
        name="beside-ignored", what="LoRA beside full weights, with `--no-adapter`",
        make=lambda a, f: beside_weights(False, a, f), on=PLAIN, finding="adapter", may=("watch",),
        why="without the adapter nothing changed",
    ),
    Saving(
        name="lora-default", what="LoRA whose keys have the adapter's name, as a raw state dict has them",
        make=lambda a, f: renamed(with_adapter_name, a, f), on=SEVERAL,
    ),
    Saving(
        name="lora-unprefixed", what="LoRA without `base_model.model.` in its keys",
        make=unprefixed, on=tuple(name for name in SEVERAL if name not in RENAMED), finding=".",
        may=("files", "directions", "read", "audit", "watch"), why="PEFT loads none of its factors", loads=False,
    ),
    Saving(
        name="lora-unprefixed-renamed", on=tuple(name for name in SEVERAL if name in RENAMED), make=unprefixed,
        what="the same where transformers' conversion tables give PEFT the names",
    ),
)  # fmt: skip
"""Adapters for decoders; encoders and encoder–decoders are refused before an adapter matters."""
