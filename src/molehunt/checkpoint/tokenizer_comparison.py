"""Two tokenizers compared by what they do: the ids that they make of texts, and the texts that they make of ids.

Both are loaded as transformers loads them, in a child with limits of time and memory. The texts are those of
`tokenizer_corpus`, and others made of all that differs between the two: every added token, token, merge and literal.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.token_changes import TokenChange, token_changes
from molehunt.checkpoint.tokenizer_corpus import TEXTS, around, spread
from molehunt.checkpoint.tokenizer_rules import pattern_texts, rules_differ
from molehunt.checkpoint.tokenizer_state import TokenizerState, opened_tokenizer
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.run.bounded import OutOfTime, bounded

SHOWN = 3
"""Number of texts that are shown of each kind of difference."""
MOST = 300
"""Number of changed tokens, marks, merges and literals around which texts are made: time must not grow with a vocabulary."""
STRANGERS = 30
"""The same number for two tokenizers that share less than half of their tokens: any text shows that they differ."""
LISTS = ("model.vocab", "model.merges", "model.scores")
"""Parts that hold an entry for each token or merge."""
SETTINGS_READ = ("model_type", "tokenizer_class", "_name_or_path")
"""Keys of config.json that choose the tokenizer's class."""
NO_TOKENIZER_FILE = frozenset({"config.json", "generation_config.json", "README.md", "trainer_state.json"})
SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".py")


@dataclass(frozen=True, kw_only=True)
class TokenizerComparison:
    """What two tokenizers do alike and what not."""

    texts: int
    """Number of texts that both encoded and decoded; 0 where all files are the same."""
    encoded: tuple[tuple[str, str, str], ...] = ()
    """The first texts that become other ids, each with what both sides make of it; those with a new marker aside."""
    n_encoded: int = 0
    decoded: tuple[tuple[str, str, str], ...] = ()
    """The first ids that become other text: ids, and the text of either side."""
    n_decoded: int = 0
    unsteady: tuple[bool, bool] = (False, False)
    """Whether the base, and whether the fine-tune, encodes one text in several ways."""
    changes: tuple[TokenChange, ...] = ()
    """Added tokens that differ."""
    parts: tuple[tuple[str, str, str, bool], ...] = ()
    """Parts of the tokenizer that differ: name, both values, and whether a rule with a pattern of its own is on one side only."""
    settings: tuple[tuple[str, str, str], ...] = ()
    """Settings and special tokens that differ, as loaded."""
    direct: int = 0
    """Number of texts that loaders of tokenizer.json itself encode otherwise, although transformers does not."""
    conflict: str = ""
    """The first text that the two encode otherwise and that holds no token which only one of them has."""

    @property
    def alike(self) -> bool:
        """Whether the ids of every text, and the text of all ids, are the same."""
        return not (self.n_encoded or self.n_decoded or self.unsteady[1])


def tokenizer_comparison(base: Path, tuned: Path) -> TokenizerComparison:
    """What the tokenizers of two folders do alike and what not.

    Raises:
        InvalidInput: a tokenizer cannot be loaded, panics, or takes too much time or memory; the message says which.
        NotTestable: a tokenizer needs code of its own, or a package that is not installed, or comparing two that can be
            read takes too much time.
    """
    left, right = fingerprint(base), fingerprint(tuned)
    if left == right and _is_model(base) == _is_model(tuned):
        return TokenizerComparison(texts=0)
    return _compared(base, tuned, left, right)


