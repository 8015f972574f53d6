"""Conversations that templates are tried on: cells that differ in one thing each, so that neighbours can be compared."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

from jinja2 import nodes

from molehunt.checkpoint.chat_template import SPECIAL, TODAY
from molehunt.checkpoint.template_words import echo

MOST_TURNS = 20
"""Number of turns up to which each number is tried; numbers that stand in the template are tried, too."""
COMBINED = 60
"""Number of random combinations of all conditions."""
CALL = "zqcall0001"
TOOLS: tuple[Mapping[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": f"zqtool{i}",
            "description": f"zqdoes{i}",
            "parameters": {
                "type": "object",
                "properties": {f"zqcity{i}": {"type": "string", "description": f"zqwhere{i}"}},
                "required": [f"zqcity{i}"],
            },
        },
    }
    for i in (1, 2)
)
RICH_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "zqtool3",
        "description": "zqdoes3",
        "parameters": {
            "type": "object",
            "properties": {
                "zqtext": {"type": "string", "description": "zqabout1", "enum": ["zqone", "zqtwo"], "default": "zqone"},
                "zqnumber": {"type": "number", "description": "zqabout2", "default": 1.5, "minimum": 0},
                "zqwhole": {"type": "integer", "nullable": True},
                "zqflag": {"type": "boolean", "description": "zqabout4", "default": True},
                "zqlist": {"type": "array", "items": {"type": "string"}, "description": "zqabout5"},
                "zqlists": {"type": "array", "items": {"type": "object", "properties": {"zqin": {"type": "string"}}}},
                "zqmap": {
                    "type": "object",
                    "description": "zqabout6",
                    "properties": {"zqin": {"type": "string", "description": "zqabout7"}},
                    "required": ["zqin"],
                },
                "zqeither": {"type": ["string", "null"], "description": "zqabout8"},
                "zqone": {"anyOf": [{"type": "string"}, {"type": "integer"}], "oneOf": [{"type": "string"}]},
            },
            "required": ["zqtext", "zqmap"],
        },
        "return": {"type": "string", "description": "zqgives3"},
    },
}
DOCUMENTS: tuple[Mapping[str, str], ...] = ({"title": "zqtitle1", "text": "zqtext1", "doc_id": "zqdoc1"},)
PUBLISHED_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "add_vision_id": (True,), "available_tools": (TOOLS,), "builtin_tools": (["browser", "python"],),
    "citation_mode": ("FAST",), "controls": ({"length": "long"},), "current_date": ("zqday",), "custom_tools": (TOOLS,),
    "date_string": ("zqday",), "enable_thinking": (True, False), "keep_past_thinking": (True,),
    "knowledge_cutoff": ("zqday",), "low_effort": (True,), "medium_effort": (True,), "model_identity": ("zqmodel",),
    "preserve_thinking": (True,), "python_tools": (["zqtool"],), "reasoning_effort": ("low", "medium", "high", "xhigh"),
    "reasoning_strength": ("low",), "safety_mode": ("NONE", "STRICT"), "system_message": ("zqsystem",),
    "thinking": (True, False), "tool_namespace_descriptions": ({"zqspace": "zqabout"},),
    "tools_in_user_message": (True, False), "truncate_history_thinking": (False,), "xml_tools": (["zqtool"],),
}  # fmt: skip
"""Arguments that published templates ask for, with values that they know."""
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TriedConversation:
    """One conversation under one set of conditions."""

    name: str
    """The condition in which it differs from its neighbour, for a report."""
    messages: tuple[Message, ...]
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])
    today: datetime = TODAY

    def under(self, name: str, **given: Any) -> "TriedConversation":
        """The same conversation with further arguments of the template."""
        return replace(self, name=name, given={**self.given, **given})


def chat(turns: int, *, system: bool = False, parts: bool = False) -> tuple[Message, ...]:
    """User and assistant in turn, the user first; every message has a text of its own."""
    said = [("system", echo(0))] if system else []
    said += [("assistant" if i % 2 else "user", echo(i + 1)) for i in range(turns)]
    return tuple({"role": r, "content": [{"type": "text", "text": t}] if parts else t} for r, t in said)


def single() -> TriedConversation:
    """The neighbour of all others: one user's turn."""
    return TriedConversation("one turn of a user", chat(1), {"add_generation_prompt": True})


