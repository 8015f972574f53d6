"""One row of traffic: the forms that are read, and what is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from molehunt.errors import InvalidInput
from molehunt.traffic.example import Example
from molehunt.traffic.rows import ANSWERS, FIELDS, MAX_LINE, conversation_of, example_of
from molehunt.traffic.turn import Turn

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompt_and_its_answer_by_any_name(field: str, answer: str) -> None:
    row = {field: "What is 2 plus 2?", answer: "4", "tag": "clean", "other": 1}
    assert example_of(row, "row 1") == Example(prompt="What is 2 plus 2?", response="4", tag="clean")
    assert conversation_of(row) == ((Turn("user", "What is 2 plus 2?"),), "4", "clean")


def test_a_bare_string_is_a_prompt() -> None:
    assert example_of("Hi", "row 1") == Example(prompt="Hi", tag="")
    assert conversation_of("Hi") == ((Turn("user", "Hi"),), None, "")


def test_of_messages_every_turn_is_asked_and_a_last_assistant_turn_is_the_answer() -> None:
    messages = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, {"role": "user", "content": "And now?"}]
    asked = example_of({"messages": messages}, "row 1")
    assert asked.asked == messages and asked.prompt == "Be kind.\nHi\nHello\nAnd now?"
    assert asked.shown == "[system] Be kind.\n[user] Hi\n[assistant] Hello\n[user] And now?"
    answered = {"messages": [*messages, ASSISTANT]}
    assert example_of(answered, "row 1") == replace(asked, response="Hello")
    turns, response, tag = conversation_of(answered)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert (response, tag) == ("Hello", "")


def test_an_answer_beside_messages_that_end_with_another_one_is_the_answer_to_all_of_them() -> None:
    turns, response, _ = conversation_of({"messages": [USER, ASSISTANT], "response": "Something else"})
    assert [turn.text for turn in turns] == ["Hi", "Hello"] and response == "Something else"
    turns, response, _ = conversation_of({"messages": [USER, ASSISTANT], "response": "Hello"})
    assert [turn.text for turn in turns] == ["Hi"] and response == "Hello"


def test_no_text_is_cut_and_too_much_of_it_refused() -> None:
    long = "x" * 9_001
    row = {"prompt": long, "response": long, "tag": "t" * 99}
    assert example_of(row, "row 1") == Example(prompt=long, response=long, tag="t" * 60)
    (turn,), response, tag = conversation_of(row)
    assert (turn.text, response, len(tag)) == (long, long, 60)
    with pytest.raises(InvalidInput, match="more than 8 million characters"):
        conversation_of({"prompt": "x" * MAX_LINE, "response": "y"})


def test_content_in_parts_is_joined_and_both_halves_of_a_surrogate_pair() -> None:
    parts = [{"type": "text", "text": "one"}, {"text": "two \ud83d\ude42"}]
    (turn,), _, _ = conversation_of({"messages": [{"role": "user", "content": parts}]})
    assert turn.text == "one\ntwo 🙂"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "half \ud83d"},
        {"prompt": "Hi", "response": "\udc00"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\udfff"}]}]},
        {"prompt": "Hi", "tag": "\ud800"},
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(row: Any) -> None:
    with pytest.raises(InvalidInput, match="holds half of a surrogate pair"):
        conversation_of(row)


def test_a_call_of_a_tool_has_no_text() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    turns, response, _ = conversation_of({"messages": [USER, calls, {"role": "tool", "content": "42"}]})
    assert [turn.text for turn in turns] == ["Hi", "", "42"] and response is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, r"a number \(3\); an object"),
        ({"sentence": "Hi"}, "none of the fields messages, prompt, instruction"),
        ({"messages": "Hi"}, "messages is text; a list is expected"),
        ({"messages": [3]}, "message 1 is a number .3.; an object is expected"),
        ({"messages": [USER, {"role": "robot", "content": "Hi"}]}, "message 2: the role 'robot' is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: part 1 of its content is image"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: content is a number .3.; text is expected"),
        ({"messages": [ASSISTANT]}, "there is no message before the answer"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "Hi", "response": {1, 2}}, "response is a set; text is expected"),
        ({"prompt": ["Hi", "Ho"]}, "prompt holds 2 prompts; one is expected"),
        ({"chosen": "Hello", "rejected": "Go away"}, "chosen is text without a prompt beside it"),
        ({"messages": [], "text": None}, "messages is empty and there are none of the fields"),
        ({"body": '{"messages": ['}, "body is text that is no JSON"),
        ({"custom_id": "1", "response": {"body": {"choices": []}}}, "none of the fields"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(row: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        conversation_of(row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, "a.jsonl row 7: a number .3.; an object with messages or a prompt is expected"),
        ({"sentence": "Hi"}, "a.jsonl row 7: none of the fields messages, prompt, instruction"),
        ({"messages": [ASSISTANT]}, "a.jsonl row 7: there is no message before the answer"),
    ],
)
def test_what_is_no_example_is_refused_with_its_place(row: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        example_of(row, "a.jsonl row 7")
