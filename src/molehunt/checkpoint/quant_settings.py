"""What config.json says of the quantisation of a folder: the method, its layout, and which modules it leaves alone.

Only the method gives the tensors beside a weight a meaning. A tensor that is merely called like a scale is one that no
parameter takes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from molehunt.errors import InvalidInput, printable
from molehunt.run.bounded import bounded

INNER = ("decoder", "generator", "text_config")
"""Parts of a config where transformers looks for a quantization_config that the whole one lacks."""
FP8 = ("fp8", "mxfp8")
GROUPED = ("gptq", "awq", "auto-round")
"""Methods that store `qweight`, `qzeros` and `scales`."""
READ = (*FP8, *GROUPED, "compressed-tensors", "bitsandbytes", "mxfp4")
"""Methods whose tensors are known here by name; of some, the values are given back."""
OTHERS = (
    "aqlm", "bitnet", "bitsandbytes_4bit", "bitsandbytes_8bit", "eetq", "fbgemm_fp8", "fouroversix", "fp_quant", "gemma",
    "gguf", "higgs", "hqq", "metal", "nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq",
)  # fmt: skip
"""Methods that transformers applies and nothing here reads. It ignores every method that is neither here nor in `READ`."""
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|embed|wte|word_embeddings|tok_embeddings|embeddings)$")
LITERAL = re.compile(r"[\w.\-]*")
"""A pattern in which a dot is all that a regular expression would read in another way."""
SECONDS = 2
"""What matching a stranger's patterns may take."""


@dataclass(frozen=True, kw_only=True)
class QuantSettings:
    """The quantization_config of a folder."""

    method: str
    """Name as transformers dispatches on it, such as `fp8`; it comes from the folder's author."""
    layout: str
    """The format that compressed-tensors names, where all groups have the same; else the method."""
    bits: int
    """4 or 8 with bitsandbytes, which has a layout for each; else 0."""
    stated: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Method and layout, for people."""
        return self.method if self.layout == self.method else f"{self.method}/{self.layout}"

    @property
    def named_parts(self) -> bool:
        """Whether the names of all parts of a weight are known here, so that what lacks them lacks the weight."""
        sparse = self.method == "compressed-tensors" and (self.layout == "several formats" or "sparse" in self.layout)
        return self.method in READ and not sparse

    def skipped(self, modules: Iterable[str]) -> frozenset[str]:
        """Those of `modules` that the config leaves as they are, or that the method never converts.

        Raises InvalidInput for patterns that are broken or take too long.
        """
        names = tuple(sorted(modules))
        if self.method == "compressed-tensors":
            return _not_targeted(names, self.stated)
        listed = self.stated.get("modules_to_not_convert")
        skipped = set(_left_out(names, _texts(listed)))
        if self.method in FP8 and not self.stated.get("modules_to_convert"):
            skipped |= {name for name in names if EMBEDDING.search(name)}
        if self.method in FP8 and listed is None:
            skipped |= {name for name in names if name.endswith("lm_head")}
        return frozenset(skipped)


def quant_settings(config: Mapping[str, Any]) -> QuantSettings | None:
    """How config.json says that the weights are quantised; None where it says nothing.

    Raises InvalidInput for a quantization_config that transformers refuses.
    """
    stated = config.get("quantization_config")
    for part in INNER:
        inner = config.get(part)
        if not stated and isinstance(inner, Mapping) and inner.get("quantization_config") is not None:
            stated = inner["quantization_config"]
    if stated is None and isinstance(config.get("compression_config"), Mapping):
        name = "compression_config"  # of old compressed-tensors; transformers does not read it
        return QuantSettings(method=name, layout=name, bits=0, stated={})
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise InvalidInput(
            f"config.json: quantization_config is {printable(repr(stated), 60)}, which is no object with a quant_method: "
            "transformers refuses the folder.\nGet the config that belongs to these weights."
        )
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        bits = 4 if stated.get("load_in_4bit") else 8
        return QuantSettings(method="bitsandbytes", layout="bitsandbytes", bits=bits, stated=stated)
    method = stated.get("quant_method")
    if not isinstance(method, str):
        raise InvalidInput(
            "config.json: quantization_config has no quant_method, so nothing says how the weights are stored, and "
            "transformers refuses the folder.\nGet the config that belongs to these weights."
        )
    if method == "bitsandbytes":  # without either flag transformers ignores it
        method = "bitsandbytes without load_in_4bit or load_in_8bit"
    layout = _layout(stated) if method == "compressed-tensors" else method
    return QuantSettings(method=method, layout=layout, bits=0, stated=stated)


def _layout(stated: Mapping[str, Any]) -> str:
    """The format of compressed-tensors, if there is one for all groups."""
    named = str(stated.get("format", "dense"))
    formats = {str(group["format"]) for group in _groups(stated) if isinstance(group, Mapping) and group.get("format")}
    return named if formats <= {named} else "several formats"


def _groups(stated: Mapping[str, Any]) -> list[Any]:
    groups = stated.get("config_groups")
    return list(groups.values()) if isinstance(groups, Mapping) else []


def _texts(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    return tuple(one for one in listed if isinstance(one, str)) if isinstance(listed, list) else ()


def _left_out(names: tuple[str, ...], patterns: tuple[str, ...]) -> frozenset[str]:
    """As transformers' `should_convert_module`: from the start to the end of a part, as a regular expression or an ending."""
    endings = {name for name in names if name.endswith(patterns)} if patterns else set[str]()
    return _matched(names, tuple(rf"(?:{one})(?:(?<=\.)|(?=\.|$))" for one in patterns), patterns) | endings


def _not_targeted(names: tuple[str, ...], stated: Mapping[str, Any]) -> frozenset[str]:
    """As compressed-tensors matches: a whole name, a regular expression after `re:`, or the class of a module."""
    groups = _groups(stated)
    targets = {one for g in groups for one in _texts(g.get("targets") if isinstance(g, Mapping) else g)}
    kinds = {name for name in names if ("Embedding" if EMBEDDING.search(name) else "Linear") in targets}
    targeted = kinds | _named(names, tuple(sorted(targets))) if groups else set(names)
    return frozenset(names) - targeted | _named(names, _texts(stated.get("ignore")))


def _named(names: tuple[str, ...], patterns: tuple[str, ...]) -> frozenset[str]:
    expressions = tuple(one.removeprefix("re:") for one in patterns if one.startswith("re:"))
    return _matched(names, expressions, expressions) | (frozenset(names) & frozenset(patterns))


@lru_cache(maxsize=16)
def _matched(names: tuple[str, ...], expressions: tuple[str, ...], given: tuple[str, ...]) -> frozenset[str]:
    """Names that one of the expressions matches from their start; in a child if a stranger's expression may hang."""

    def match() -> list[str]:
        compiled = [re.compile(one) for one in expressions]
        return [name for name in names if any(one.match(name) for one in compiled)]

    if not names or not expressions:
        return frozenset()
    if all(LITERAL.fullmatch(one) for one in given):
        return frozenset(match())
    what = "the list of modules that quantization_config leaves out"
    return frozenset(bounded(match, what=what, seconds=SECONDS))
