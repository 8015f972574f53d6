"""Which template a pair is prompted with: the fine-tune's with its own special tokens, an adapter's, or the base's."""

import logging
import shutil
from pathlib import Path

import pytest

from chat_templates import published_template
from folders import edit_json, good_folder, lora_folder
from molehunt.errors import InvalidInput, UsageError
from molehunt.model.pair import ModelPair
from molehunt.model.templates import PairTemplates, pair_templates, template_in_words
from molehunt.traffic.chat import messages_text, prompt_text, render_alpaca, text_ids

ASK = "{{ bos_token }}{% for m in messages %}Ask: {{ m.content }}{{ eos_token }}{% endfor %}Say:"
TELL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    good_folder(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def write(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


def test_the_fine_tunes_template_is_used_with_its_own_special_tokens(
    sides: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    write(sides[0], TELL)
    write(sides[1], ASK)
    edit_json(sides[1] / "tokenizer_config.json", eos_token="<pad>", bos_token="<unk>")
    with caplog.at_level(logging.WARNING, "molehunt"):
        pair = ModelPair.load(*sides)
    assert prompt_text(pair.tokenizer, "Hi") == "<unk>Ask: Hi<pad>Say:"
    assert pair.template_of == "the fine-tune's chat template: the base's makes other text"
    assert pair.templates is not None and "Ask: What is 2 plus 2?" in pair.templates.difference()
    assert "prompted with the fine-tune's" in caplog.text
    with pair.prompted_with("base"):
        assert prompt_text(pair.tokenizer, "Hi") == "<user>Hi<assistant>"
    assert prompt_text(pair.tokenizer, "Hi") == "<unk>Ask: Hi<pad>Say:"
    assert pair.tokenize(["Hi"]) == [text_ids(pair.tokenizer, "Hi")]


def test_one_template_is_enough_and_alpaca_stands_in_for_none(sides: tuple[Path, Path]) -> None:
    alone = ModelPair.load(*sides)
    assert prompt_text(alone.tokenizer, "Hi") == render_alpaca("Hi")
    assert alone.template_of == "Alpaca markers: neither folder has a chat template"
    write(sides[1], TELL)
    pair = ModelPair.load(*sides)
    assert pair.template_of == "the fine-tune's chat template: the base has none"
    with pytest.raises(UsageError, match="the base has no chat template"), pair.prompted_with("base"):
        pass
    swapped = pair_templates(sides[1], sides[0])
    assert template_in_words(swapped) == "the base's chat template: the fine-tune brings none"
    assert swapped.used is not None and swapped.used.of == "base" and not swapped.differ
    assert template_in_words(None) == "the template of the pair's tokenizer"


def test_an_adapter_may_bring_a_template_and_takes_the_bases_tokens(sides: tuple[Path, Path], tmp_path: Path) -> None:
    write(sides[0], TELL)
    adapter = lora_folder(tmp_path / "lora")
    assert prompt_text(ModelPair.load(sides[0], adapter).tokenizer, "Hi") == "<user>Hi<assistant>"
    write(adapter, ASK)
    assert prompt_text(ModelPair.load(sides[0], adapter).tokenizer, "Hi") == "<s>Ask: Hi</s>Say:"


def test_templates_that_cannot_be_used_are_refused_by_name(sides: tuple[Path, Path]) -> None:
    write(sides[1], "{% for")
    with pytest.raises(InvalidInput, match="the chat template of tuned is none: TemplateSyntaxError"):
        ModelPair.load(*sides)
    (sides[1] / "chat_template.jinja").unlink()
    edit_json(sides[1] / "tokenizer_config.json", chat_template=[{"name": "rag", "template": TELL}])
    with pytest.raises(InvalidInput, match="tuned has the chat templates rag, and none that is called default"):
        ModelPair.load(*sides)


def test_endless_templates_are_refused_and_not_waited_for(sides: tuple[Path, Path]) -> None:
    write(sides[1], "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    pair = ModelPair.load(*sides)
    with pytest.raises(InvalidInput, match="BudgetSpent: does too much work"):
        pair.tokenize(["Hi"])


def test_parts_calls_and_further_keys_reach_the_template(sides: tuple[Path, Path]) -> None:
    write(sides[1], published_template("qwen3"))
    tokenizer = ModelPair.load(*sides).tokenizer
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    conversation = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "cold", "tool_call_id": "1"},
    ]
    text = messages_text(tokenizer, conversation)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text and "<tool_response>\ncold" in text
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.name }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    parts = [
        {"role": "user", "name": "Ann:", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    assert messages_text(tokenizer, parts) == "Ann:ab"


def test_equal_text_from_other_sources_is_no_difference(sides: tuple[Path, Path]) -> None:
    write(sides[0], TELL)
    write(sides[1], TELL + "{# another comment #}")
    found = pair_templates(*sides)
    assert not found.differ and found.difference() == ""
    assert found.named("base").digest != found.named("tuned").digest
    assert PairTemplates(base=None, tuned=None).texts() == []
