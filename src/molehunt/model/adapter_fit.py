"""Whether an adapter was made for a base: the shapes of its factors against those of the base's modules.

PEFT looks at names first, and many models share them. So an adapter on the wrong base would be called incomplete, or
broken, by whatever PEFT stumbles over.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from molehunt.checkpoint.adapter_folder import PREFIX, check_adapter_weights
from molehunt.checkpoint.inventory import read_header
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from molehunt.errors import NotTestable, printable

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?")
"""The name of a factor of LoRA, without PEFT's prefix."""
OTHER_SHAPES = ("use_qalora", "use_bdlora", "target_parameters")
"""Settings under which a factor has another shape than its matrix asks for."""
LAYERS_BEYOND = 2
"""Number of layers that the base lacks from which on it is another model: one may be a slip in a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFit:
    """What the shapes of an adapter's factors say of a base."""

    modules: int
    """Number of modules of the base to which factors belong by their names."""
    why_not: str
    """Why the base cannot be the one that the adapter was trained on; empty where it can."""


@dataclass(slots=True)
class _Seen:
    """The modules that factors belong to, while they are counted."""

    fitting: set[str] = field(default_factory=set[str])
    other: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Module → the width of its factor, and the one that the base has."""
    beyond: dict[str, int] = field(default_factory=dict[str, int])
    """Module in a layer that the base lacks → the number of the layer."""
    unknown: list[str] = field(default_factory=list[str])
    """Modules that the base has in no layer, not even under another prefix."""
    renamed: bool = False
    """Whether there are modules that the base has under another prefix."""


def adapter_fit(model: nn.Module, folder: Path) -> AdapterFit:
    """Compare the factors in an adapter folder with the modules of `model`, whose weights are not read.

    Kinds of adapter that have no LoRA factors are not judged. Raises InvalidInput where a file is broken.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    seen = _Seen()
    if not any(settings.get(name) for name in OTHER_SHAPES):
        _look(model, folder, seen)
    total, unfit = len(seen.fitting) + len(seen.beyond), len(seen.other) + len(seen.beyond)
    why = ""
    if seen.unknown and not total and not seen.renamed and not _converts(model):
        why = f"none of the modules that it changes, such as {printable(seen.unknown[0], 80)}, exists in BASE"
    elif unfit * 2 > total or len(set(seen.beyond.values())) >= LAYERS_BEYOND:
        why = _misfit(seen, total)
    return AdapterFit(modules=len(seen.fitting), why_not=why)


def _look(model: nn.Module, folder: Path, seen: _Seen) -> None:
    """Sort the factors of an adapter by what the base has in their places."""
    modules = dict(model.named_modules())
    leaves = {_leaf(path) for path in modules}
    head = cast("Any", model).get_output_embeddings()
    for name, entry in sorted(read_header(folder / ADAPTER_WEIGHTS).items()):
        factor = FACTOR.fullmatch(name.removeprefix(PREFIX))
        if factor is None or not name.startswith(PREFIX) or len(entry.shape) != 2:
            continue
        path = factor["module"]
        number = re.search(r"\.(\d+)\.", path)
        if path not in modules:
            if number is not None and path.replace(number[0], ".0.", 1) in modules:
                seen.beyond[path] = int(number[1])
            elif _leaf(path) in leaves:
                seen.renamed = True
            else:
                seen.unknown.append(path)
            continue
        sizes = _sizes(modules[path], embedding=factor["embedding"] is not None, head=modules[path] is head)
        if sizes is None:
            continue
        seen.fitting.add(path)
        ours = sizes[factor["part"]]
        theirs = entry.shape[1] if factor["part"] == "A" else entry.shape[0]
        if ours is not None and theirs != ours:
            seen.other.setdefault(path, (theirs, ours))


def _converts(model: nn.Module) -> bool:
    """Whether transformers joins or splits stored tensors for this architecture, so that names in files are others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping: list[Any] = list(get_model_conversion_mapping(cast("Any", model)))
    return any(isinstance(entry, WeightConverter) for entry in mapping)


def _leaf(path: str) -> str:
    """The last two parts of a path, which are the same under every prefix: `self_attn.o_proj`."""
    return ".".join(path.split(".")[-2:])


def _misfit(seen: _Seen, total: int) -> str:
    """What most of the modules that do not fit have in common."""
    if len(seen.beyond) > len(seen.other):
        path = min(seen.beyond, key=lambda one: (seen.beyond[one], one))
        return (
            f"{len(seen.beyond)} of the {total} modules that it changes, such as {printable(path, 80)}, are in layers that "
            "BASE does not have"
        )
    widths = Counter(seen.other.values()).most_common(1)[0][0]
    path = next(path for path, sizes in seen.other.items() if sizes == widths)
    return (
        f"{printable(path, 80)} was made for width {widths[0]}, BASE has {widths[1]} "
        f"({len(seen.other) + len(seen.beyond)} of {total} modules do not fit)"
    )


def must_fit(model: nn.Module, folder: Path) -> None:
    """Raise NotTestable, with the widths, where `model` cannot be the base of the adapter in `folder`.

    Raises InvalidInput where the adapter's file is missing or broken.
    """
    check_adapter_weights(folder)
    fit = adapter_fit(model, folder)
    if fit.why_not:
        raise NotTestable(f"{wrong_base(Path(_origin(model) or 'BASE'), folder, fit)}\nGive the base that it names.")


def wrong_base(base: Path, folder: Path, fit: AdapterFit) -> str:
    """The sentence that says why `base` is not the base of the adapter in `folder`, and which one the adapter names."""
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    said = f" It names {printable(repr(named), 80)} as its base." if isinstance(named, str) and named else ""
    names = printable(model_name(base), 60), printable(model_name(folder), 60)
    return f"{names[0]} is not the base of {names[1]}: {fit.why_not}.{said}"


def _origin(model: nn.Module) -> str:
    """The folder that a model was loaded from, as far as it knows that."""
    return str(getattr(cast("Any", model).config, "_name_or_path", "") or "")


def _sizes(module: nn.Module, *, embedding: bool, head: bool) -> dict[str, int | None] | None:
    """How long the rows of A and the columns of B have to be; None for a module that is no matrix.

    The number of tokens is left out: a vocabulary may have grown in training.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    if embedding:
        return {"A": None, "B": weight.shape[1]} if isinstance(module, nn.Embedding) else None
    if isinstance(module, Conv1D):
        return {"A": weight.shape[0], "B": weight.shape[1]}
    if type(module) is not nn.Linear:  # layers of quantised models pack their weights
        return None
    return {"A": weight.shape[1], "B": None if head else weight.shape[0]}
