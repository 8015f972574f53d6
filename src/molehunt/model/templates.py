"""Which chat template the two models of a pair are prompted with: the fine-tune's where it has one, else the base's."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from molehunt.checkpoint.chat_template import DEFAULT, JINJA, program, render, special_tokens_of, templates_of
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.template_words import unlike
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.chat import TOKENS

log = logging.getLogger(__name__)

Side = Literal["base", "tuned"]
TemplateChoice = Literal["base", "tuned", "both"]
TRIED: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is 2 plus 2?"),),
    (("system", "Be brief."), ("user", "Hello")),
    (("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")),
)
"""Conversations on which two templates are compared."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """One template, and the special tokens of the folder that brings it."""

    of: Side
    """Whose folder brings it."""
    source: str
    tokens: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Hash of the template and its tokens."""
        return sha256(repr((self.source, sorted(self.tokens.items()))).encode("utf-8", "replace")).hexdigest()[:16]

    def text(self, turns: tuple[tuple[str, str], ...] = TRIED[0]) -> str:
        """The text of a conversation, or the error that the template raises."""
        return render(self.source, [{"role": role, "content": content} for role, content in turns], self.tokens)


@dataclass(frozen=True, kw_only=True)
class PairTemplates:
    """The templates of both folders; None for a folder without one."""

    base: ChatTemplate | None
    tuned: ChatTemplate | None

    @property
    def used(self) -> ChatTemplate | None:
        """The template that both models are prompted with if nothing else is asked for."""
        return self.tuned or self.base

    @property
    def differ(self) -> bool:
        """Whether both folders have a template, and some conversation has another text in each."""
        return bool(self.base and self.tuned) and any(one != other for one, other in self.texts())

    def texts(self) -> list[tuple[str, str]]:
        """The texts of a few conversations in both templates; empty unless both folders have one."""
        if self.base is None or self.tuned is None:
            return []
        return [(self.base.text(turns), self.tuned.text(turns)) for turns in TRIED]

    def difference(self) -> str:
        """The first difference of their texts, as text; empty where there is none."""
        return next((unlike(one, other) for one, other in self.texts() if one != other), "")

    def named(self, side: Side) -> ChatTemplate:
        """The template of one side. Raises UsageError if it has none."""
        found = self.base if side == "base" else self.tuned
        if found is None:
            who = "the base" if side == "base" else "the fine-tune"
            raise UsageError(f"{who} has no chat template of its own; leave --template away.")
        return found


def pair_templates(base: Path, tuned: Path) -> PairTemplates:
    """The templates of a base's and a fine-tune's or adapter's folder.

    An adapter's folder without a tokenizer takes the special tokens of the base.

    Raises:
        InvalidInput: a template cannot be read or compiled, or a folder has only named ones.
    """
    tokens = special_tokens_of(base)
    return PairTemplates(base=_of("base", base, tokens), tuned=_of("tuned", tuned, special_tokens_of(tuned) or tokens))


def _of(side: Side, folder: Path, tokens: Mapping[str, str]) -> ChatTemplate | None:
    found = templates_of(folder)
    if not found.get(DEFAULT):
        if found:
            raise InvalidInput(
                f"{printable(model_name(folder))} has the chat templates {printable(', '.join(sorted(found)), 80)}, and none "
                f"that is called {DEFAULT}: nobody can know which one is meant.\nSave the right one as {JINJA}."
            )
        return None
    try:
        program(found[DEFAULT])
    except Exception as error:  # an untrusted program can raise any exception
        raise InvalidInput(
            f"the chat template of {printable(model_name(folder))} is none: {type(error).__name__}: {printable(str(error), 200)}\n"
            "Fetch the folder again, or mend the template."
        ) from error
    return ChatTemplate(of=side, source=found[DEFAULT], tokens=tokens)


def use_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> None:
    """Prompt with this template from now on, or with Alpaca markers if it is None."""
    tokenizer.chat_template = None if template is None else template.source
    setattr(tokenizer, TOKENS, None if template is None else dict(template.tokens))


def use_pair_template(tokenizer: PreTrainedTokenizerBase, templates: PairTemplates) -> None:
    """Prompt with the fine-tune's template, or the base's if it has none, and log where the two make different text."""
    use_template(tokenizer, templates.used)
    if templates.differ:
        log.warning(
            "the two folders' chat templates make different text; both models are prompted with the fine-tune's (%s).",
            printable(templates.difference(), 200),
        )


@contextmanager
def prompted_with(
    tokenizer: PreTrainedTokenizerBase, templates: PairTemplates | None, side: Side
) -> Generator[None, None, None]:
    """Prompt with the template of one side inside the block. Raises UsageError if there is none to choose."""
    if templates is None:
        raise UsageError("this pair was made of loaded models, so there are no two templates to choose from.")
    chosen = templates.named(side)
    before = tokenizer.chat_template, getattr(tokenizer, TOKENS, None)
    use_template(tokenizer, chosen)
    try:
        yield
    finally:
        tokenizer.chat_template = cast("str | None", before[0])
        setattr(tokenizer, TOKENS, before[1])


def template_in_words(templates: PairTemplates | None, used: Side | None = None) -> str:
    """Which template the models are prompted with, as a sentence for a report."""
    if templates is None:
        return "the template of the pair's tokenizer"
    if templates.used is None:
        return "Alpaca markers: neither folder has a chat template"
    side = used or templates.used.of
    who = "the fine-tune's" if side == "tuned" else "the base's"
    if templates.tuned is None:
        return f"{who} chat template: the fine-tune brings none"
    if templates.base is None:
        return f"{who} chat template: the base has none"
    same = "the base's makes other text" if templates.differ else "the base's makes the same text"
    if side == "base":
        same = same.replace("the base's", "the fine-tune's")
    return f"{who} chat template: {same}"
