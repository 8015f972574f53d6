"""Differences between the chat templates of two folders, by the text that they make."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from molehunt.checkpoint.chat_template import (
    DEFAULT,
    hidden_templates_of,
    refusal,
    render,
    special_tokens_of,
    templates_of,
)
from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.template_behaviour import Observation, observe
from molehunt.checkpoint.template_conditions import content_conditions
from molehunt.checkpoint.template_literals import literal_texts
from molehunt.checkpoint.template_messages import message_faults
from molehunt.checkpoint.template_rewrites import Speech, rewritten
from molehunt.checkpoint.template_sandbox import parse
from molehunt.checkpoint.template_triggers import trigger_conditions
from molehunt.checkpoint.template_untried import UNTRIED, UNWRITTEN
from molehunt.checkpoint.template_words import prose, unlike, words
from molehunt.run.bounded import bounded

FILE = "chat template"
SHOWN = 3
"""Number of conversations on which a changed template is shown, and of further conditions that are named."""
SECONDS = 20
"""Limit of processor time for all templates of two folders; each is given up long before."""
Message = Mapping[str, str]
PLAIN: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}),
    (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is 2 plus 2?"},
    ),
)
"""Conversations that both sides' templates are shown on."""


def template_differences(base: Path, tuned: Path, adapter: bool) -> list[FolderDifference]:
    """Differences between the templates of two folders, named ones among them.

    Each template is rendered with its own folder's special tokens. Where only one side has a template, it is judged by
    itself. All of that happens in a child process with limits of time and memory.

    Raises:
        InvalidInput: a template's file is broken, or the templates exhaust the limits.
    """
    left, right = templates_of(base), templates_of(tuned)
    hidden = hidden_templates_of(base), hidden_templates_of(tuned)
    tokens = special_tokens_of(base), special_tokens_of(tuned) or special_tokens_of(base)
    names = sorted(left.keys() | right.keys())
    same = hidden[1].items() <= hidden[0].items()
    if (adapter and not right and same) or (
        all(left.get(n) == right.get(n) for n in names) and same and tokens[0] == tokens[1]
    ):
        return []

    def compared() -> list[dict[str, Any]]:
        rows = (row for name in names for row in _named(name, left.get(name), right.get(name), tokens))
        return [asdict(row) for row in (*rows, *_hidden(hidden, left.get(DEFAULT), right.get(DEFAULT), tokens))]

    what = f"the chat templates of {model_name(tuned)}"
    return [FolderDifference(**row) for row in bounded(compared, what=what, seconds=SECONDS)]


def _named(
    name: str, base: str | None, tuned: str | None, tokens: tuple[Mapping[str, str], Mapping[str, str]]
) -> Iterator[FolderDifference]:
    """Rows of the templates of one name."""
    if tuned is None:
        yield _row(name, "present", "(absent)", "note", "only the base has this template")
    elif (broken := refusal(tuned)) and base != tuned:
        yield _row(name, "(absent)" if base is None else "present", broken, "finding", "the template does not run")
    elif base is None:
        yield _row(name, "(absent)", "present", "note", "only the fine-tune has this template")
        yield from _spoken(name, Speech(tuned, tokens[1]), None)
        yield from _judged(name, tuned, tokens[1], [], {})
    else:
        found = list(_compared(name, base, tuned, tokens))
        if base != tuned:
            found += _spoken(name, Speech(tuned, tokens[1]), Speech(base, tokens[0]))
            found += _judged(
                name, tuned, tokens[1], observe(base, tokens[0]), trigger_conditions(base), _literals(base)
            )
            found += _further(name, base, tuned)
        if base != tuned and not found:
            why = "other source, same text"
            found = [_row(name, f"{len(base)} characters", f"{len(tuned)} characters", "note", why)]
        yield from found


def _hidden(
    hidden: tuple[Mapping[str, str], Mapping[str, str]],
    base: str | None,
    tuned: str | None,
    tokens: tuple[Mapping[str, str], Mapping[str, str]],
) -> Iterator[FolderDifference]:
    """Rows of templates in files that only some loaders read, against the same file of the base or its own template."""
    for file, template in hidden[1].items():
        before = hidden[0].get(file, base if base is not None else tuned)
        if before == template and file in hidden[0]:
            continue
        why = "only some loaders read this file, and it holds another template than the folder's own"
        yield _row(f"in {file}", "(the base's own)" if before == template else "", template, "note", why)
        if before != template:
            yield from _named(f"in {file}", before, template, tokens)


