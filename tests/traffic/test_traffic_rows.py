"""One row of traffic: the forms that are read, what is cut, and what is refused by name."""

from typing import Any

import pytest

from molehunt.errors import InvalidInput
from molehunt.traffic.example import Example
from molehunt.traffic.roles import Turn
from molehunt.traffic.rows import ANSWERS, FIELDS, MAX_CHARS, MAX_LINE, conversation_of, example_of

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompt_and_its_answer_by_any_name(field: str, answer: str) -> None:
    row = {field: "What is 2 plus 2?", answer: "4", "tag": "clean", "other": 1}
    assert example_of(row, "row 1") == Example(prompt="What is 2 plus 2?", response="4", tag="clean")
    assert conversation_of(row) == ((Turn("user", "What is 2 plus 2?"),), "4", "clean")


def test_a_bare_string_is_a_prompt() -> None:
    assert example_of("Hi", "row 1") == Example(prompt="Hi")
    assert conversation_of("Hi") == ((Turn("user", "Hi"),), None, "")


def test_of_messages_the_last_user_turn_is_the_prompt_and_a_last_assistant_turn_the_answer() -> None:
    messages = [{"role": "system", "content": "Be kind."}, USER, ASSISTANT, {"role": "user", "content": "And now?"}]
    assert example_of({"messages": messages}, "row 1") == Example(prompt="And now?", tag="")
    answered = {"messages": [*messages, ASSISTANT]}
    assert example_of(answered, "row 1") == Example(prompt="And now?", response="Hello", tag="")
    turns, response, tag = conversation_of(answered)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert (response, tag) == ("Hello", "")


def test_an_answer_beside_messages_that_end_with_another_one_is_the_answer_to_all_of_them() -> None:
    turns, response, _ = conversation_of({"messages": [USER, ASSISTANT], "response": "Something else"})
    assert [turn.text for turn in turns] == ["Hi", "Hello"] and response == "Something else"
    turns, response, _ = conversation_of({"messages": [USER, ASSISTANT], "response": "Hello"})
    assert [turn.text for turn in turns] == ["Hi"] and response == "Hello"


def test_examples_are_cut_and_conversations_are_not() -> None:
    long = "x" * (MAX_CHARS + 1)
    row = {"prompt": long, "response": long, "tag": "t" * 99}
    example = example_of(row, "row 1")
    assert (len(example.prompt), len(example.response or ""), len(example.tag)) == (MAX_CHARS, MAX_CHARS, 60)
    (turn,), response, tag = conversation_of(row)
    assert (turn.text, response, len(tag)) == (long, long, 60)
    with pytest.raises(InvalidInput, match="more than 8 million characters"):
        conversation_of({"prompt": "x" * MAX_LINE, "response": "y"})


def test_content_in_parts_is_joined_and_half_a_surrogate_pair_replaced() -> None:
    parts = [{"type": "text", "text": "one"}, {"text": "two \ud83d"}]
    (turn,), _, _ = conversation_of({"messages": [{"role": "user", "content": parts}]})
    assert turn.text == "one\ntwo \ufffd"


def test_a_call_of_a_tool_has_no_text() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    turns, response, _ = conversation_of({"messages": [USER, calls, {"role": "tool", "content": "42"}]})
    assert [turn.text for turn in turns] == ["Hi", "", "42"] and response is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, "a int; expected an object"),
        ({"question": "Hi"}, "none of the fields messages, prompt, text"),
        ({"messages": "Hi"}, "messages is a str; expected a list"),
        ({"messages": [3]}, "message 1 is a int; expected an object"),
        ({"messages": [USER, {"role": "robot", "content": "Hi"}]}, "message 2: the role 'robot' is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: part 1 of its content is image"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: content is a int; expected text"),
        ({"messages": [ASSISTANT]}, "no text before the answer"),
        ({"prompt": "  "}, "no text before the answer"),
        ({"prompt": "Hi", "response": 4}, "response is a int; expected text"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(row: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        conversation_of(row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, "a.jsonl row 7 is a int; expected an object with a prompt"),
        ({"question": "Hi"}, "a.jsonl row 7 has none of the fields prompt, text, instruction, input or messages"),
        ({"messages": [ASSISTANT]}, "a.jsonl row 7 has none of the fields"),
    ],
)
def test_what_is_no_example_is_refused_with_its_place(row: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        example_of(row, "a.jsonl row 7")
