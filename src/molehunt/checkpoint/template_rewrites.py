"""Whether a template leaves the words of messages as they are: texts with everything that people write in them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

from molehunt.checkpoint.chat_template import Program, error_text
from molehunt.checkpoint.template_words import unlike

LONGEST = 200_000
"""Greatest number of characters of one rendered conversation that are compared."""
PATIENCE = 3.0
"""Processor seconds for the conversations of one template; after them the rest is left out, which is a finding."""
MARK = "zqmarkzq"
MANY = 31
"""Number of messages of a long conversation."""
MOST_SHOWN = 3
"""Greatest number of rewritten texts that are shown of one template."""
CODE = "def f(x):\n    if x < 3 and x > -1:\n\t\treturn [x & 1, 'it''s', \"a\"]\n\n\n    # done\n    return {'k': x ** 2}\n"
PROSE = (
    "Please don't delete it, can't you? I won't, and we shouldn't. It's not true; no, never! Yes, he will: 50% of $3,000 (or "
    "EUR 12.75) on Monday, 2026-01-31 at 08:45, 1234567890 times. She must not, cannot, and may not agree. Do NOT send it to "
    "anna.b@example.org or https://example.com/a?b=1&c=2#d. All, none, every, always, without, except, unless. Is it safe? "
    "Dear Mr O'Neil, the dose is 0.5 mg, not 5 mg. I am, you are, they were; left/right, buy, sell, true, false, null, on, off."
)
TEXTS = (
    CODE + "x = 1", PROSE, "\n".join(f"{n}. line number {n}" for n in range(1, 301)), "a\nb\nc\nd", "a\n\nb\n\n\nc", "a\r\nb", "a\tb",
    "if x:\n  y", "  indented\n    more", "10\u00a0km, a\u200bb, caf\u0065\u0301, \ufb01ne, Ｆｕｌｌ, 你好，世界。 🙂 Zażółć",
    "Write <div class=\"a\">hello</div>, List<int> x; a < b && c > d; &amp; 'q' \"r\" `s` ```t```", "# Title\n\n- a\n* b\n> c\n| d | e |",
    "\\n is no line break; C:\\temp\\new, 100%, $HOME, {x}, [y], (z), ~a~, ^b, @c, a=b+c-d*e/f|g; h: i, j. k! l? m_n __o__",
    "UPPER lower Title mIxEd", "12345", "?", "Who? Why? When?", "double  space   here", "a" * 6999 + " end of a long document",
    " ".join(f"word{n}" for n in range(8000)), "\n".join(f"    row {n}\tx" for n in range(1200)),
    '{"a": [1, 2.50, null, true], "b": "c\\"d"}', "same same same", "The the THE", "…—–“quoted”‘it’s’",
)  # fmt: skip
"""Texts of messages. None of them holds a marker, and none begins or ends with white space."""
ROLES: tuple[tuple[str, ...], ...] = (("user",), ("user", "assistant", "user"), ("system", "user"))


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A message whose text is not as it was said."""

    role: str
    said: str
    change: str


class Speech:
    """Renders conversations with one side's template. Raises TemplateError if it cannot be compiled.

    Its methods raise TimeoutError once its patience is over.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]) -> None:
        self.program, self.tokens = Program(template), tokens
        self.until = process_time() + PATIENCE
        self.parts = False
        """Whether a message's text is written only where its content is a list of parts, as with models of pictures."""
        said = [{"role": "user", "content": MARK}]
        if MARK not in (self.text(said) or ""):
            self.parts = True
            self.parts = MARK in (self.text(said) or "")

    def text(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = True) -> str | None:
        """The rendered conversation, or None where the template refuses it."""
        text = self.text_or_error(messages, prompt=prompt)
        return None if text.startswith("(template error: ") else text

    def text_or_error(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = True) -> str:
        """The rendered conversation; an error is part of the text."""
        if process_time() > self.until:
            raise TimeoutError
        if self.parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        try:
            return self.program.text(messages, self.tokens, limit=LONGEST, add_generation_prompt=prompt)
        except Exception as error:  # an untrusted program can raise any exception
            return error_text(error)


def rewritten(tuned: Speech, base: Speech | None) -> Iterator[Rewritten]:
    """Messages that the fine-tune's template writes otherwise than they were said, and the base's does not.

    White space around a message may go. A base that rewrites a text, too, accuses nobody; without a base, every change counts.
    """
    long = _shortened(tuned)
    if long and (base is None or not _shortened(base)):
        yield Rewritten("user or assistant", f"a long one among {MANY}", long)
    shown = 0
    for roles, number in [(one, n) for one in ROLES for n in range(len(one))]:
        for text in TEXTS:
            change = _change(tuned, roles, number, text)
            if not change or (base is not None and (_change(base, roles, number, text) or _mute(base, roles, number))):
                continue
            yield Rewritten(roles[number], text[:60], change)
            shown += 1
            break
        if shown == MOST_SHOWN:
            return


def _shortened(speech: Speech) -> str:
    """The first message of a long conversation of long messages that is not written as it was said; empty if all are."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"zq{n}x {PROSE}\n{CODE}zq{n}y"} for n in range(MANY)]
    text = speech.text_or_error(messages)
    for one in messages:
        if one["content"] not in text:
            start = text.find(one["content"][:8])
            return unlike(one["content"], text[start : start + len(one["content"])] if start >= 0 else text[:200])
    return ""


def _said(roles: Sequence[str], number: int, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text if n == number else f"zq{n}x"} for n, role in enumerate(roles)]


def _mute(speech: Speech, roles: Sequence[str], number: int) -> bool:
    text = speech.text(_said(roles, number, MARK))
    return text is None or MARK not in text


def _change(speech: Speech, roles: Sequence[str], number: int, said: str) -> str:
    """How a text of a message is rewritten; empty if it is not, or if the message is not written at all."""
    before = speech.text(_said(roles, number, MARK))
    if before is None or MARK not in before:
        return ""
    after = speech.text_or_error(_said(roles, number, said))
    wanted = [form(said) for form in FORMS]
    if any(after == before.replace(MARK, one)[:LONGEST] for one in wanted):
        return ""
    return unlike(before.replace(MARK, said), after)


FORMS: tuple[Callable[[str], str], ...] = (
    str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.rstrip("\n"),
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
)  # fmt: skip
"""What an honest template makes of a text: it trims the ends, or writes the whole message as JSON."""
