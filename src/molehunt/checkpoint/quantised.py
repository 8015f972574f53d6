"""Quantised weights: always recognised, dequantised where that is exact, and refused by name where it is not."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molehunt.checkpoint.inventory import Entry
from molehunt.checkpoint.loader_traps import Trap
from molehunt.checkpoint.quant_settings import FP8, GROUPED, OTHERS, QuantSettings, quant_settings
from molehunt.errors import InvalidInput, NotTestable, printable

FP8_SCALES = (".weight_scale_inv", ".scale", ".qscale_weight")
"""Suffixes of what transformers multiplies an fp8 weight with."""
COMPRESSED_SCALE, ZERO_POINT = ".weight_scale", ".weight_zero_point"
EXACT = ("float-quantized", "int-quantized", "naive-quantized")
"""Layouts of compressed-tensors in which the weight is exactly (stored integer or fp8 value − zero point) · scale."""
UNPACKED = ("mxfp4", "pack-quantized")
"""Packed layouts whose values are given back (see `packed_weights`)."""
PACKED = {
    "compressed-tensors": (".weight_packed", ".weight_shape", ".weight_g_idx"),
    **dict.fromkeys(GROUPED, (".qweight", ".qzeros", ".g_idx", ".scales")),
}
"""Suffixes of the parts that a packed weight is stored as, by method."""
QUANT_STATE = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
"""Suffixes that bitsandbytes adds to the name of a 4-bit weight."""
MAX_EDGE = 2**16
"""Greatest edge of a block of weights that share a scale; real ones have 128."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64)
"""Data types of tensors that are not quantised, in a folder of quantised weights."""
WIDE = ("F64", "F32", "F16", "BF16")
"""The same of weights, as a header names them."""
E8M0_BIAS = 127


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weights of a folder were quantised."""

    method: str
    """Name of the method in the config, such as `fp8`, `gptq`, `compressed-tensors/int-quantized`."""
    settings: QuantSettings
    exact: bool
    scales: frozenset[str]
    """Names of tensors that are scales or zero points of others."""
    packed: frozenset[str]
    """Names of tensors of an inexact layout, whose values are not weights."""
    disputed: frozenset[str] = frozenset()
    """Weights of which loaders, or one loader on two machines, make different values."""
    block: tuple[int, int] | None = None
    """Numbers of rows and columns that share a scale, if the config states them."""

    def refuse_disputed(self, name: str) -> None:
        """Raise NotTestable for a weight that loaders disagree on."""
        if name in self.disputed:
            raise NotTestable(
                f"{printable(name)} has parts of {printable(self.method, 40)} beside it and is stored as a plain weight, or "
                "the config leaves it out: loaders disagree on its values.\nGet the model as its author saved it."
            )

    def dequantise(self, name: str, stored: Tensor, scale_of: Callable[[str], Tensor]) -> Tensor:
        """The weight that `stored` encodes, in fp32; `stored` itself if it was not quantised.

        Raises NotTestable for a tensor of an inexact layout, for a weight that loaders disagree on, and for a scale that is
        missing or does not fit.
        """
        self.refuse_disputed(name)
        module = name.removesuffix(".weight")
        suffixes = (*FP8_SCALES, COMPRESSED_SCALE) if name.endswith(".weight") else ()
        scale_name = next((module + suffix for suffix in suffixes if module + suffix in self.scales), None)
        if name in self.packed or (scale_name is None and stored.dtype not in PLAIN):
            raise NotTestable(
                f"{printable(name)} is quantised by {printable(self.method, 40)}, which cannot be undone exactly.\n"
                "Compare the unquantised release, or the adapter that was merged into it."
            )
        if scale_name is None:
            return stored
        value, scale = stored.float(), _spread(_factor(scale_of(scale_name)), stored, name, self.block)
        if module + ZERO_POINT in self.scales:
            value = value - _spread(scale_of(module + ZERO_POINT).float(), stored, name, self.block)
        return value * scale

    def traps(self) -> list[Trap]:
        """The finding on weights that loaders disagree on."""
        if not self.disputed:
            return []
        what = (
            f"{len(self.disputed)} weights, such as {printable(min(self.disputed), 80)}, have parts of "
            f"{printable(self.method, 40)} beside them that some loaders apply and others do not"
        )
        return [Trap("disputed weights", what, "finding")]


def recognise(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Quantisation | None:
    """The quantisation that config.json states for the stored tensors; None for plain weights.

    A name alone makes no scale: without a quantization_config, loaders take the weight as it is stored.

    Raises InvalidInput for blocks that no model has, and for a quantization_config that transformers refuses.
    """
    settings = quant_settings(config)
    if settings is None:
        return None
    parts = _parts(entries)
    scales: set[str] = set()
    disputed: set[str] = set()
    packed = _packed(settings, entries, parts)
    if settings.method in FP8:
        scales, disputed = _fp8_scales(settings, entries, parts, str(config.get("model_type")))
    elif settings.layout in EXACT and not packed:
        scales, disputed = _compressed_scales(settings, entries, parts)
    else:
        disputed = _beside(settings, entries, parts)
    exact = settings.layout in (*EXACT, *FP8, *UNPACKED) and (settings.layout in UNPACKED or not packed)
    return Quantisation(
        method=settings.label,
        settings=settings,
        exact=exact and not disputed,
        scales=frozenset(scales),
        packed=frozenset(packed),
        disputed=frozenset(disputed),
        block=_block_edges(settings.stated),
    )


def _parts(names: Iterable[str]) -> dict[str, set[str]]:
    """Module with a stored weight → the rest of the names of all else that is stored of it, with the dot in front."""
    known = frozenset(names)
    found: dict[str, set[str]] = {}
    for name in known:
        for module in {name.rpartition(".")[0], name.partition(".weight.")[0]}:
            if f"{module}.weight" in known and name not in (f"{module}.weight", f"{module}.bias"):
                found.setdefault(module, set()).add(name.removeprefix(module))
    return found


def _fp8_scales(
    settings: QuantSettings, entries: Mapping[str, Entry], parts: Mapping[str, set[str]], kind: str
) -> tuple[set[str], set[str]]:
    """Scales, and the weights whose scale counts or not as the machine has it: transformers multiplies all on a processor.

    On a GPU it does so only with weights in fp8 of linear layers that the config does not leave out.
    """
    suffixes = tuple(one for one in FP8_SCALES if one != ".scale" or not kind.startswith("inkling2"))
    scaled = {module: found for module, names in parts.items() if (found := names & set(suffixes))}
    skipped = settings.skipped(scaled)
    disputed: set[str] = set()
    for module, found in scaled.items():
        entry = entries[f"{module}.weight"]
        fits = entry.dtype.startswith("F8") and len(entry.shape) >= 2 and len(found) == 1
        if not fits or module in skipped:
            disputed.add(entry.name)
    return {module + suffix for module, found in scaled.items() for suffix in found}, disputed


def _compressed_scales(
    settings: QuantSettings, entries: Mapping[str, Entry], parts: Mapping[str, set[str]]
) -> tuple[set[str], set[str]]:
    """Scales and zero points of the modules that compressed-tensors converts, and those of them stored as wide numbers."""
    scaled = {module: names for module, names in parts.items() if COMPRESSED_SCALE in names}
    skipped = settings.skipped(scaled)
    used = {module: names & {COMPRESSED_SCALE, ZERO_POINT} for module, names in scaled.items() if module not in skipped}
    wide = {f"{module}.weight" for module in used if entries[f"{module}.weight"].dtype in WIDE}
    return {module + suffix for module, names in used.items() for suffix in names}, wide


def _beside(settings: QuantSettings, entries: Mapping[str, Entry], parts: Mapping[str, set[str]]) -> set[str]:
    """Plain weights that parts of the method lie beside."""
    if settings.method == "mxfp4":
        stems = {stem for name in entries if (stem := name.removesuffix("_blocks")) != name}
        return {stem for stem in stems if stem in entries} | settings.skipped(stems)
    found: set[str] = set()
    skipped = settings.skipped(parts) if settings.method in (*GROUPED, "compressed-tensors") else frozenset[str]()
    for module, names in parts.items():
        weight = entries[f"{module}.weight"]
        if settings.method == "bitsandbytes":
            beside = ".SCB" in names if settings.bits == 8 else any(n.startswith(".weight.") for n in names)
        elif settings.method in GROUPED:
            beside = ".qweight" in names
        else:
            beside = settings.method in (*OTHERS, "compressed-tensors")
        packed_too = settings.method in GROUPED or ".weight_packed" in names
        if beside and module not in skipped and (weight.dtype in WIDE or packed_too):
            found.add(weight.name)
    return found


def _packed(settings: QuantSettings, entries: Mapping[str, Entry], parts: Mapping[str, set[str]]) -> set[str]:
    """Names of the tensors that are parts of packed weights."""
    if settings.method == "bitsandbytes":
        return _bitsandbytes(parts, settings.bits)
    suffixes = PACKED.get(settings.method, ())
    modules = {name: name.removesuffix(s) for name in entries for s in suffixes if name.endswith(s)}
    skipped = settings.skipped(modules.values()) if modules else frozenset[str]()
    return {name for name, module in modules.items() if module not in skipped}


def _bitsandbytes(parts: Mapping[str, set[str]], bits: int) -> set[str]:
    """Names of the quantisation states that bitsandbytes stores, and of the weights that they belong to."""
    found: set[str] = set()
    for module, names in parts.items():
        states = (
            {n for n in names if n.endswith(QUANT_STATE) or ".quant_state." in n} if bits == 4 else names & {".SCB"}
        )
        if states:
            found |= {f"{module}.weight", *(module + n for n in states)}
    return found


def _factor(scale: Tensor) -> Tensor:
    """A scale in fp32; of bytes, each is an exponent (E8M0), as transformers reads them."""
    return (scale.float() - E8M0_BIAS).exp2() if scale.dtype == torch.uint8 else scale.float()


def _block_edges(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block edges from `weight_block_size` (fp8) or the one `block_structure` of compressed-tensors."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [g.get("weights") for g in groups if isinstance(g, Mapping)]
    sizes = [settings.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, Mapping))]
    fit = {tuple(s) for s in sizes if isinstance(s, list) and len(s) == 2 and all(type(e) is int and e > 0 for e in s)}
    if any(edge > MAX_EDGE for edges in fit for edge in edges):
        raise InvalidInput(
            f"config.json says that blocks of {printable(str([list(edges) for edges in fit]), 60)} weights share a scale; "
            f"edges of up to {MAX_EDGE} are believed.\nGet the config that belongs to these weights."
        )
    return fit.pop() if len(fit) == 1 else None


def _spread(scale: Tensor, stored: Tensor, name: str, block: tuple[int, int] | None) -> Tensor:
    """`scale` repeated to the shape of `stored`: it is one number, one per row, or one per block."""
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.ndim == 1 and len(scale) == len(stored):
        return scale.reshape(-1, *[1] * (stored.ndim - 1))
    if scale.ndim == 2 and stored.ndim == 2:
        for rows, columns in ([] if block is None else [block]) + [_even_block(scale, stored)]:
            if rows and columns and [-(-stored.shape[0] // rows), -(-stored.shape[1] // columns)] == list(scale.shape):
                spread = scale.repeat_interleave(min(rows, len(stored)), 0)[: len(stored)]
                return spread.repeat_interleave(min(columns, stored.shape[1]), 1)[:, : stored.shape[1]]
    raise NotTestable(
        f"the scale of {printable(name)} has the shape {list(scale.shape)}, which does not fit {list(stored.shape)}"
    )


def _even_block(scale: Tensor, stored: Tensor) -> tuple[int, int]:
    """Edge lengths of equal blocks; 0 where the division leaves a remainder, because block limits are then unknown."""
    rows, columns = (w // s if s and w % s == 0 else 0 for w, s in zip(stored.shape, scale.shape, strict=True))
    return rows, columns