def called(arguments: Any, content: str | None, turns: int = 3) -> tuple[Message, ...]:
    """A conversation in which the assistant calls a tool."""
    call = {"id": CALL, "type": "function", "function": {"name": "zqtool1", "arguments": arguments}}
    whole: list[Message] = [
        {"role": "user", "content": echo(1)},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": echo(3), "tool_call_id": CALL, "name": "zqtool1"},
        {"role": "assistant", "content": echo(4)},
        {"role": "user", "content": echo(5)},
    ]
    return tuple(whole[:turns])


def everything() -> TriedConversation:
    """A conversation with a system prompt, calls and results of tools, reasoning, parts, tools and documents."""
    said = [*chat(2, system=True), *called({"zqcity1": "zqplace1"}, echo(2), 5), *chat(1, parts=True)]
    messages = tuple({**one, "reasoning_content": echo(9)} if one["role"] == "assistant" else one for one in said)
    given: dict[str, Any] = {"tools": (*TOOLS, RICH_TOOL), "documents": DOCUMENTS, "add_generation_prompt": True}
    return TriedConversation("everything at once", messages, given)


def given_cells() -> list[TriedConversation]:
    """Tools and documents in one turn: templates may explain them in words of their own."""
    tools, documents = {"tools": TOOLS[:1]}, {"documents": DOCUMENTS}
    found: list[TriedConversation] = []
    for system in (False, True):
        start = replace(single(), messages=chat(1, system=system))
        found += [start.under("tools are given", **tools), start.under("documents are given", **documents)]
    found.append(single().under("several tools are given", tools=TOOLS))
    whole = RICH_TOOL["function"]
    for name, kind in whole["parameters"]["properties"].items():
        parameters = {"type": "object", "properties": {name: kind}, "required": [name]}
        tool = {"type": "function", "function": {**whole, "parameters": parameters}}
        found.append(single().under("a tool with a parameter of another type is given", tools=[tool]))
    found.append(single().under("tools and documents are given", **tools, **documents))
    return found


def argument_cells(names: Iterable[str]) -> list[tuple[TriedConversation, bool]]:
    """Further arguments that a template asks for, and whether published templates ask for them as well."""
    found: list[tuple[TriedConversation, bool]] = []
    for name in sorted(set(names) - {*SPECIAL, "messages", "tools", "documents", "add_generation_prompt"}):
        for value in PUBLISHED_ARGUMENTS.get(name, (True, "zqgiven")):
            for start in (single(), everything()):
                found.append((start.under(f"{name}={value!r}"[:60], **{name: value}), name in PUBLISHED_ARGUMENTS))
    return found


def longer_given_cells() -> list[TriedConversation]:
    """Tools and documents in several turns, where the words are those of one turn."""
    more = [(TOOLS * 2)[:3], [*TOOLS, RICH_TOOL], TOOLS * 4, [RICH_TOOL]]
    return [
        *(single().under(f"{len(tools)} tools are given", tools=tools) for tools in more),
        *(single().under(f"{n} documents are given", documents=DOCUMENTS * n) for n in (2, 3, 4, 7)),
        everything(),
    ] + [
        replace(single(), messages=chat(turns, system=system)).under(f"{what} in {turns} turns", **{what: value})
        for what, value in (("tools", TOOLS[:1]), ("documents", DOCUMENTS))
        for turns in (3, 5, 9, 15)
        for system in (False, True)
    ]


