"""What adapter_config.json says about an adapter: of which kind it is, and how its change of the model can be read.

Every field that PEFT knows is in one of the lists below. A field that is in none of them and is switched on makes the
adapter not testable: a PEFT that knows it would compute something else than what was read here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from molehunt.errors import InvalidInput, NotTestable, printable

Reading = Literal["factors", "effect", "none"]
HARMLESS = frozenset({
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "runtime_config", "qalora_group_size", "megatron_core",
    # read only while an initialisation or a training of that name runs
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
"""Fields that change no output of a trained LoRA adapter."""
READ = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "task_type",
    "init_lora_weights",
})  # fmt: skip
"""Fields of LoRA that decide which matrices change and by what product; PEFT itself applies them to the base's names."""
BY_EFFECT = frozenset({
    "use_dora", "trainable_token_indices", "target_parameters", "ensure_weight_tying", "kasa_config", "monteclora_config",
    "velora_config", "use_bdlora", "use_qalora", "arrow_config",
})  # fmt: skip
"""Fields under which the change is not the product of two factors: the adapter is loaded and its effect is measured."""
NOT_A_CHANGE = {
    "layer_replication": "it repeats blocks, so its blocks are not those of the base",
    "alora_invocation_tokens": "it acts only on what follows certain tokens, so it is not one change of the weights",
    "megatron_config": "it is made for layers of Megatron, which transformers does not build",
}
PLAIN_INIT = (True, False, None, "true", "gaussian", "orthogonal", "eva")
"""Initialisations after which the base's weights are as they were; PiSSA, OLoRA, CorDA and LoftQ change them."""
VIRTUAL_TOKENS = "it trains virtual tokens in front of the prompt and changes no weight"
MIXTURE = "it mixes several adapters as the input asks for them, so it is not one change of the weights"
NO_WEIGHT_CHANGE = {
    "PROMPT_TUNING": VIRTUAL_TOKENS, "MULTITASK_PROMPT_TUNING": VIRTUAL_TOKENS, "P_TUNING": VIRTUAL_TOKENS,
    "PREFIX_TUNING": VIRTUAL_TOKENS, "CPT": VIRTUAL_TOKENS, "CARTRIDGE": VIRTUAL_TOKENS,
    "ADAPTION_PROMPT": "it puts trained vectors into the attention and changes no weight",
    "XLORA": MIXTURE, "POLY": MIXTURE,
    "SHADOW": "it runs a second, small model beside the base and changes no weight",
}  # fmt: skip
MERGE = "Merge it into its base with PEFT's merge_and_unload, and audit the merged folder."
TEXT_TASKS = (None, "", "CAUSAL_LM", "FEATURE_EXTRACTION")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The part of adapter_config.json that says how the adapter is read."""

    kind: str
    """PEFT's name of the type, such as `LORA`; it comes from the folder's author."""
    reading: Reading
    """Whether the change is read from LoRA factors, from the loaded model, or not at all."""
    why: str
    """Why the factors are not enough; empty if they are."""
    r: int | None
    rank_pattern: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    base_model: str | None
    """Name or path of the base as the author had it."""

    def check_readable(self) -> None:
        """Raises NotTestable when the adapter is no change of weights, or one that nothing here knows."""
        if self.reading == "none":
            raise NotTestable(f"this adapter ({printable(self.kind, 40)}) is not read: {self.why}.\n{MERGE}")


def parse_adapter(config: Mapping[str, Any]) -> AdapterSettings:
    """How an adapter is read, from its adapter_config.json.

    Raises InvalidInput when a field has the wrong type or value.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not kind:
        raise InvalidInput("adapter_config.json has no peft_type: nothing says how the tensors act.\nFetch it again.")
    patterns = _checked_lora(config) if kind == "LORA" else {}
    reading, why = _reading(kind, config)
    saved, base, r = config.get("modules_to_save") or [], config.get("base_model_name_or_path"), config.get("r")
    return AdapterSettings(
        kind=kind,
        reading=reading,
        why=why,
        r=r if type(r) is int else None,
        rank_pattern=patterns,
        modules_to_save=tuple(str(name) for name in saved) if isinstance(saved, list) else (str(saved),),
        base_model=str(base) if base else None,
    )


def _reading(kind: str, config: Mapping[str, Any]) -> tuple[Reading, str]:
    if kind in NO_WEIGHT_CHANGE:
        return "none", NO_WEIGHT_CHANGE[kind]
    task = config.get("task_type")
    if task not in TEXT_TASKS:
        return "none", f"it is made for the task {printable(str(task), 40)}; Molehunt reads models that continue a text"
    if kind != "LORA":
        return "effect", f"{printable(kind, 40)} is no product of two factors"
    on = sorted(name for name, value in config.items() if _is_on(value))
    for name in on:
        if name in NOT_A_CHANGE:
            return "none", f"it uses {name}: {NOT_A_CHANGE[name]}"
    unknown = [name for name in on if name not in HARMLESS | READ | BY_EFFECT]
    if unknown:
        return "none", f"its adapter_config.json sets {_listed(unknown)}, and no PEFT that Molehunt knows has that"
    special = [name for name in on if name in BY_EFFECT]
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INIT:
        special.append(f"init_lora_weights = {printable(str(init), 30)}")
    return ("effect", f"it uses {_listed(special)}") if special else ("factors", "")


def _is_on(value: Any) -> bool:
    """Whether a field does something: an empty object may, as `kasa_config: {}` does."""
    return isinstance(value, dict) or bool(value)


def _listed(names: list[str]) -> str:
    return printable(", ".join(names), 200)


def _checked_lora(config: Mapping[str, Any]) -> dict[str, int]:
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 1 <= r <= 65536 or type(alpha) not in (int, float):
        raise InvalidInput("adapter_config.json: r must be a natural number and lora_alpha a number")
    found: dict[str, dict[str, Any]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        value = config.get(name) or {}
        if not isinstance(value, dict) or not all(type(v) in (int, float) and v > 0 for v in value.values()):
            raise InvalidInput(f"adapter_config.json: {name} must map module patterns to positive numbers")
        found[name] = value
    return found["rank_pattern"]
