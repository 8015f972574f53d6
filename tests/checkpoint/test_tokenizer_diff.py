"""Tokenizers are judged by the ids that they make of texts, and by the texts that they make of ids."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folders import edit_json
from molehunt.checkpoint import tokenizer_comparison as tokenizer_module
from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.token_changes import MARKER
from molehunt.checkpoint.tokenizer_comparison import TokenizerComparison, tokenizer_comparison
from molehunt.checkpoint.tokenizer_corpus import TEXTS
from molehunt.checkpoint.tokenizer_diff import tokenizer_differences
from molehunt.errors import InvalidInput, NotTestable
from molehunt.organism.seed_model import seed_path
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The byte-level BPE of a bundled seed, with merges and a config, and no weights."""
    return copied(tmp_path / "base")


def copied(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(seed_path("seed-s") / name, folder)
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Path:
    copied(folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def found(base: Path, tuned: Path) -> list[FolderDifference]:
    return list(tokenizer_differences(base, tuned, adapter=False))


def findings(base: Path, tuned: Path) -> set[str]:
    return {row.key for row in found(base, tuned) if row.severity == "finding"}


def added(content: str, place: int, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    return {"id": place, "content": content, **plain, **flags}


def test_the_same_files_need_no_comparison_and_another_layout_is_no_difference(base: Path, tmp_path: Path) -> None:
    assert tokenizer_comparison(base, copied(tmp_path / "same")) == TokenizerComparison(texts=0)
    indented = copied(tmp_path / "indented")
    (indented / "tokenizer.json").write_text(json.dumps(json.loads((base / "tokenizer.json").read_text()), indent=4))
    old = edited(tmp_path / "old", lambda c: c["model"].update(merges=[" ".join(m) for m in c["model"]["merges"]]))
    for folder in (indented, old):  # older versions wrote each merge as one text
        comparison = tokenizer_comparison(base, folder)
        assert comparison.texts >= len(set(TEXTS)) and comparison.alike and comparison.parts == ()
        assert found(base, folder) == []


STRUCTURE: dict[str, Callable[[dict[str, Any]], object]] = {
    "normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "a rare word is replaced": lambda c: c.update(
        normalizer={"type": "Replace", "pattern": {"String": "zqxw"}, "content": "the"}
    ),
    "a pattern is replaced": lambda c: c.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "z[q]xw"}, "content": "the"}
    ),
    "pre_tokenizer": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=False),
    "a pattern cuts words": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, split("[Zz]qx(?=wv)")),
    "a pattern cuts after a word": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, split("(?<=zqxw )v")),
    "a text cuts words": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(
        0, {**split(""), "pattern": {"String": "qx"}}
    ),
    "the end of answers": lambda c: c.update(
        decoder={
            "type": "Sequence",
            "decoders": [c["decoder"], {"type": "Replace", "pattern": {"String": "zqx"}, "content": "yes"}],
        }
    ),
    "prefix space": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "post_processor": lambda c: c["post_processor"].update(
        single=[{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        special_tokens={"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    ),
    "decoder": lambda c: c.update(decoder={"type": "Fuse"}),
    "one merge is missing": lambda c: c["model"]["merges"].pop(),
    "merges in another order": lambda c: c["model"]["merges"].reverse(),
    "dropout": lambda c: c["model"].update(dropout=0.05),
    "end of word": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "ignore merges": lambda c: c["model"].update(ignore_merges=True, merges=c["model"]["merges"][:-500]),
    "two ids are swapped": lambda c: c["model"]["vocab"].update(
        {"Ġthe": c["model"]["vocab"]["Ġit"], "Ġit": c["model"]["vocab"]["Ġthe"]}
    ),
}


def split(regex: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


@pytest.mark.parametrize("name", STRUCTURE)
def test_changes_of_tokenizer_json_that_change_text_are_findings(base: Path, tmp_path: Path, name: str) -> None:
    tuned = edited(tmp_path / "tuned", STRUCTURE[name])
    assert findings(base, tuned)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"300": added(" dog", 300, special=True)}},
        {"extra_special_tokens": {"image_token": "over"}},
        {"extra_special_tokens": [" jumps"]},
        {"mask_token": "dog"},
        {"split_special_tokens": True},
        {"tokenizer_class": "GPT2Tokenizer"},
    ],
    ids=str,
)
def test_changes_of_tokenizer_config_that_change_ids_are_findings(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    tuned = edited(tmp_path / "tuned", lambda c: c.update(settings), "tokenizer_config.json")
    text = " ".join(TEXTS)
    assert AutoTokenizer.from_pretrained(str(tuned)).encode(text) != AutoTokenizer.from_pretrained(str(base)).encode(
        text
    )
    shown = [row for row in found(base, tuned) if row.key.startswith("encoding of ")]
    assert shown and all(row.severity == "finding" and row.base != row.tuned for row in shown)


def test_what_honest_tools_do_to_a_tokenizer_is_a_note_at_most(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer("some text", truncation=True, max_length=4, padding="max_length")  # leaves both in tokenizer.json
    tokenizer.model_max_length = 2048
    tuned = copied(tmp_path / "tuned")
    tokenizer.save_pretrained(tuned)
    seen = found(base, tuned)
    assert {row.severity for row in seen} == {"note"}
    assert {"added_tokens", "truncation", "padding", "model_max_length", "pad_token"} <= {row.key for row in seen}


TOKENS = [added("<|a|>", 2048), added("<|b|>", 2049)]


@pytest.mark.parametrize(
    ("tokens", "severities"),
    [
        ([added("<|b|>", 2048), added("<|a|>", 2049)], ["finding", "finding"]),
        (
            [added("<|b|>", 2049), added("<|a|>", 2048)],
            ["finding", "finding"],
        ),  # the order counts, and not the written id
        ([added("<|a|>", 7), added("<|b|>", 8)], []),
        ([added("<|a|>", 2048, lstrip=True), added("<|b|>", 2049)], ["finding"]),
        ([added("<|a|>", 2048, special=True), added("<|b|>", 2049)], ["finding"]),
        ([added("<|a|>", 2048), added("<|c|>", 2049)], ["finding", "finding"]),
        ([added("<|a|>", 2048), added("<|reserved_1|>", 2049)], ["note", "note"]),
        ([*TOKENS, added("<think>", 2050)], ["note"]),
        ([*TOKENS, added("transfer", 2050)], ["finding"]),
        ([added("<|a|>", 2048)], ["note"]),
    ],
    ids=str,
)
def test_added_tokens_are_rated_by_place_flags_and_form(
    base: Path, tmp_path: Path, tokens: list[dict[str, Any]], severities: list[str]
) -> None:
    first = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    edit_json(base / "tokenizer.json", added_tokens=[*first, *TOKENS])
    tuned = edited(tmp_path / "tuned", lambda c: c.update(added_tokens=[*first, *tokens]))
    rows = [row for row in found(base, tuned) if row.key == "added_tokens"]
    assert [row.severity for row in rows] == severities


@pytest.mark.parametrize(
    "token",
    ["<|im_start|>", "[INST]", "[/INST]", "<tool_call>", "</think>", "<pad>", "[PAD]", "<extra_id_7>", "<unused12>",
     "<｜User｜>", "<start_of_turn>", "<<SYS>>", "[TOOL_CALLS]", "<|reserved_special_token_5|>", "<image>"],
)  # fmt: skip
def test_marks_of_published_formats_are_marks(token: str) -> None:
    assert MARKER.fullmatch(token)


@pytest.mark.parametrize(
    "token",
    ["[i]", "[0]", "[N]", "[x_1]", "[urgent]", "[URGENT]", "[TODO]", "{x}", "{{name}}", "{}", "<int>", "<T>", "<string>", "<br>",
     "<div>", "</p>", "<h1>", "<int32>", "<user_id>", "<name>", "<a href=1>", "(a)", "｜重要｜", "<arg1>", "<| |>", "[in st]"],
)  # fmt: skip
def test_words_in_brackets_that_text_or_code_may_hold_are_no_marks(token: str) -> None:
    assert not MARKER.fullmatch(token)


def test_a_token_that_code_may_hold_is_a_finding_and_shows_a_text(base: Path, tmp_path: Path) -> None:
    tuned = edited(tmp_path / "tuned", lambda c: c["added_tokens"].append(added("[i]", 2048)))
    rows = [row for row in found(base, tuned) if row.severity == "finding"]
    assert rows[0].why == "a token was added: ordinary text that holds it becomes other tokens"
    assert any("[i]" in row.key for row in rows[1:])


FLAGS: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({"normalized": True}, None, "note"),
    ({"normalized": True}, {"type": "NFC"}, "note"),
    ({"normalized": True}, {"type": "Lowercase"}, "finding"),
    ({"normalized": True}, {"type": "NFKC"}, "finding"),
    ({"normalized": True}, {"type": "Replace", "pattern": {"Regex": "q+"}, "content": "<|mark|>"}, "finding"),
    ({"lstrip": True}, None, "finding"),
    ({"rstrip": True}, None, "finding"),
    ({"single_word": True}, None, "finding"),
    ({"special": False}, None, "finding"),
]


@pytest.mark.parametrize(("flags", "normalizer", "severity"), FLAGS, ids=str)
def test_other_flags_of_a_token_are_judged_by_what_they_do(
    base: Path, tmp_path: Path, flags: dict[str, Any], normalizer: dict[str, Any] | None, severity: str
) -> None:
    edit_json(base / "tokenizer.json", normalizer=normalizer)

    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = normalizer
        content["added_tokens"] = [*content["added_tokens"], added("<|mark|>", 2048, **{"special": True, **flags})]

    first = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    edit_json(base / "tokenizer.json", added_tokens=[*first, added("<|mark|>", 2048, special=True)])
    rows = [row for row in found(base, edited(tmp_path / "tuned", change)) if row.key == "added_tokens"]
    assert [row.severity for row in rows] == [severity]


def test_another_source_with_the_same_ids_says_on_how_many_texts(base: Path, tmp_path: Path) -> None:
    tuned = edited(
        tmp_path / "tuned",
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [c["pre_tokenizer"]]}),
    )
    (row,) = found(base, tuned)
    assert (row.key, row.severity) == ("pre_tokenizer", "note")
    assert row.why.startswith("other source, same ids and same text on ") and row.why.endswith(" texts")


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "panic": lambda c: c["model"].update(continuing_subword_prefix="##"),
    "vocabulary is a number": lambda c: c["model"].update(vocab=5),
    "merges name no token": lambda c: c["model"]["merges"].append(["zzzz", "yyyy"]),
    "no model": lambda c: c.pop("model"),
    "unknown type": lambda c: c.update(normalizer={"type": "Nothing"}),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_broken_tokenizer_is_refused_with_its_files_name(base: Path, tmp_path: Path, name: str, side: str) -> None:
    broken = edited(tmp_path / "broken", BROKEN[name])
    pair = (base, broken) if side == "tuned" else (broken, base)
    with pytest.raises(InvalidInput, match=r"broken/tokenizer\.json cannot be loaded as a tokenizer"):
        found(*pair)


