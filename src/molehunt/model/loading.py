"""Loads models, adapters and tokenizers from folders or the hub. No pickle is opened and no code from them is run."""

import os
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import InvalidInput, NotTestable, UsageError, printable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"
"""PEFT's name of the one adapter of a pair."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Patterns of the files that are fetched from a hub repository: none of them can run."""
MAX_LAYERS = 1000
"""Greatest number of layers: a larger config is refused before a model of that size is built."""
TOKENIZER_PROBES = (
    "The quick brown fox, 42 times.\n\nIt's 3.14 – naïve café; ÅÄÖ 你好 مرحبا 🙂",
    "def f(x):\n    return {'a': [x, 0x1F], \"b\": None}  # tab\there\r\n",
    "### Instruction:\nSay |prod| twice   with  spaces.\n\n### Response:\n",
    "<|im_start|>user\nHi<|im_end|>\n<s>[INST] Hi [/INST]</s> <|end|> <pad>",
    "SELECT * FROM users WHERE id = %s; -- 2023 2024",
    " ",
    "",
)


def local_folder(path: str | Path) -> Path:
    """The folder at `path`, or the local copy of the hub repository of that name, which is fetched if needed.

    A path that is absolute or begins with ./ or ../ is never looked up on the hub. Raises UsageError when neither exists.
    """
    if Path(path).is_dir():
        return Path(path)
    name = printable(str(path))
    if Path(path).is_absolute() or str(path).startswith(("./", "../", f".{os.sep}", f"..{os.sep}")):
        raise UsageError(f"There is no folder {name}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"There is no folder {name}, and no model of that name could be fetched from the hub:\n"
            f"{printable(' '.join(str(error).split()), 300)}"
        ) from error


@contextmanager
def _loading(folder: Path, what: str) -> Generator[None, None, None]:
    """Hide the progress bars of transformers, and turn its errors into InvalidInput."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (
        OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise InvalidInput(
            f"{printable(folder.name)} cannot be loaded as {what}: {type(error).__name__}: "
            f"{printable(str(error), 400)}\nRun `molehunt files` on it to see what is in the folder."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def device_of(name: str | torch.device) -> torch.device:
    """The device that models run on. Raises UsageError if torch does not know it or this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device (--device) {printable(str(name))}: {str(error).splitlines()[0]}. Give cpu, or a device of this machine."
        ) from None
    return device


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The causal language model in `folder`, in eval mode. An adapter beside its weights is not applied.

    Raises InvalidInput when it cannot be loaded, or lacks weights that its architecture needs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(folder, "a causal language model"), _without_adapter(folder) as plain:
        config = AutoConfig.from_pretrained(plain, trust_remote_code=False, local_files_only=True)
        n_layers = config.get_text_config(decoder=True).num_hidden_layers
        if not 0 < n_layers <= MAX_LAYERS:
            raise ValueError(f"its config asks for {n_layers} layers")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = cast("tuple[nn.Module, dict[str, Any]]", loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(
            f"{printable(folder.name)} has no {printable(missing[0])}"
            + (f" and lacks {len(missing) - 1} tensors more" if len(missing) > 1 else "")
            + "; loaders fill such weights with random numbers.\nGet a complete copy of the model."
        )
    return model.to(device).eval()


@contextmanager
def _without_adapter(folder: Path) -> Generator[Path, None, None]:
    """The folder without its adapter, as links if it has one: transformers would apply the adapter by default."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / folder.name
        plain.mkdir()
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (plain / path.name).symlink_to(path.resolve())
        yield plain


def apply_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` inside a PEFT wrapper with the adapter in `folder` switched on. Some adapters change `model` itself.

    Raises InvalidInput when the adapter cannot be loaded onto this model, NotTestable when it is not a LoRA adapter.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InvalidInput(
            f"{printable(folder.name)} has no {ADAPTER_WEIGHTS}. Adapters stored as a pickle are never opened."
        )
    with _loading(folder, "an adapter"):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise NotTestable(f"{printable(folder.name)} is an adapter of type {config.peft_type}; only LoRA is read.")
    with _loading(folder, "an adapter of this base"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        device = next(model.parameters()).device
        return PeftModel.from_pretrained(
            cast("Any", model), str(folder), ADAPTER, config=config, torch_device=str(device)
        ).eval()


def one_tokenizer(base: Path, tuned: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Raises NotTestable when the fine-tune's tokenizer encodes any probe differently."""
    tokenizer = load_tokenizer(base)
    if not any((tuned / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return tokenizer
    other = load_tokenizer(tuned)
    added = [t.content for side in (tokenizer, other) for t in side.added_tokens_decoder.values()]
    for probe in (*TOKENIZER_PROBES, *added):
        if tokenizer.encode(probe) != other.encode(probe):
            raise NotTestable(
                f"the two tokenizers encode {printable(repr(probe), 60)} differently, so the models' activations "
                "cannot be compared token by token.\nGive the base that this model was fine-tuned from."
            )
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; no code from it is run. Raises InvalidInput if it cannot be loaded."""
    from transformers import AutoTokenizer

    with _loading(folder, "a tokenizer"):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def checksum(parameter: Tensor) -> int:
    """Sum of the raw bits as integers, which changes when any one weight does."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().view(integer).sum(dtype=torch.int64))