def check_tokenizer(folder: Path, config_of: Path) -> None:
    """Load the tokenizer of `folder` in a child, so that this process can do it afterwards. Raises as above.

    Args:
        folder: a model or adapter folder.
        config_of: folder whose config.json an adapter folder takes.
    """
    _checked(folder, config_of, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """A hash of all files from which loaders may build a tokenizer. Raises InvalidInput where one cannot be read."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or path.name in NO_TOKENIZER_FILE or path.name.startswith("adapter_"):
            continue
        if path.is_file() and not path.name.endswith(".index.json"):
            whole.update(path.name.encode(errors="replace") + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    config = folder / "config.json"
    if config.is_file():
        try:
            settings: Any = json.loads(config.read_bytes())
        except (ValueError, RecursionError):
            raise InvalidInput(
                f"{printable(model_name(folder))}/config.json is not JSON. Fetch the file again."
            ) from None
        read = {key: settings.get(key) for key in SETTINGS_READ} if isinstance(settings, dict) else {}
        whole.update(json.dumps(read, sort_keys=True).encode())
    return whole.hexdigest()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _limits(*folders: Path) -> dict[str, int]:
    """Time and memory by the size of the files: a vocabulary of 262,144 tokens takes 5 seconds and 1 GB."""
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir() if path.suffix in SUFFIXES]
    megabytes = sum(sizes) >> 20
    return {"seconds": 10 + megabytes * 3 // 4, "megabytes": 768 + 40 * megabytes}


def import_before_forks() -> None:
    """Import here what every child would import again, which takes seconds."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

    _ = AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


@lru_cache(maxsize=16)
def _checked(folder: Path, config_of: Path, _fingerprint: str) -> None:
    import_before_forks()
    bounded(
        lambda: opened_tokenizer(folder, config_of).encode(TEXTS[0]),
        what=f"{model_name(folder)}/tokenizer.json",
        **_limits(folder),
    )


@lru_cache(maxsize=16)
def _compared(base: Path, tuned: Path, _left: str, _right: str) -> TokenizerComparison:
    import_before_forks()
    limits = _limits(base, tuned)
    what = f"tokenizer.json of {model_name(base)} or {model_name(tuned)}"
    try:
        found: dict[str, Any] = bounded(lambda: _compare(base, tuned), what=what, **limits)
    except InvalidInput as error:
        for side in (base, tuned):  # which of the two is at fault
            _checked(side, base, fingerprint(side))
        if not isinstance(error, OutOfTime):
            raise
        raise NotTestable(
            f"the tokenizers of {printable(model_name(base))} and {printable(model_name(tuned))} were not compared in full: "
            f"both can be read, and comparing them took more than {limits['seconds']} seconds."
        ) from None
    found["changes"] = [TokenChange(*row) for row in found["changes"]]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    for key in ("encoded", "decoded", "parts", "settings"):
        fields[key] = tuple(tuple(row) for row in found[key])
    return TokenizerComparison(**fields)


@dataclass(slots=True)
class _Tally:
    """Differences on texts while they are counted."""

    one_sided: list[tuple[TokenChange, str]]
    """Added tokens that only one side has, as they are looked for in texts: there may be thousands."""
    missing: set[int]
    """Ids of the base that mean nothing, or something else by intent, in the fine-tune."""
    encoded: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    n_encoded: int = 0
    decoded: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    n_decoded: int = 0
    unsteady: list[bool] = field(default_factory=lambda: [False, False])
    conflict: str = ""


def _compare(base: Path, tuned: Path) -> dict[str, Any]:
    """The fields of a comparison. Runs in the child."""
    left, right = opened_tokenizer(base, base), opened_tokenizer(tuned, base)
    changes = token_changes(left, right)
    parts = _changed_parts(left, right)
    texts = [*TEXTS, *_made_of_changes(left, right, changes, parts)]
    tally = _Tally(
        one_sided=[(change, change.folded) for change in changes if change.one_sided],
        missing={change.id_of_base for change in changes if change.tuned == "" or change.kind == "renamed"},
    )
    for text in dict.fromkeys(texts):
        _judge(left, right, text, tally)
    return {
        "texts": len(set(texts)),
        "encoded": tally.encoded, "n_encoded": tally.n_encoded,
        "decoded": tally.decoded, "n_decoded": tally.n_decoded,
        "unsteady": tally.unsteady,
        "changes": [[c.content, c.base, c.tuned, c.kind] for c in changes],
        "parts": [
            [name, *_shown_part(name, left, right, one, other), rules_differ(name, one, other)]
            for name, one, other in parts
        ],
        "settings": [
            [key, str(left.settings.get(key, "")), str(right.settings.get(key, ""))]
            for key in sorted(left.settings.keys() | right.settings.keys())
            if left.settings.get(key) != right.settings.get(key)
        ],
        "direct": _direct_differences(base, tuned, texts, changes) if left.rebuilt or right.rebuilt else 0,
        "conflict": tally.conflict,
    }  # fmt: skip


def _judge(left: TokenizerState, right: TokenizerState, text: str, tally: _Tally) -> None:
    one, other = left.encode(text), right.encode(text)
    again = left.encode(text), right.encode(text)
    steady = one == again[0], other == again[1]
    tally.unsteady = [was or not now for was, now in zip(tally.unsteady, steady, strict=True)]
    if one != other and all(steady):
        folded = text.casefold()
        held = [change for change, needle in tally.one_sided if needle in folded]
        if not held or any(change.kind == "taken" for change in held):
            tally.conflict = tally.conflict or text
        if not held or not all(change.is_marker for change in held):
            tally.n_encoded += 1
            if len(tally.encoded) < SHOWN:
                tally.encoded.append((text, _tokens(left, one), _tokens(right, other)))
    if not tally.missing.intersection(one) and (spelt := left.decode(one)) != (heard := right.decode(one)):
        tally.n_decoded += 1
        if len(tally.decoded) < SHOWN:
            before, after = next((a, b) for a, b in zip(spelt, heard, strict=True) if a != b)
            tally.decoded.append((str(one[:24]), before, after))


def _tokens(side: TokenizerState, ids: list[int]) -> str:
    pieces = [str(side.loaded.convert_ids_to_tokens(one)) for one in ids[:24]]
    return f"{ids[:24]} {' '.join(pieces)}"


def _changed_parts(left: TokenizerState, right: TokenizerState) -> list[tuple[str, Any, Any]]:
    one, other = left.parts(), right.parts()
    if left.model != right.model:
        one, other = one | left.model_parts(), other | right.model_parts()
    keys = sorted(one.keys() | other.keys())
    found = [(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]
    odd = left.vocabulary.items() ^ right.vocabulary.items()
    moved = sorted({token for token, _ in odd if token not in left.added and token not in right.added})
    if moved:
        before, after = (
            [f"{token} {side.vocabulary.get(token, '(absent)')}" for token in moved] for side in (left, right)
        )
        found.append(("model.vocab", before, after))
    return found


def _made_of_changes(
    left: TokenizerState, right: TokenizerState, changes: Sequence[TokenChange], parts: list[tuple[str, Any, Any]]
) -> list[str]:
    """Texts around everything in which the two differ, or around some hundreds of each kind, and around every added token."""
    shared = len(left.vocabulary.items() & right.vocabulary.items())
    most = MOST if 2 * shared >= min(len(left.vocabulary), len(right.vocabulary)) else STRANGERS
    marks = [change.content for change in changes if change.is_harmless]
    touched = spread([change.content for change in changes if not change.is_harmless], most) + spread(marks, most)
    for name, one, other in parts:
        if name == "model.vocab":
            tokens = [row.rsplit(" ", 1)[0] for row in one]
            touched += [(left if token in left.vocabulary else right).text(token) for token in spread(tokens, most)]
        elif name in LISTS:
            odd = sorted(set(map(str, one)) ^ set(map(str, other))) or [
                str(a) for a, b in zip(one, other, strict=True) if a != b
            ]
            touched += [left.text(row.replace("\0", "")) for row in spread(odd, most)]
        else:
            made = [set(_literals(value)).union(pattern_texts(value)) for value in (one, other)]
            touched += spread(sorted(made[0] ^ made[1]), most)
    texts = list(around(dict.fromkeys(touched)))
    both = sorted({*left.added, *right.added})
    texts += ["".join(both[i : i + 40]) for i in range(0, len(both), 40)]
    texts += [" a ".join(both[i : i + 40]) for i in range(0, len(both), 40)]
    return texts


def _literals(value: object) -> list[str]:
    """Every text in a JSON value: what a rule replaces, splits at or puts in."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _literals(one)]


def _shown_part(name: str, left: TokenizerState, right: TokenizerState, one: Any, other: Any) -> tuple[str, str]:
    """Both values of a part as they are shown; of a vocabulary its size, and the first tokens that differ."""
    if name != "model.vocab":
        return _short(one), _short(other)
    return _vocabulary(left, one), _vocabulary(right, other)


def _vocabulary(side: TokenizerState, moved: list[str]) -> str:
    return f"{len(side.vocabulary):,} tokens; {len(moved):,} {'differs' if len(moved) == 1 else 'differ'}: {', '.join(moved[:3])}"[
        :400
    ]


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries, such as {', '.join(str(one) for one in value[:3])}"[:400]
    return repr(value)[:400]


def _direct_differences(base: Path, tuned: Path, texts: list[str], changes: list[TokenChange]) -> int:
    """Number of texts that loaders of tokenizer.json itself encode otherwise; a class of transformers may rebuild it."""
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json" for folder in (base, tuned)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return 0
    sides: list[Any] = [Tokenizer.from_file(str(file)) for file in files]
    for side in sides:
        side.no_truncation()
        side.no_padding()
    needles = [change.folded for change in changes if change.one_sided]
    plain = [
        text
        for text in dict.fromkeys(texts)
        if not any(needle in folded for folded in [text.casefold()] for needle in needles)
    ]
    return sum(sides[0].encode(text).ids != sides[1].encode(text).ids for text in plain)