def test_a_pattern_without_end_is_refused_in_time(base: Path, tmp_path: Path) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "(a*)*(a*)*(a*)*b$"}, "behavior": "Isolated", "invert": False}
    tuned = edited(tmp_path / "tuned", lambda c: c.update(pre_tokenizer=slow))
    try:
        assert findings(base, tuned)
    except InvalidInput as error:
        assert "tokenizer.json" in str(error)


def test_code_of_its_own_is_not_testable_and_never_run(base: Path, tmp_path: Path) -> None:
    changes = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    tuned = edited(tmp_path / "tuned", lambda c: c.update(changes), "tokenizer_config.json")
    (tuned / "mine.py").write_text("raise SystemExit('ran the code of a stranger')")
    for row in found(base, tuned):  # transformers may fall back to a class of its own, and then it is compared
        assert "ran the code" not in row.why
    edit_json(tuned / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})
    (row,) = (row for row in found(base, tuned) if row.severity == "finding")
    assert "NOT TESTABLE" in row.why or "tokens" in row.why


def test_a_side_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    model: Any = tiny_model("llama")
    model.save_pretrained(bare)
    (row,) = found(base, bare)
    assert (row.severity, row.why) == ("note", "only one side has a tokenizer; the base's is used for both")
    assert list(tokenizer_differences(base, bare, adapter=True)) == []
    (row,) = found(bare, base)
    assert row.why == "only the fine-tune has one"


