"""Errors of transformers, PEFT and tokenizers as errors about the folder that they were reading."""

import json
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molehunt.checkpoint.config_limits import suspected_field
from molehunt.checkpoint.links import model_name
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, printable

PACKAGES = {
    "aqlm": "aqlm", "auto-round": "auto-round", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "eetq": "kernels", "fouroversix": "fouroversix",
    "gptq": "optimum gptqmodel", "hqq": "hqq", "quanto": "optimum-quanto", "quark": "amd-quark", "sinq": "sinq",
    "torchao": "torchao", "vptq": "vptq",
}  # fmt: skip
"""Which packages transformers needs for a quantisation method, as pip calls them."""
MACHINE = re.compile(r"\b(GPU|CUDA|XPU|MPS|mps|HPU|Triton)\b|not supported yet|only supported on")
"""Says of an error that this machine, or this version of a library, is at fault, and not the folder."""
ABOVE = "look at the above report"
"""transformers points to a table that it prints; the table is hidden here, and its names are attackers' text."""


@contextmanager
def loading(folder: Path, what: str) -> Generator[None, None, None]:
    """Turn the errors of transformers and its relatives into errors about `folder`, and hide what they print meanwhile.

    Raises:
        NotTestable: a package that the folder's format needs is missing, or this machine cannot run the format.
        InvalidInput: any other error, a panic of a library in Rust included.
    """
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (MolehuntError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # data from a stranger meets libraries unprepared, and a panic is no Exception
        raise _told(folder, what, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _told(folder: Path, what: str, error: BaseException) -> MolehuntError:
    """The error for the user: which folder, what was wrong with it, and what to do."""
    name, text = printable(model_name(folder)), " ".join(str(error).split())
    config = _config(folder)
    method = _method(config)
    if isinstance(error, ImportError) and not (MACHINE.search(text) and "install" not in text):
        return _missing_package(name, what, error, method)
    if (MACHINE.search(text) and (method or isinstance(error, ImportError))) or isinstance(error, NotImplementedError):
        return NotTestable(
            f"{name}{_quantised(method)} cannot be loaded as {what} here: {printable(text, 300)}\n"
            "Give the unquantised release, or run this on a machine that can. `molehunt files` works on this folder."
        )
    if ABOVE in text:
        text = "the shapes of its tensors are not those that its config.json asks for"
    return InvalidInput(
        f"{name} cannot be loaded as {what}: {type(error).__name__}: {printable(text, 400)}"
        f"{suspected_field(config, text)}\nRun `molehunt files` on it to see what is in the folder."
    )


def _missing_package(name: str, what: str, error: ImportError, method: str) -> NotTestable:
    text = " ".join(str(error).split())
    said = re.search(r"pip install (?:-U |--upgrade )?['\"`]?([\w.-]+)", text)
    packages = PACKAGES.get(method) or (said[1] if said else "") or (error.name or "").partition(".")[0]
    install = f"Install it: pip install {printable(packages, 80)}. " if packages else ""
    return NotTestable(
        f"{name}{_quantised(method)} cannot be loaded as {what} without a package that is not installed: {printable(text, 300)}\n"
        f"{install}Without it, `molehunt files` works on this folder, and `molehunt directions` on LoRA adapters of it."
    )


def _quantised(method: str) -> str:
    return f" is quantised by {printable(method, 40)} and" if method else ""


def _method(config: Mapping[str, Any]) -> str:
    """The quantisation method in config.json; empty for plain weights."""
    settings = config.get("quantization_config")
    return str(settings.get("quant_method", "")) if isinstance(settings, Mapping) else ""


def _config(folder: Path) -> dict[str, Any]:
    """config.json as far as it can be read; an error about something else must not hide behind one about it."""
    try:
        config: object = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
