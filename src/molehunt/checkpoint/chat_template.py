"""Chat templates of a folder and its special tokens, and the text that a template makes of a conversation."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes

from molehunt.checkpoint.loader_traps import read_json
from molehunt.checkpoint.template_sandbox import Bounded, Meter, parse
from molehunt.errors import InvalidInput, printable

CONFIG, JINJA, MORE = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
PROCESSORS = ("chat_template.json", "processor_config.json", "preprocessor_config.json")
"""Files of processors of text and pictures that may hold a template."""
DEFAULT = "default"
"""Name of the template that is used where no other is asked for."""
MOST_TEMPLATES = 32
"""Greatest number of templates of one folder."""
LARGEST_FILE = 2**20
"""Greatest number of bytes of a template's file."""
TODAY = datetime(2026, 1, 1)
"""The day on which templates are rendered, whenever that is: one conversation always gives one text."""
RENDER_LIMIT = 20_000
"""Number of characters of one rendered conversation that are compared."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that templates are given."""
DEFAULT_TOKENS: Mapping[str, Mapping[str, str]] = {
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "GPT2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "GPTNeoX": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "Qwen2": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}  # fmt: skip
"""Special tokens of tokenizer classes where the folder names none."""


def templates_of(folder: Path) -> dict[str, str]:
    """Chat templates of a folder by name; the unnamed one is `default`. A .jinja file takes precedence over the config.

    Raises:
        InvalidInput: a template is no text file, is huge, or there are too many of them.
    """
    found = _in_json(folder / CONFIG)
    if (folder / JINJA).exists():
        found[DEFAULT] = _text_of(folder / JINJA)
    more = folder / MORE
    if more.exists():
        if not more.is_dir():
            raise InvalidInput(f"{MORE} in {printable(folder.name)} is no folder. Fetch it again.")
        for path in sorted(more.glob("*.jinja"))[: MOST_TEMPLATES + 1]:
            found[path.stem] = _text_of(path)
    if len(found) > MOST_TEMPLATES:
        raise InvalidInput(f"{printable(folder.name)} holds more than {MOST_TEMPLATES} chat templates.")
    return found


def hidden_templates_of(folder: Path) -> dict[str, str]:
    """Templates beside the folder's own one that only some loaders read, by the file that holds them.

    Processors read their own files; older loaders read the tokenizer's settings where newer ones read a .jinja file. A text
    that is the same as the folder's own template is left out.

    Raises:
        InvalidInput: a template's file is broken.
    """
    own = templates_of(folder).get(DEFAULT)
    found = {(CONFIG, name): text for name, text in _in_json(folder / CONFIG).items() if (folder / JINJA).exists()}
    for file in PROCESSORS:
        found.update({(file, name): text for name, text in _in_json(folder / file).items()})
    return {
        file if name == DEFAULT else f"{file}: {name}": text
        for (file, name), text in found.items()
        if text != own and (file != CONFIG or name == DEFAULT)
    }


def _in_json(path: Path) -> dict[str, str]:
    """The templates under the key `chat_template` of a JSON file, by name; none if there is no such file."""
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, str):
        return {DEFAULT: template}
    if isinstance(template, Mapping):
        return {str(name): str(text) for name, text in template.items()}
    if isinstance(template, list):
        return {str(t.get("name")): str(t.get("template")) for t in template if isinstance(t, Mapping)}
    return {}


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise InvalidInput(f"{printable(path.name)} is no file. Fetch the folder again.")
    if path.stat().st_size > LARGEST_FILE:
        raise InvalidInput(f"{printable(path.name)} is larger than {LARGEST_FILE >> 20} MB, which no template is.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{printable(path.name)} is no UTF-8 text. Fetch it again.") from None


