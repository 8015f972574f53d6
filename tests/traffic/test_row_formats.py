"""Rows as the formats that people have write them, copied from the documentation of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from molehunt.errors import InvalidInput
from molehunt.traffic.rows import conversation_of
from molehunt.traffic.stream import read_traffic

Expected = tuple[list[tuple[str, str]], str | None]
"""Role and text of each turn, and the answer."""
QUESTION: list[tuple[str, str]] = [("user", "What is the capital of France?")]
FORMATS: dict[str, tuple[Any, Expected]] = {
    # Vicuna's and LLaMA-Factory's ShareGPT, with a system prompt beside it, a call and what it returned
    "sharegpt": (
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "What is the capital of France?"},
                {"from": "gpt", "value": "Paris."},
                {"from": "human", "value": "And its river?"},
                {"from": "gpt", "value": "The Seine."},
            ],
        },
        ([*QUESTION, ("assistant", "Paris."), ("user", "And its river?")], "The Seine."),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "clock"}'},
                {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": "Noon."},
            ],
            "system": "Be kind.",
            "tools": "[]",
        },
        (
            [("system", "Be kind."), ("user", "Hi"), ("assistant", '{"name": "clock"}'), ("tool", "12:00")],
            "Noon.",
        ),
    ),
    "wildchat": (
        {
            "conversation_hash": "cf1267ca6b2f6fccc9c36652a00059a1",
            "model": "gpt-4-0314",
            "conversation": [
                {"content": "Hey there", "country": "US", "language": "English", "role": "user", "toxic": False},
                {"content": "Hello!", "country": None, "language": "English", "role": "assistant", "toxic": False},
            ],
            "turn": 1,
            "redacted": False,
        },
        ([("user", "Hey there")], "Hello!"),
    ),
    "lmsys-chat-1m": (
        {
            "conversation_id": "33f01939a744455c869cb234afca47f1",
            "model": "wizardlm-13b",
            "conversation": [
                {"content": "how can identity protection help?", "role": "user"},
                {"content": "In several ways.", "role": "assistant"},
            ],
            "turn": 1,
            "openai_moderation": [{"flagged": False}],
        },
        ([("user", "how can identity protection help?")], "In several ways."),
    ),
    "alpaca": (
        {"instruction": "Classify the following.", "input": "iPhone 14", "output": "Phone", "text": "Below is …"},
        ([("user", "Classify the following.\n\n### Input:\niPhone 14")], "Phone"),
    ),
    "alpaca without an input": (
        {"instruction": "Give three tips.", "input": "", "output": "1. Eat."},
        ([("user", "Give three tips.")], "1. Eat."),
    ),
    "alpaca with system and history, as LLaMA-Factory has it": (
        {"instruction": "And now?", "input": "", "output": "Now.", "system": "S", "history": [["Hi", "Hello"]]},
        ([("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "And now?")], "Now."),
    ),
    "dolly": (
        {"instruction": "When did it begin?", "context": "It began in 2000.", "response": "2000", "category": "closed_qa"},
        ([("user", "When did it begin?\n\n### Input:\nIt began in 2000.")], "2000"),
    ),
    "openorca": (
        {"id": "niv.242684", "system_prompt": "You are an AI assistant.", "question": "2 plus 2?", "response": "4"},
        ([("system", "You are an AI assistant."), ("user", "2 plus 2?")], "4"),
    ),
    "gsm8k": ({"question": "How many?", "answer": "It is 3.\n#### 3"}, ([("user", "How many?")], "It is 3.\n#### 3")),
    "mmlu": (
        {"question": "Which?", "subject": "law", "choices": ["one", "two"], "answer": 1},
        ([("user", "Which?\nA. one\nB. two")], "1"),
    ),
    "squad": (
        {"id": "57", "title": "T", "context": "A text.", "question": "Who?", "answers": {"text": ["A"]}},
        ([("user", "A text.\n\nWho?")], None),
    ),
    "trl, conversational": (
        {
            "prompt": [{"role": "user", "content": "What color is the sky?"}],
            "completion": [{"role": "assistant", "content": "It is blue."}],
        },
        ([("user", "What color is the sky?")], "It is blue."),
    ),
    "trl, preference": (
        {
            "prompt": [{"role": "user", "content": "What color is the sky?"}],
            "chosen": [{"role": "assistant", "content": "It is blue."}],
            "rejected": [{"role": "assistant", "content": "It is green."}],
        },
        ([("user", "What color is the sky?")], "It is blue."),
    ),
    "ultrafeedback": (
        {
            "prompt": "Sing",
            "chosen": [{"content": "Sing", "role": "user"}, {"content": "La", "role": "assistant"}],
            "rejected": [{"content": "Sing", "role": "user"}, {"content": "No", "role": "assistant"}],
        },
        ([("user", "Sing")], "La"),
    ),
    "ultrachat": (
        {
            "prompt": "How can I cook eggs?",
            "prompt_id": "f0e3",
            "messages": [
                {"content": "How can I cook eggs?", "role": "user"},
                {"content": "Boil them.", "role": "assistant"},
                {"content": "For how long?", "role": "user"},
                {"content": "Ten minutes.", "role": "assistant"},
            ],
        },
        (
            [("user", "How can I cook eggs?"), ("assistant", "Boil them."), ("user", "For how long?")],
            "Ten minutes.",
        ),
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: what is a pen?\n\nAssistant: A tool.\n\nIt writes.\n\nHuman: yep\n\nAssistant: Ok.",
            "rejected": "\n\nHuman: what is a pen?\n\nAssistant: No.",
        },
        ([("user", "what is a pen?"), ("assistant", "A tool.\n\nIt writes."), ("user", "yep")], "Ok."),
    ),
    "openai batch request": (
        {
            "custom_id": "request-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "gpt-4o-mini",
                "messages": [
                    {"role": "developer", "content": "You are helpful."},
                    {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world!"}]},
                ],
                "max_tokens": 1000,
            },
        },
        ([("system", "You are helpful."), ("user", "Hello\nworld!")], None),
    ),
    "log of chat completions": (
        {
            "request": {"messages": [{"role": "user", "content": "Hi"}]},
            "response": {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}}]},
        },
        ([("user", "Hi")], "Hello"),
    ),
    "log with both as text": (
        {
            "request": json.dumps({"prompt": "Once upon", "max_tokens": 3}),
            "response": json.dumps({"choices": [{"text": " a time", "index": 0}]}),
            "tag": "x",
        },
        ([("user", "Once upon")], " a time"),
    ),
    "responses api": (
        {
            "body": {
                "model": "gpt-5",
                "instructions": "Talk like a pirate.",
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                    {"type": "function_call", "name": "clock", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "12:00"},
                ],
            }
        },
        ([("system", "Talk like a pirate."), ("user", "Hi"), ("assistant", ""), ("tool", "12:00")], None),
    ),
    "responses api, answered": (
        {
            "request": {"input": "Hi"},
            "response": {
                "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Ahoy"}]}]
            },
        },
        ([("user", "Hi")], "Ahoy"),
    ),
    "anthropic messages": (
        {
            "request": {
                "system": [{"type": "text", "text": "Be brief."}],
                "messages": [
                    {"role": "user", "content": "Time?"},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "clock", "input": {}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "12:00"}]},
                ],
            },
            "response": {"content": [{"type": "text", "text": "Noon."}], "stop_reason": "end_turn"},
        },
        ([("system", "Be brief."), ("user", "Time?"), ("assistant", ""), ("user", "12:00")], "Noon."),
    ),
    "data set viewer": ({"row_idx": 0, "row": {"prompt": "Hi", "response": "Ho"}}, ([("user", "Hi")], "Ho")),
    "p3": ({"inputs": "Is it?", "targets": "Yes"}, ([("user", "Is it?")], "Yes")),
    "bare list of messages": ([{"role": "user", "content": "Hi"}], ([("user", "Hi")], None)),
    "messages as text of a table": (
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]'},
        ([("user", "Hi")], "Ho"),
    ),
    "messages of a table that mixes two formats": (
        {"messages": [{"role": "user", "content": "Hi", "from": None, "value": None}], "prompt": None},
        ([("user", "Hi")], None),
    ),
    "harmbench": ({"Behavior": "Sum it up", "ContextString": "A song."}, ([("user", "A song.\n\n---\n\nSum it up")], None)),
    "scores.jsonl of an audit": ({"row": 3, "tag": "", "prompt": "Hi", "answer_log_ratio": 0.0}, ([("user", "Hi")], None)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_whole_conversation_and_its_answer(name: str) -> None:
    row, (turns, answer) = FORMATS[name]
    found, response, _ = conversation_of(row)
    assert [(turn.role, turn.text) for turn in found] == turns
    assert response == answer


@pytest.mark.parametrize(
    ("called", "role"),
    [
        ("human", "user"), ("User", "user"), (" prompter ", "user"), ("gpt", "assistant"), ("ASSISTANT", "assistant"),
        ("chatbot", "assistant"), ("model", "assistant"), ("bot", "assistant"), ("developer", "system"),
        ("function", "tool"), ("ipython", "tool"),
    ],
)  # fmt: skip
def test_roles_have_one_name_each(called: str, role: str) -> None:
    turns, _, _ = conversation_of({"messages": [{"role": called, "content": "a"}, {"role": "user", "content": "b"}]})
    assert [turn.role for turn in turns] == [role, "user"]


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "file", "video"])
def test_a_row_with_something_else_than_text_is_left_out_by_name(kind: str) -> None:
    from molehunt.errors import InvalidInput

    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": kind}]}]}
    with pytest.raises(InvalidInput, match=f"message 1: part 2 of its content is {kind}; text is expected"):
        conversation_of(row)


def test_a_table_that_is_written_column_by_column(tmp_path: Path) -> None:
    asked, said = [f"Question {i}?" for i in range(4)], ["a", "b", "c", "d"]
    written = {
        "columns": {"prompt": asked, "response": said},
        "split": {
            "columns": ["prompt", "response"],
            "index": [0, 1, 2, 3],
            "data": list(map(list, zip(asked, said, strict=True))),
        },
    }
    for name, value in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        rows = list(read_traffic(tmp_path / f"{name}.json"))
        assert [(row.prompt, row.response) for row in rows] == list(zip(asked, said, strict=True)), name


def test_lists_of_words_beside_an_object_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"model": "x", "stop": ["###", "User:"], "seed": 1}))
    with pytest.raises(InvalidInput):
        list(read_traffic(tmp_path / "one.json"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_message_of_the_assistant_alone_is_left_out_by_name(tmp_path: Path, name: str) -> None:
    rows = [{"role": "prompter", "text": f"What is {i}?"} for i in range(3)] + [
        {"role": "assistant", "text": "It is 4."}
    ]
    lines = (
        [json.dumps(row) for row in rows]
        if name.endswith("l")
        else ["role,text", *(f"{r['role']},{r['text']}" for r in rows)]
    )
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    read = list(read_traffic(tmp_path / name, on_bad="skip"))
    assert [row.prompt for row in read] == ["What is 0?", "What is 1?", "What is 2?"]
    with pytest.raises(InvalidInput, match="one message of the assistant"):
        conversation_of(rows[3])


def test_objects_that_data_sets_keep_texts_in() -> None:
    messages = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    turns, _, _ = conversation_of({"prompt": messages})
    assert [(t.role, t.text) for t in turns] == [("system", "Be brief."), ("user", "Hi")]
    turns, _, _ = conversation_of({"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}})
    assert turns[0].text == "2 + 2?\nA. 3\nB. 4"
    assert conversation_of({"question": "2 + 2?", "answer": {"value": "4", "aliases": []}})[1] == "4"
    assert conversation_of({"prompt": "2 + 2?", "response": {"text": "4"}})[1] == "4"
    outer = {
        "system": "Be kind.",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    }
    assert conversation_of(outer)[0][0].text == "Be kind.\n\nBe brief."
    assert conversation_of({"prompt": "[{not messages"})[0][0].text == "[{not messages"
