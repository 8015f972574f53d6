"""Where PEFT puts the tensors of an adapter's file, and whether each one arrives: an adapter that loads nothing is none.

PEFT renames, converts and passes over tensors without an error, so names alone prove nothing. What it hands to
`load_state_dict` is taken here and held against the file and against the parts of the adapter that it made.
"""

import contextlib
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import PREFIX
from molehunt.checkpoint.adapter_settings import parse_adapter
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.adapter_fit import must_fit
from molehunt.model.load_errors import loading
from molehunt.run.bounded import bounded

ADAPTER = "default"
"""PEFT's name of the one adapter of a pair."""
SECONDS, MEGABYTES = 2, 2048
"""What PEFT may take to find the modules of an adapter; its patterns are a stranger's regular expressions."""
MODULES_A_SECOND = 500
"""Modules of the base for which a second more is given; PEFT takes a third of that."""


class MissingTensors(NotTestable):
    """The file of an adapter lacks tensors for parts that its settings ask for."""


class UnknownAdapter(NotTestable):
    """No PEFT that is installed knows the type of an adapter, or a field that it sets, so nothing loads it as it was made."""


def adapter_config(folder: Path) -> Any:
    """PEFT's own settings of an adapter folder.

    Raises InvalidInput when PEFT cannot read them, NotTestable when it does not know the type or a field that is set.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    stated = read_json(folder / ADAPTER_CONFIG)
    settings = parse_adapter(stated)
    settings.check_readable()
    known = cast("Mapping[str, Any]", PEFT_TYPE_TO_CONFIG_MAPPING)
    if settings.kind not in known:
        raise UnknownAdapter(
            f"this adapter is of type {printable(settings.kind, 40)}, which the installed PEFT does not know."
        )
    fields = known[settings.kind].__dataclass_fields__
    foreign = [name for name, value in stated.items() if name not in fields and (value or isinstance(value, dict))]
    if foreign:
        raise UnknownAdapter(
            f"adapter_config.json sets {printable(', '.join(sorted(foreign)), 200)}, which the installed PEFT does not know: "
            "it would leave that out.\nInstall the PEFT that the adapter was made with."
        )
    with loading(folder, "an adapter"), quiet():
        config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    return config


def check_injection(model: nn.Module, folder: Path) -> None:
    """Let PEFT find the adapter's modules in `model`, which has no weights, in a child under limits.

    Raises InvalidInput when it takes too long or too much: patterns in adapter_config.json can be made to hang; and
    NotTestable when the adapter was made for another base. Any other error is left to the loading that follows, which
    tells more of it.
    """
    config = adapter_config(folder)
    must_fit(model, folder)

    def inject() -> None:
        with contextlib.suppress(Exception):
            with_adapter(model, config, folder)

    seconds = SECONDS + len(list(model.modules())) // MODULES_A_SECOND
    bounded(inject, what=f"{ADAPTER_CONFIG} of {model_name(folder)}", seconds=seconds, megabytes=MEGABYTES)


def with_adapter(model: nn.Module, config: Any, folder: Path) -> nn.Module:
    """`model`, which has no weights, inside a PEFT wrapper whose adapter has none either. It changes `model` and `config`."""
    import peft

    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some would ask for the weights
    with loading(folder, "an adapter of this base"), quiet():
        return cast("nn.Module", peft.get_peft_model(cast("Any", model), config, ADAPTER, low_cpu_mem_usage=True))


def placed_tensors(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Name in the PEFT model's state → the tensor that PEFT fills it with from the file in `folder`.

    Raises InvalidInput, with names, when a tensor of the file goes nowhere or a shape does not fit, and NotTestable when a
    part of the adapter gets no tensor: PEFT leaves such a part at the value it begins with.
    """
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    base: Any = cast("Any", model).get_base_model()
    taken: dict[str, Tensor] = {}

    def take(tensors: dict[str, Tensor], **options: Any) -> Any:
        taken.update(tensors)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    with loading(folder, "an adapter of this base"), quiet():
        mapping = getattr(base, "_checkpoint_conversion_mapping", {}) or None
        stored = cast("dict[str, Tensor]", load_peft_weights(str(folder), device="cpu", key_mapping=mapping))
        cast("Any", model).load_state_dict = take  # shadows the method until it is taken off again
        try:
            set_peft_model_state_dict(model, stored, adapter_name=ADAPTER)
        except KeyError as error:
            raise InvalidInput(
                f"{printable(model_name(folder))} has no tensor {printable(str(error.args[0]), 200)}, which its {ADAPTER_CONFIG} "
                "(modules_to_save or trainable_token_indices) asks for.\nFetch it again."
            ) from None
        finally:
            del cast("Any", model).load_state_dict
    _check_all_placed(model, folder, stored, taken)
    state = model.state_dict()
    return {name: value for name, value in taken.items() if name in state}