def special_tokens_of(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's templates are given, by name; empty for a folder without a tokenizer.

    Raises:
        InvalidInput: a JSON file of the folder is broken.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    older = folder / "special_tokens_map.json"
    sides = [config, read_json(older) if older.is_file() else {}]
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    found: dict[str, str] = {}
    for key in SPECIAL:
        for side in sides:
            value = side.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[key] = text
                break
        else:
            default = DEFAULT_TOKENS.get(name, {}).get(key)
            if default is not None and not any(key in side for side in sides):  # null says that there is none
                found[key] = default
    return found


class Program:
    """A chat template, compiled once and run in the sandbox. Raises TemplateError if it is none or too large."""

    def __init__(self, template: str) -> None:
        self.source = template
        tree = self._prepared(parse(template))
        self._environment = self._sandbox()
        metered = cast(nodes.Template, Meter().visit(tree)).set_environment(self._environment)
        self._compiled: Template = self._environment.from_string(cast(nodes.Template, metered))
        self._lock = Lock()

    def _prepared(self, tree: nodes.Template) -> nodes.Template:
        """The syntax tree that is compiled; a subclass may watch parts of it."""
        return tree

    def _sandbox(self) -> Bounded:
        """The sandbox that the template runs in."""
        return Bounded()

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        *,
        today: datetime = TODAY,
        limit: int | None = None,
        **given: Any,
    ) -> str:
        """The input text of a model, the same as `apply_chat_template(…, tokenize=False)` gives.

        Args:
            messages: the conversation, with every key that its messages have.
            tokens: special tokens by name, such as `bos_token`.
            today: what the template takes for the present day.
            limit: number of characters after which the text is cut.
            given: `add_generation_prompt`, `tools`, `documents` and whatever else the template asks for.

        Raises:
            Exception: of any kind: a template is an untrusted program. BudgetSpent if it works too much.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": False, **tokens, **given}
        values = {key: plain(value) for key, value in values.items()}
        values["messages"] = [_reasoned(_without_none(cast("dict[str, Any]", plain(m)))) for m in messages]
        with self._lock:  # the budget and the day belong to one rendering
            self._environment.start(_characters(values), today)
            if limit is None:
                return "".join(self._compiled.generate(**values))
            out: list[str] = []
            length = 0
            for piece in self._compiled.generate(**values):
                out.append(piece[: limit - length])
                length += len(out[-1])
                if length >= limit:
                    break
            return "".join(out)

    @property
    def dates(self) -> tuple[str, ...]:
        """The dates that the last rendering asked for, as texts."""
        return tuple(self._environment.dates)


@lru_cache(maxsize=64)
def program(template: str) -> Program:
    """The compiled template, from memory if it was compiled before. Raises what `Program` does."""
    return Program(template)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str] | None = None, **given: Any
) -> str:
    """The first `RENDER_LIMIT` characters of the input text of a model; an error is part of the text."""
    try:
        options: dict[str, Any] = {"limit": RENDER_LIMIT, "add_generation_prompt": True, **given}
        return program(template).text(messages, tokens or {}, **options)
    except Exception as error:  # an untrusted program can raise any exception
        return error_text(error)


def refusal(template: str) -> str:
    """Why a template cannot be compiled; empty if it can."""
    try:
        program(template)
    except Exception as error:  # deep nesting and broken syntax raise many things
        return error_text(error)
    return ""


def error_text(error: Exception) -> str:
    """What stands in place of the text of a template that raised an error."""
    what = str(error) if isinstance(error, TemplateError) else str(error).split("\n")[0]
    return f"(template error: {type(error).__name__}: {what[:200]})"


def plain(value: Any) -> Any:
    """A value rebuilt of JSON's types, so that a template sees no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in cast("Sequence[Any]", value)]
    return f"<{type(value).__name__}>"


def _without_none(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read, as transformers passes it."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _characters(value: Any) -> int:
    """Number of characters of all texts in a value."""
    total = 0
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            stack += cast("dict[Any, Any]", one).values()
        elif isinstance(one, list):
            stack += cast("list[Any]", one)
    return total
