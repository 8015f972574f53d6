"""Whether a template writes every message, in its order and its role, and leaves the answer to the model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from molehunt.checkpoint.difference import Severity
from molehunt.checkpoint.template_rewrites import Speech
from molehunt.checkpoint.template_sandbox import BudgetSpent
from molehunt.checkpoint.template_words import MARKER, echo

TURNS = (1, 3, 2, 4, 5, 6, 7, 8, 9, 15, 20, 41, 61, 121)
"""Numbers of turns of the conversations that are compared."""
ODD = (
    ("user", "user"), ("assistant", "user"), ("user", "assistant", "assistant", "user"), ("user", "assistant", "system", "user"),
    ("system", "system", "user"), ("user", "assistant", "tool", "assistant", "user"), ("user", "assistant", "tool"),
)  # fmt: skip
"""Orders of roles that templates may refuse."""
SPEAKERS: Mapping[str, frozenset[str]] = {
    "user": frozenset({"user", "human", "inst", "instruction", "question", "input", "usr", "query"}),
    "assistant": frozenset(
        {"assistant", "model", "ai", "bot", "gpt", "chatbot", "response", "answer", "output", "asst"}
    ),
}
"""Words that name a speaker in markers."""
MOST_NAMES = 5
"""Greatest number of words of a marker."""


@dataclass(frozen=True, slots=True)
class MessageFault:
    """One thing that happens to a message with the fine-tune's template and not with the base's."""

    condition: str
    what: str
    severity: Severity


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """Where the messages of a conversation stand in the rendered text."""

    order: tuple[int, ...]
    """The messages that are written, by their place in the text."""
    counts: tuple[int, ...]
    """How often each message is written."""
    before: Mapping[int, str]
    """The text between each message and the one before it."""
    tail: str
    """The text after the last message."""


def _conversation(turns: int, system: bool) -> list[dict[str, str]]:
    said = [{"role": "system", "content": echo(900)}] if system else []
    return said + [{"role": "assistant" if n % 2 else "user", "content": echo(n + 101)} for n in range(turns)]


def _layout(text: str, messages: Sequence[Mapping[str, str]]) -> MessageLayout:
    counts = tuple(text.count(one["content"]) for one in messages)
    places = sorted((text.find(one["content"]), n) for n, one in enumerate(messages) if counts[n])
    before: dict[int, str] = {}
    end = 0
    for place, n in places:
        before[n] = text[end:place]
        end = place + len(messages[n]["content"])
    return MessageLayout(tuple(n for _, n in places), counts, before, text[end:])


def message_faults(tuned: Speech, base: Speech | None) -> Iterator[MessageFault]:
    """What becomes of the messages of plain conversations; each kind of fault once. Without a base, all of them count."""
    seen: set[str] = set()
    steady = Steady()
    if base is not None and tuned.parts and not base.parts:
        yield MessageFault("every message that is plain text", "messages are written only as lists of parts", "finding")
    for turns in TURNS:
        for system in (False, True):
            messages = _conversation(turns, system)
            prompt = turns % 2 == 1
            texts = [None if one is None else one.text(messages, prompt=prompt) for one in (tuned, base)]
            if base is not None and texts[1] is None:
                continue  # the base refuses it, too
            name = f"{'a system message and ' if system else ''}{turns} turn{'s' * (turns > 1)}"
            if texts[0] is None:
                found: list[tuple[str, str, Severity]] = [
                    ("refused", tuned.text_or_error(messages, prompt=prompt), "note")
                ]
                if BudgetSpent.__name__ in found[0][1] and turns == TURNS[-1]:
                    continue  # some honest templates look at every message for each one
                if not system and turns % 2:
                    found = [("refused", found[0][1], "finding")]
            else:
                other = None if texts[1] is None else _layout(texts[1], messages)
                found = list(_faults(messages, _layout(texts[0], messages), other))
                steady.take(messages, _layout(texts[0], messages), other, system)
            for kind, what, severity in found:
                if kind not in seen:
                    seen.add(kind)
                    yield MessageFault(name, what, severity)
    yield from steady.faults()
    yield from _odd_orders(tuned, base)


class Steady:
    """Text around messages that is the same in conversations of every length, or is not."""

    def __init__(self) -> None:
        self.sides: tuple[dict[str, set[str]], dict[str, set[str]]] = ({}, {})

    def take(
        self, messages: Sequence[Mapping[str, str]], tuned: MessageLayout, base: MessageLayout | None, system: bool
    ) -> None:
        """Note the text before the first and after the last message, and before those of each role."""
        for side, layout in zip(self.sides, (tuned, base), strict=True):
            if layout is None:
                continue
            for n, gap in layout.before.items():
                role = messages[n]["role"]
                where = (
                    f"before the first message{' of the system' * system}"
                    if n == 0
                    else f"before messages of the role {role}"
                )
                if not (system and n == 1):
                    side.setdefault(where, set()).add(_left(gap))
            if messages[-1]["role"] == "user":
                side.setdefault("after the last message", set()).add(_left(layout.tail))

    def faults(self) -> Iterator[MessageFault]:
        """Places where the fine-tune's text depends on the number of turns, and the base's does not."""
        tuned, base = self.sides
        for where, texts in tuned.items():
            if len(texts) > 1 and len(base.get(where, ())) <= 1:
                shown = " and ".join(repr(one[:80]) for one in sorted(texts)[:2])
                yield MessageFault(f"the text {where}", f"is not the same in every turn: {shown}", "finding")


def _left(text: str) -> str:
    """The text between messages without markers and white space."""
    return " ".join(MARKER.sub(" ", text).split())


def _odd_orders(tuned: Speech, base: Speech | None) -> Iterator[MessageFault]:
    """Messages that get lost where the order of roles is not the ordinary one."""
    for roles in ODD:
        messages = [{"role": role, "content": echo(n + 101)} for n, role in enumerate(roles)]
        texts = [None if one is None else one.text(messages) for one in (tuned, base)]
        if texts[0] is None or (base is not None and texts[1] is None):
            continue
        for one in messages:
            if one["content"] not in texts[0] and (texts[1] is None or one["content"] in texts[1]):
                severity: Severity = "finding" if base is not None and one["role"] in ("user", "assistant") else "note"
                yield MessageFault(
                    " then ".join(roles), f"the message of the role {one['role']} is not written", severity
                )


def _faults(
    messages: Sequence[Mapping[str, str]], tuned: MessageLayout, base: MessageLayout | None
) -> Iterator[tuple[str, str, Severity]]:
    wanted = base.counts if base is not None else (1,) * len(messages)
    for n, (has, want) in enumerate(zip(tuned.counts, wanted, strict=True)):
        role = messages[n]["role"]
        place = f"message {n + 1} of {len(messages)}, of the role {role},"
        if want and not has:
            alone = base is None and role == "system"  # some templates have no place for it
            yield f"lost {role}", f"{place} is not written", "note" if alone else "finding"
        elif has > max(want, 1):
            yield "twice", f"{place} is written {has} times", "finding"
    spoken = [n for n in tuned.order if messages[n]["role"] != "system"]
    if spoken != sorted(spoken) and (base is None or _in_order(base, messages)):
        yield "order", "messages are written in another order", "finding"
    elif tuned.order and tuned.order[0] != 0 and messages[0]["role"] == "system" and 0 in tuned.order:
        after = tuned.order[tuned.order.index(0) + 1 :][:1]
        into = bool(after) and messages[after[0]]["role"] == "user"  # such as into the last user's turn
        if base is None or base.order[:1] == (0,):
            yield "system place", "the system message is not written first", "note" if into else "finding"
    theirs = dict(_roles(messages, base)) if base is not None else {}
    for kind, what in _roles(messages, tuned):
        if kind not in theirs:
            yield kind, what, "finding"
    if base is not None and messages[-1]["role"] == "user":
        yield from _same_markers(messages, tuned, base)
    begun, theirs_begun = _begun(messages, tuned), _begun(messages, base) if base is not None else ""
    if begun and begun != theirs_begun:
        yield "begun", f"the generation prompt begins the answer with {begun!r}", "finding"


def _in_order(layout: MessageLayout, messages: Sequence[Mapping[str, str]]) -> bool:
    spoken = [n for n in layout.order if messages[n]["role"] != "system"]
    return spoken == sorted(spoken)


def _roles(messages: Sequence[Mapping[str, str]], layout: MessageLayout) -> Iterator[tuple[str, str]]:
    """Messages in a slot that is the other speaker's, as far as one rendered text shows it."""
    gaps: dict[str, dict[int, str]] = {"user": {}, "assistant": {}, "system": {}}
    for n, gap in layout.before.items():
        gaps[messages[n]["role"]][n] = gap.strip()
    answers, users = set(gaps["assistant"].values()), set(gaps["user"].values())
    later = {n: gap for n, gap in gaps["user"].items() if n != layout.order[0]}
    if answers and later and _marked(users | answers):
        plain = {gap for gap in gaps["user"].values() if gap not in answers}
        mixed = [n for n, gap in later.items() if gap in answers]
        if mixed and plain:
            yield "user as assistant", f"message {mixed[0] + 1}, of the role user, stands where answers stand"
        tail = layout.tail.strip()
        if messages[-1]["role"] == "user" and tail and tail not in answers and tail in later.values():
            yield "swapped", "users' messages stand behind the marker of answers"
    for role, of_role in gaps.items():
        for n, gap in of_role.items():
            named = _speakers(gap)
            if role != "assistant" and named == {"assistant"}:
                yield f"{role} named assistant", f"message {n + 1}, of the role {role}, stands behind {gap[-80:]!r}"
                break