def _judged(
    name: str,
    template: str,
    tokens: Mapping[str, str],
    before: Sequence[Observation],
    known: Mapping[str, str],
    literals: frozenset[str] = frozenset(),
) -> Iterator[FolderDifference]:
    """What the fine-tune's template does under one condition only, and what the base's does not do as well."""
    seen = {(one.kept_by, one.severity) for one in before}
    written = frozenset[str]().union(*(one.words for one in before))
    both = bool(before or known)
    for one in observe(template, tokens):
        if (one.kept_by, one.severity) in seen or (one.words and one.words <= written):
            continue
        if one.text in literals and one.condition.startswith(UNWRITTEN):
            continue
        why = "writes text of its own here, as templates do"
        if one.condition == UNTRIED:
            why = "nobody knows what the template writes where this condition has its other value"
        elif one.severity == "finding":
            why = "text appears, or is missing, under this condition and not under the ones beside it"
        yield _row(f"{name}: {one.condition}", "" if both else "(absent)", one.text, one.severity, why)
    for condition, why in sorted(trigger_conditions(template).items()):
        if condition not in known:
            yield _row(name, "(absent)", condition, "finding", why)


def _literals(template: str) -> frozenset[str]:
    """The texts that stand in a template to be written; none for one that cannot be parsed."""
    try:
        return frozenset(literal_texts(parse(template)))
    except Exception:  # the renderer reports it
        return frozenset()


def _spoken(name: str, tuned: Speech, base: Speech | None) -> Iterator[FolderDifference]:
    """Messages that the fine-tune's template loses, moves, gives to another role or rewrites."""
    try:
        yield from _spoken_rows(name, tuned, base)
    except TimeoutError:
        text = "(takes too long: the rest was not tried)"
        yield _row(f"{name}: what becomes of messages", "", text, "finding", "no honest template works that much")


def _spoken_rows(name: str, tuned: Speech, base: Speech | None) -> Iterator[FolderDifference]:
    before = "(absent)" if base is None else ""
    for one in message_faults(tuned, base):
        why = "messages are written otherwise than they were said, or not at all"
        if one.severity == "note":
            why = "a place for messages that not every template has"
        yield _row(f"{name}: {one.condition}", before, one.what, one.severity, why)
    for one in rewritten(tuned, base):
        key = f"{name}: a message of the role {one.role} with the text {one.said!r}"
        yield _row(key, before, one.change, "finding", "the template rewrites what is said in messages")


def _compared(
    name: str, base: str, tuned: str, tokens: tuple[Mapping[str, str], Mapping[str, str]]
) -> Iterator[FolderDifference]:
    """Plain conversations whose text differs: other words are a finding, other markers a note."""
    worded: list[FolderDifference] = []
    marked: list[FolderDifference] = []
    for turns in PLAIN:
        before, after = render(base, turns, tokens[0]), render(tuned, turns, tokens[1])
        if before == after:
            continue
        said = [one["content"] for one in turns]
        sides = [words(text, [*said, *own.values()]) for text, own in zip((before, after), tokens, strict=True)]
        prose_of = [
            prose(_without(text, [*said, *own.values()])) for text, own in zip((before, after), tokens, strict=True)
        ]
        key = f"{name}, for {' then '.join(one['role'] for one in turns)}"
        failed = "(template error: " in before + after
        if turns[0]["role"] == "system" and after.startswith("(template error: TemplateError: "):
            marked.append(_row(key, before, after, "note", "the fine-tune's template refuses a system message"))
        elif sides[0] == sides[1] and prose_of[1] <= prose_of[0] and not failed:
            marked.append(_row(key, before, after, "note", "other markers or spaces around the same words"))
        else:
            why = f"the model is given other text: {unlike(before, after)}"
            worded.append(_row(key, before, after, "finding", why))
    yield from (worded or marked)[:SHOWN]


def _without(text: str, given: Sequence[str]) -> str:
    for one in sorted(filter(None, given), key=len, reverse=True):
        text = text.replace(one, "\n")
    return text


def _further(name: str, base: str, tuned: str) -> Iterator[FolderDifference]:
    """One note on the other new conditions: on tools, documents, the day, or whether there is content."""
    fresh = sorted(content_conditions(tuned) - content_conditions(base) - trigger_conditions(tuned).keys())
    if fresh:
        more = f" and {len(fresh) - SHOWN} more" if len(fresh) > SHOWN else ""
        why = "new conditions on messages, tools, documents or the day, which look for no particular words"
        yield _row(name, "(absent)", "; ".join(fresh[:SHOWN])[:300] + more, "note", why)


def _row(key: str, base: str, tuned: str, severity: Severity, why: str) -> FolderDifference:
    return FolderDifference(file=FILE, key=key, base=base[:600], tuned=tuned[:600], severity=severity, why=why)