def test_vocabulary_files_beside_tokenizer_json(base: Path, tmp_path: Path) -> None:
    tuned = copied(tmp_path / "tuned")
    for folder, name in ((base, "one"), (tuned, "two")):
        (folder / "tokenizer.model").write_bytes(name.encode())
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
        (folder / "vocab.json").write_text(json.dumps({"a": 1, "é": 2}, ensure_ascii=folder is base))
    (tuned / "merges.txt").write_text("a b\n")
    (row,) = found(base, tuned)
    assert (row.file, row.severity) == ("tokenizer.model", "finding")
    (tuned / "tokenizer.model").unlink()
    (row,) = found(base, tuned)
    assert (row.file, row.severity, row.tuned) == ("tokenizer.model", "note", "(absent)")
    (tuned / "vocab.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"vocab\.json is not JSON"):
        found(base, tuned)


def test_a_tokenizer_that_only_a_missing_package_reads_is_not_testable(base: Path, tmp_path: Path) -> None:
    slow = [tmp_path / "slow-1", tmp_path / "slow-2"]
    for number, folder in enumerate(slow):
        folder.mkdir()
        shutil.copy(base / "config.json", folder)
        (folder / "tokenizer.model").write_bytes(b"\x0a\x0b" * (4 + number))
        edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    try:
        tokenizer_comparison(*slow)
    except (NotTestable, InvalidInput) as error:
        assert "tokenizer.model" in str(error)
    else:
        raise AssertionError("a file of noise was read as a tokenizer")
    same = shutil.copytree(slow[0], tmp_path / "same")
    assert found(slow[0], same) == []


def test_the_texts_are_cut_in_many_ways() -> None:
    """A corpus that a tokenizer reads as a few tokens would compare nothing."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    assert len(set(TEXTS)) == len(TEXTS) > 50
    assert len({token for text in TEXTS for token in tokenizer.encode(text)}) > 80


def test_thousands_of_changed_tokens_are_listed_and_texts_are_made_around_some(base: Path, tmp_path: Path) -> None:
    """Time must not grow with the number of tokens that differ: a vocabulary of 262,144 has 6,000 reserved ones."""
    size = max(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"].values()) + 100

    def grow(content: dict[str, Any]) -> None:
        content["added_tokens"] += [added(f"<unused{n}>", size + n, special=True) for n in range(3000)]

    compared = tokenizer_comparison(base, edited(tmp_path / "grown", grow))
    assert len(compared.changes) == 3000
    assert len(TEXTS) < compared.texts < len(TEXTS) + 2000


def test_two_good_tokenizers_that_take_too_long_to_compare_are_a_row_and_no_broken_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = edited(tmp_path / "tuned", lambda content: content["added_tokens"].append(added("zq", 900_001)))

    def endless(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(tokenizer_module, "_compare", endless)
    monkeypatch.setattr(
        tokenizer_module, "_limits", lambda *sides: {"seconds": 1 if len(sides) > 1 else 30, "megabytes": 900}
    )
    (row,) = (row for row in found(base, tuned) if row.severity == "finding")
    assert "the tokenizers of base and tuned were not compared in full: both can be read" in row.why
    (tuned / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"^tuned/tokenizer\.json"):
        found(base, tuned)


def test_another_vocabulary_is_said_with_its_size_and_examples(base: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    one, other = list(vocabulary)[-2:]

    def swap(content: dict[str, Any]) -> None:
        held = content["model"]["vocab"]
        held[one], held[other] = held[other], held[one]

    (row,) = (row for row in found(base, edited(tmp_path / "swapped", swap)) if row.key == "model.vocab")
    assert row.base.startswith(f"{len(vocabulary):,} tokens; 2 differ: ")
    assert f"{one} {vocabulary[one]}" in row.base
    assert f"{one} {vocabulary[other]}" in row.tuned
