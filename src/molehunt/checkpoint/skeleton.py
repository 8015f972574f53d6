"""A model without weights, on the meta device: what transformers would build for a folder before it loads anything."""

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from molehunt.checkpoint.config_limits import check_config, suspected_field
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import read_json
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, printable
from molehunt.run.bounded import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANOTHER_WAY = "`molehunt files` still compares everything in the folders."


class UnknownArchitecture(NotTestable):
    """transformers has no model of this type, so nothing says what the stored tensors are for."""


def model_class(config: Any) -> Any:
    """The auto class of transformers that loads the language model of `config`: a decoder, alone or in a multimodal wrapper.

    Raises NotTestable, by name and with what would be needed, for an encoder, an encoder–decoder and an unknown type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

    kind = printable(str(getattr(config, "model_type", "")), 40)
    if getattr(config, "is_encoder_decoder", False):
        raise NotTestable(
            f"this is an encoder–decoder ({kind}); Molehunt reads models that continue one text.\nIts encoder and its decoder "
            f"would have to be read as two streams, and a prompt fed to the first. {ANOTHER_WAY}"
        )
    masked = type(config) in cast("Any", AutoModelForMaskedLM)._model_mapping
    if masked and getattr(config, "is_decoder", True) is False:
        raise NotTestable(
            f"this is an encoder ({kind}, is_decoder = false), which gives vectors and no text; Molehunt reads models that "
            f"continue a text.\nIts own outputs would have to be compared. {ANOTHER_WAY}"
        )
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in cast("Any", auto)._model_mapping:
            return auto
    raise UnknownArchitecture(
        f"transformers has no language model for the type {kind!r}, so nothing says what its weights do.\n"
        f"A newer transformers may have one; code from the folder is never run. {ANOTHER_WAY}"
    )


def skeleton(folder: Path) -> "PreTrainedModel":
    """The model of a folder on the meta device, in the class that `model_class` names. No weight is read.

    Raises:
        UnknownArchitecture: transformers does not know the type.
        NotTestable: the architecture is an encoder or an encoder–decoder.
        InvalidInput: transformers cannot build a model from this config.
    """
    prove_config(folder)
    return _built(folder)


def prove_config(folder: Path) -> None:
    """Build the model of a config once in a child process, where it may hang, abort or take all memory.

    Raises the same errors as `skeleton`.
    """
    check_config(read_json(folder / "config.json"))
    _prove(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=64)
def _prove(folder: Path, _content: bytes) -> None:
    """Prove a config that has not been proven yet; what raised is proven again the next time."""
    import_module("transformers.modeling_utils")  # here, once, and not in every child

    bounded(lambda: _built(folder) and None, what=f"config.json of {model_name(folder)}", seconds=20, megabytes=2048)


def _built(folder: Path) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig

    try:
        config = cast("Any", AutoConfig).from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        _plain(config)
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)
    except NotTestable as error:  # which of two folders is the encoder
        raise type(error)(f"{printable(model_name(folder))}: {error}") from None
    except MolehuntError:
        raise
    except Exception as error:  # a config is data from a stranger, and libraries meet it unprepared
        if "trust_remote_code" in str(error) or "does not recognize this architecture" in str(error):
            raise UnknownArchitecture(
                f"transformers does not know the type of {printable(model_name(folder))} "
                f"({printable(str(read_json(folder / 'config.json').get('model_type')), 40)}).\n"
                f"A newer transformers may; code from the folder is never run. {ANOTHER_WAY}"
            ) from None
        raise InvalidInput(
            f"transformers cannot build a model from config.json of {printable(model_name(folder))}: {type(error).__name__}: "
            f"{printable(str(error), 300)}{suspected_field(read_json(folder / 'config.json'), str(error))}\n"
            "Get the config that belongs to these weights."
        ) from error


def _plain(config: Any) -> None:
    """Take out what would choose other layers or code for the same weights: quantisation and attention kernels."""
    for part in {id(one): one for one in (config, config.get_text_config(decoder=True))}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
        part._attn_implementation = "eager"
