"""A tokenizer as transformers loads it from a folder, and what it consists of. Runs in the bounded child only."""

import importlib.util
import json
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from molehunt.checkpoint.links import model_name
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, printable

FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
"""What an added token has besides its content and its id."""
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "vocab.model",
)  # fmt: skip
"""Files that hold a vocabulary. A folder with none of them has no tokenizer of its own."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
MODEL_KEY = ',"model":{'
CLEANING = "clean_up_tokenization_spaces"


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in VOCABULARIES) or any(folder.glob("*.tiktoken"))


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerState:
    """A loaded tokenizer and its parts."""

    loaded: Any
    vocabulary: Mapping[str, int]
    """Content → id of every token, added ones included."""
    added: Mapping[str, str]
    """Content → id and flags of every added token, such as `7 special`."""
    source: str
    """The tokenizers library's own JSON of what was loaded; empty for one that it does not hold."""
    settings: Mapping[str, Any]
    """Class, sides and limits of the loaded tokenizer, and its special tokens."""

    def encode(self, text: str) -> list[int]:
        return list(self.loaded.encode(text))

    def decode(self, ids: list[int]) -> list[str]:
        """The text of these ids with special tokens and without them."""
        return [str(self.loaded.decode(ids, skip_special_tokens=skip)) for skip in (False, True)]

    def text(self, token: str) -> str:
        """A token of the vocabulary as the text that it stands for, as far as that is known."""
        return token if token in self.added else str(self.loaded.convert_tokens_to_string([token]))

    @property
    def rebuilt(self) -> bool:
        """Whether transformers builds this tokenizer by a class of its own, and not as tokenizer.json says."""
        return type(self.loaded).__name__ not in ("TokenizersBackend", "PreTrainedTokenizerFast")

    @property
    def model(self) -> str:
        """The JSON of vocabulary and merges: quick to compare and slow to parse."""
        return self.source[self._end :]

    @property
    def _end(self) -> int:
        """Where the JSON of the model starts. Inside a text, its quotes would be escaped."""
        return max(self.source.find(MODEL_KEY), 0)

    def parts(self) -> dict[str, Any]:
        """The tokenizer's JSON without its vocabulary and added tokens, as one mapping from names to values."""
        if not self.source:
            return {}
        whole: dict[str, Any] = json.loads(self.source[: self._end] + "}")
        whole.pop("added_tokens", None)
        return whole

    def model_parts(self) -> dict[str, Any]:
        """Merges, scores of tokens and settings of the model, as one mapping from names to values."""
        model: dict[str, Any] = json.loads("{" + self.model[1:])["model"] if self.source else {}
        merges, scores = model.pop("merges", None), model.pop("vocab", None)
        return {
            **{f"model.{key}": value for key, value in model.items()},
            "model.merges": ["\0".join(pair) if isinstance(pair, list) else pair for pair in merges or []],
            "model.scores": [tuple(row) for row in scores] if isinstance(scores, list) else [],
        }


def opened_tokenizer(folder: Path, config_of: Path) -> TokenizerState:
    """The tokenizer of `folder`. Panics of the tokenizers library are caught, too.

    Raises:
        InvalidInput: it cannot be loaded; the message names the file.
        NotTestable: it needs code of its own, or a package that is not installed.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        with staged(folder, config_of) as plain:
            loaded: Any = AutoTokenizer.from_pretrained(str(plain), trust_remote_code=False, local_files_only=True)
        return _state(loaded)
    except (KeyboardInterrupt, MemoryError, MolehuntError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise _refused(folder, error) from None


def _state(loaded: Any) -> TokenizerState:
    backend = getattr(loaded, "backend_tokenizer", None)
    added: dict[str, str] = {}
    for place, token in cast("dict[int, Any]", loaded.added_tokens_decoder).items():
        added[str(token.content)] = " ".join([str(place), *(flag for flag in FLAGS if getattr(token, flag))])
    settings = {
        "class": type(loaded).__name__,
        "model_max_length": loaded.model_max_length,
        "padding_side": loaded.padding_side,
        "truncation_side": loaded.truncation_side,
        CLEANING: bool(getattr(loaded, CLEANING, False)),
        **{key: _plain(value) for key, value in loaded.special_tokens_map.items()},
    }
    return TokenizerState(
        loaded=loaded,
        vocabulary=loaded.get_vocab(),
        added=added,
        source="" if backend is None else backend.to_str(),
        settings=settings,
    )


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _refused(folder: Path, error: BaseException) -> MolehuntError:
    """What a failed load means: a broken file, foreign code, or a missing package."""
    from tokenizers import Tokenizer

    text = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 300)}"
    if "trust_remote_code" in str(error):
        return NotTestable(f"the tokenizer of {printable(model_name(folder))} is code of its own, which is never run.")
    named = "tokenizer.json"
    if (folder / named).is_file():
        try:
            Tokenizer.from_file(str(folder / named))
            named = "tokenizer_config.json"
        except BaseException as inner:
            text = f"{type(inner).__name__}: {printable(' '.join(str(inner).split()), 300)}"
    else:
        named = next((name for name in VOCABULARIES if (folder / name).is_file()), "tokenizer_config.json")
        lacking = [name for name in ("sentencepiece", "google.protobuf", "tiktoken") if not _installed(name)]
        if named.endswith(".model") and lacking:
            packages = " ".join("protobuf" if name.startswith("google") else name for name in lacking)
            return NotTestable(
                f"{printable(model_name(folder))}/{named} cannot be read without optional packages.\nRun: pip install {packages}"
            )
    where = printable(model_name(folder)) + (f"/{named}" if (folder / named).is_file() else "")
    return InvalidInput(f"{where} cannot be loaded as a tokenizer: {text}\nFetch it again, or do not use it.")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


@contextmanager
def staged(folder: Path, config_of: Path) -> Generator[Path, None, None]:
    """The folder as it is or, where it lacks a config.json, as links with that of `config_of` and no adapter."""
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for path in _small_files(folder):
            if not path.name.startswith("adapter_"):
                (Path(name) / path.name).symlink_to(path.resolve())
        config = config_of / "config.json"
        if not (folder / "config.json").is_file() and config.is_file():
            (Path(name) / "config.json").symlink_to(config.resolve())
        yield Path(name)


def _small_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file() and not path.name.endswith(WEIGHTS))