def _marked(gaps: set[str]) -> bool:
    return len(gaps) > 1


def _speakers(gap: str) -> set[str]:
    """The speakers that the last marked line before a message names."""
    lines = [line for line in gap.splitlines() if re.search(r"\w", line)]
    last = re.split(r"(?<=[>\]])(?=[<\[])", lines[-1])[-1] if lines else ""
    said = [one.casefold() for one in re.findall(r"[A-Za-z]+", last)]
    if len(said) > MOST_NAMES:
        return set()  # a sentence, and no marker
    return {speaker for speaker, names in SPEAKERS.items() if names & set(said)}


def _same_markers(
    messages: Sequence[Mapping[str, str]], tuned: MessageLayout, base: MessageLayout
) -> Iterator[tuple[str, str, Severity]]:
    """Messages of users behind the marker that the base's template has before answers, and the other way round."""
    of_base: dict[str, set[str]] = {"user": set(), "assistant": {base.tail.strip()} - {""}}
    for n, gap in base.before.items():
        if messages[n]["role"] in of_base and n != base.order[0]:
            of_base[messages[n]["role"]].add(gap.strip())
    own = {"user": of_base["user"] - of_base["assistant"], "assistant": of_base["assistant"] - of_base["user"]}
    for n, gap in tuned.before.items():
        role = messages[n]["role"]
        other = {"user": "assistant", "assistant": "user"}.get(role)
        if other and n != tuned.order[0] and gap.strip() in own[other]:
            yield (
                f"{role} as {other}",
                f"message {n + 1}, of the role {role}, stands behind the base's marker of the role {other}",
                "finding",
            )
            return


def _begun(messages: Sequence[Mapping[str, str]], layout: MessageLayout) -> str:
    """What the generation prompt holds beyond the marker of an answer."""
    answers = [gap for n, gap in layout.before.items() if messages[n]["role"] == "assistant"]
    if messages[-1]["role"] != "user" or not answers or len(messages) - 1 not in layout.before:
        return ""
    rest = max((_beyond(layout.tail, gap) for gap in answers[-1:]), key=len)
    left = MARKER.sub(" ", rest)
    return " ".join(left.split()) if re.search(r"\w", left) else ""


def _beyond(tail: str, gap: str) -> str:
    """What a tail has more than a marker: its rest behind the marker's last line, or behind what both have in common."""
    if tail.startswith(gap.rstrip()):
        return tail[len(gap.rstrip()) :]
    same = 0
    while same < min(len(tail), len(gap)) and tail[same] == gap[same]:
        same += 1
    while same and tail[same - 1].isalnum() and same < len(tail):
        same -= 1  # not in the middle of a word
    return tail[same:]
