"""The settings of a LoRA adapter, as its adapter_config.json states them: which features are read and which refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molehunt.errors import InvalidInput, NotTestable, printable

MUST_BE_OFF = (
    "use_dora", "layer_replication", "target_parameters", "megatron_config", "use_qalora", "alora_invocation_tokens",
    "arrow_config", "use_bdlora", "eva_config", "corda_config", "loftq_config", "trainable_token_indices",
)  # fmt: skip
"""LoraConfig fields under which the change of a weight is not `scale * B @ A`."""
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal")
"""Initialisations that do not change the base's weights; PiSSA, OLoRA and others do."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The part of adapter_config.json that decides the change of the weights."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int | float]
    rslora: bool
    fan_in_fan_out: bool
    bias: str
    modules_to_save: tuple[str, ...]
    base_model: str | None

    def scale_of(self, module: str) -> float:
        """PEFT's scaling of one module: alpha / r, or alpha / √r with rank stabilisation."""
        rank = matching(self.rank_pattern, module, self.r)
        alpha = matching(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def matching(pattern: Mapping[str, int | float], module: str, default: int | float) -> int | float:
    """The value of the first key that matches the end of `module`, as PEFT matches it."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            raise InvalidInput(f"adapter_config.json: {printable(repr(key), 60)} is not a pattern") from None
    return default


def parse_adapter(config: Mapping[str, Any]) -> LoraSettings:
    """Settings of a LoRA adapter.

    Raises:
        InvalidInput: a field has the wrong type or value.
        NotTestable: the adapter is of another type, or uses a feature whose change is not `scale * B @ A`.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotTestable(
            f"this adapter is of type {printable(str(kind), 40)}; only LoRA is read.\n"
            "Merge it into its base with PEFT's merge_and_unload, and audit the merged folder."
        )
    for name in MUST_BE_OFF:
        if config.get(name):
            raise NotTestable(
                f"this adapter uses {name}: its change is not the product of its factors alone.\n"
                "Merge it into its base with PEFT's merge_and_unload, and audit the merged folder."
            )
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        raise NotTestable(
            f"this adapter was initialised by {printable(str(config['init_lora_weights']), 30)}, which changes the base's "
            "own weights.\nConvert it to a plain LoRA adapter, or merge it and audit the merged folder."
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 1 <= r <= 65536 or type(alpha) not in (int, float):
        raise InvalidInput("adapter_config.json: r must be a natural number and lora_alpha a number")
    patterns: dict[str, dict[str, Any]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(type(v) in (int, float) and v > 0 for v in value.values()):
            raise InvalidInput(f"adapter_config.json: {name} must map module patterns to positive numbers")
        patterns[name] = value
    saved = config.get("modules_to_save") or []
    base = config.get("base_model_name_or_path")
    return LoraSettings(
        r=r,
        alpha=float(alpha),  # pyright: ignore[reportArgumentType]
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        bias=str(config.get("bias") or "none"),
        modules_to_save=tuple(str(name) for name in saved) if isinstance(saved, list) else (str(saved),),
        base_model=str(base) if base else None,
    )