def _check_all_placed(model: nn.Module, folder: Path, stored: dict[str, Tensor], taken: dict[str, Tensor]) -> None:
    from peft.utils import get_peft_model_state_dict

    state = cast("dict[str, Tensor]", model.state_dict())
    held: dict[str, Tensor] = cast("Any", get_peft_model_state_dict)(
        model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False
    )
    if not any(name in state for name in taken):
        raise InvalidInput(
            f"{printable(model_name(folder))} loads nothing: none of its {len(stored)} tensors (such as "
            f"{printable(next(iter(stored)))}) is called as PEFT calls the parts of this adapter on this base, so the model "
            "would be the base.\nGive the base that it was trained on, or save it with PEFT, whose names begin with "
            f"{PREFIX}"
        )
    lost = _lost(stored, taken, state, held)
    if lost:
        raise InvalidInput(_left_out(model, folder, lost, len(stored)))
    own = {one.path: one.parameter for one in wrapped_parameters(model) if one.added}
    filled = {id(parameter) for name, parameter in own.items() if name in taken}
    saved = {id(value) for value in held.values()}
    empty = [n for n, parameter in own.items() if id(parameter) not in filled and n in state and id(state[n]) in saved]
    if empty:
        raise MissingTensors(
            f"{printable(model_name(folder))} has no tensor for {len(empty)} part{'s' * (len(empty) > 1)} of its adapter, such as "
            f"{printable(empty[0])}. PEFT would leave {'it' if len(empty) == 1 else 'them'} at the values that a new adapter "
            f"begins with, which no file holds.\nFetch it again; {ADAPTER_WEIGHTS} may be incomplete, or {ADAPTER_CONFIG} is "
            "another adapter's."
        )
    for name in sorted(taken.keys() & state.keys()):
        shape, given = state[name].shape, taken[name].shape
        vocabulary = name not in own and shape[1:] == given[1:]  # embeddings that grew, saved with the adapter
        if shape != given and not vocabulary:
            raise InvalidInput(_other_shape(name, folder, tuple(given), tuple(shape)))


def _left_out(model: nn.Module, folder: Path, lost: list[str], total: int) -> str:
    """What to say of tensors that PEFT leaves out: whether the settings or the base are at fault."""
    said = f"PEFT leaves out {len(lost)} of the {total} tensors of {printable(model_name(folder))}, such as {printable(lost[0])}"
    base = {name for name, _ in cast("Any", model).get_base_model().named_modules()}
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "") for name in lost}
    plain = {path.replace(".base_layer.", ".") for path in base}
    if not modules <= plain:
        return f"{said}: no part of this base takes them.\nGive the base that the adapter was trained on."
    asked = read_json(folder / ADAPTER_CONFIG).get("target_modules")
    kinds = printable(", ".join(sorted({path.rpartition(".")[2] for path in modules})), 120)
    return (
        f"{said}. This base has their modules ({kinds}), and {ADAPTER_CONFIG} does not ask for them: target_modules is "
        f"{printable(str(asked), 200)}.\nThe tensors and {ADAPTER_CONFIG} do not belong together: fetch both from one place."
    )


def _other_shape(name: str, folder: Path, given: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What to say of a tensor of another shape than PEFT makes room for: whether the settings or the base are at fault."""
    ranked = (
        0 if "lora_A" in name or "lora_embedding_A" in name else 1 if "lora_B" in name or "embedding_B" in name else 2
    )
    if len(given) == len(shape) == 2 and ranked < 2 and given[1 - ranked] == shape[1 - ranked]:
        return (
            f"{ADAPTER_CONFIG} of {printable(model_name(folder))} says r = {shape[ranked]}, the tensors have rank {given[ranked]} "
            f"({printable(name)}).\nThe tensors and {ADAPTER_CONFIG} do not belong together: fetch both from one place."
        )
    return (
        f"{printable(name)} is {list(given)} in {printable(model_name(folder))} and {list(shape)} in the adapter that PEFT "
        "builds on this base.\nGive the base that the adapter was trained on."
    )


def _lost(
    stored: dict[str, Tensor], taken: dict[str, Tensor], state: dict[str, Tensor], held: dict[str, Tensor]
) -> list[str]:
    """Tensors of the file that reach neither the model's state nor what PEFT holds beside it."""
    lost = [name for name in taken if name not in state and name not in held]
    passed_on, from_file = {id(value) for value in taken.values()}, {id(value) for value in stored.values()}
    converted = {name: value for name, value in stored.items() if id(value) not in passed_on and name not in held}
    made = sum(value.numel() for value in taken.values() if id(value) not in from_file)
    return lost or (list(converted) if sum(value.numel() for value in converted.values()) > made else [])


@dataclass(frozen=True, eq=False, slots=True)
class WrappedParameter:
    """One parameter of a PEFT model."""

    path: str
    """Its name in the PEFT model's state."""
    plain: str | None
    """Name of the base's parameter that it is, or stands in for; None for a factor and the like."""
    added: bool
    """Whether the adapter added it."""
    parameter: nn.Parameter


def wrapped_parameters(model: nn.Module) -> list[WrappedParameter]:
    """Every parameter of a PEFT model, those of the base by their names outside PEFT, too."""
    tuner = cast("Any", model).base_model
    found = [
        WrappedParameter(f"base_model.{name}", None, True, parameter)
        for name, parameter in cast("nn.Module", tuner).named_parameters(remove_duplicate=False)
        if not name.startswith("model.")
    ]
    _split(cast("nn.Module", tuner.model), "base_model.model.", "", found)
    return found


def _split(module: nn.Module, path: str, plain: str, found: list[WrappedParameter]) -> None:
    """Go through the modules: below a tuner, only `base_layer` and `original_module` lead on to the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapper = isinstance(module, AuxiliaryTrainingWrapper)
    tuner = wrapper or isinstance(module, BaseTunerLayer)
    for name, parameter in module.named_parameters(recurse=False):
        found.append(WrappedParameter(path + name, None if tuner else plain + name, tuner, parameter))
    for name, child in module.named_children():
        if not tuner:
            _split(child, f"{path}{name}.", f"{plain}{name}.", found)
        elif name in ("base_layer", "original_module") or (wrapper and isinstance(child, BaseTunerLayer)):
            _split(child, f"{path}{name}.", plain, found)
        else:
            instead = f"{ADAPTER}." if wrapper and name == "modules_to_save" else None
            for inner, parameter in child.named_parameters(remove_duplicate=False):
                stands_for = None if instead is None else plain + inner.removeprefix(instead)
                found.append(WrappedParameter(f"{path}{name}.{inner}", stands_for, True, parameter))


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Hide PEFT's warnings: what they say of missing tensors is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