def odd_cells() -> list[TriedConversation]:
    """Conditions under which a template has no reason for words of its own."""
    start = single()
    found = [
        replace(start, name="a system message", messages=chat(1, system=True)),
        start.under("no generation prompt", add_generation_prompt=False),
        *(
            start.under(f"{flag}={value}", **{flag: value})
            for flag in ("enable_thinking", "thinking")
            for value in (True, False)
        ),
    ]
    for turns in (1, 3):
        found.append(replace(start, name="content as a list of parts", messages=chat(turns, system=True, parts=True)))
    two = ({"type": "text", "text": echo(1)}, {"type": "text", "text": echo(2)})
    pictures = ({"type": "image"}, {"type": "text", "text": echo(1)})
    found += [
        replace(start, name="content as two parts", messages=({"role": "user", "content": two},)),
        replace(start, name="a picture", messages=({"role": "user", "content": pictures},)),
        replace(start, name="no content", messages=({"role": "user", "content": ""},)),
        replace(start, name="a message without content", messages=(*chat(1), {"role": "assistant"}, *chat(1))),
        replace(start, name="further keys", messages=({**chat(1)[0], "name": "zqname1", "zqkey": "zqvalue1"},)),
    ]
    for kind in ("image", "image_url", "video", "audio"):
        part = {"type": kind, kind: "zqpart1"}
        found.append(
            replace(start, name="a part that is no text", messages=({"role": "user", "content": [part, two[0]]},))
        )
    results = (
        {"name": "zqtool1", "response": {"zqvalue": "zqanswer"}},
        {"response": "zqanswer"},
        {"name": "zqtool1", "response": 1},
    )
    answered = {**chat(2)[1], "tool_responses": results}
    found.append(replace(start, name="an answer with results of tools", messages=(*chat(1), answered, *chat(1))))
    calls = [
        called(arguments, content, turns)
        for arguments in ({"zqcity1": "zqplace1"}, '{"zqcity1": "zqplace1"}')
        for content in (echo(2), None)
        for turns in (2, 3, 4, 5)
    ]
    found += [replace(start, name="a tool call", messages=one) for one in calls]
    thought = ({"role": "user", "content": echo(1)}, {**chat(2)[1], "reasoning_content": echo(9)}, *chat(1))
    found.append(replace(start, name="an answer with its reasoning", messages=thought))
    for role in ("developer", "tool", "function", "ipython", "assistant", "system", "zqrole"):
        found.append(replace(start, name=f"the role {role}", messages=({"role": role, "content": echo(1)},)))
        found.append(replace(start, name=f"the role {role}", messages=({"role": role, "content": echo(1)}, *chat(1))))
    found.append(replace(start, name="two users' turns in a row", messages=(*chat(1), *chat(1))))
    found.append(replace(start, name="a late system message", messages=(*chat(2), *chat(1, system=True))))
    return found


def turn_cells(counts: Sequence[int]) -> dict[tuple[bool, bool], list[TriedConversation]]:
    """Conversations of every length, by whether they have a system message and whether the user speaks last."""
    found: dict[tuple[bool, bool], list[TriedConversation]] = {}
    for turns in sorted({*range(1, MOST_TURNS + 1), *counts}):
        for system in (False, True):
            users = turns % 2 == 1
            cell = TriedConversation(f"{turns} turns", chat(turns, system=system), {"add_generation_prompt": users})
            found.setdefault((system, users), []).append(cell)
    return found


def combined_cells(days: Sequence[datetime], seed: int = 0) -> list[TriedConversation]:
    """Random combinations of all conditions, always the same ones."""
    rng = Random(seed)
    found: list[TriedConversation] = []
    for _ in range(COMBINED):
        system, parts = rng.random() < 0.5, rng.random() < 0.3
        messages = chat(rng.choice((1, 2, 3, 5, 9, 14)), system=system, parts=parts)
        if rng.random() < 0.3:
            messages = (*called({"zqcity1": "zqplace1"}, None, 4), *messages[system:])
        given: dict[str, Any] = {"add_generation_prompt": rng.random() < 0.8}
        if rng.random() < 0.4:
            given["tools"] = TOOLS[: rng.choice((1, 2))]
        if rng.random() < 0.2:
            given["documents"] = DOCUMENTS
        if rng.random() < 0.5:
            given["enable_thinking"] = rng.random() < 0.5
        found.append(TriedConversation("several conditions together", messages, given, rng.choice(days)))
    return found


def days(constants: Sequence[str]) -> list[datetime]:
    """Days to try: some years, all months, days of them and hours, and the neighbours of every date in a template."""
    found = [TODAY, *(datetime(y, 1 + y % 12, 1 + y % 28, y % 24, 7) for y in range(2018, 2046, 3))]
    found += [datetime(2027, 1 + (2 * n) % 12, n, (n + 7) % 24, (2 * n) % 60, n) for n in range(1, 29)]
    found += [datetime(2028, 1 + 2 * (n % 3), 29 + n % 3, 23 - n, 2 * n + 1) for n in range(6)]
    for text in constants:
        for year, month, day in re.findall(r"(?<!\d)(20\d\d)(?:-(\d\d?)(?:-(\d\d?))?)?", text)[:4]:
            try:
                near = datetime(int(year), int(month or 1), int(day or 1), 12)
            except ValueError:
                continue
            found += [near - timedelta(days=1), near, near + timedelta(days=1), near + timedelta(days=400)]
    return list(dict.fromkeys(found))[:80]


def constants(tree: nodes.Template) -> tuple[list[str], list[int]]:
    """Texts and numbers that stand in a template's expressions, shortest first."""
    values = [node.value for node in tree.find_all(nodes.Const)]
    texts = sorted({v for v in values if isinstance(v, str) and 0 < len(v) <= 200}, key=lambda v: (len(v), v))
    numbers = sorted({v for v in values if type(v) is int and 2 <= v <= 20_000})
    return texts, numbers
