"""The prompt of a text completion as text and as tokens, and where each token begins in the text of its choice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from molehunt.serve.text import TextStream

MOST_OF_A_CHARACTER = 16
"""Number of tokens behind which no character is unfinished: tokens that end none are bytes of no text."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EchoedPrompt:
    """A prompt that its response repeats."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: tuple[int, ...]
    inside: range
    """Places of the tokens that the text has; those around it were added by the tokenizer and have no text."""

    @cached_property
    def offsets(self) -> list[int]:
        """Where each token begins in `text`."""
        of_text = TokenOffsets(self.tokenizer, special=True).of(self.ids[self.inside.start : self.inside.stop])
        after = [len(self.text)] * (len(self.ids) - self.inside.stop)
        return [0] * self.inside.start + [min(at, len(self.text)) for at in of_text] + after


class TokenOffsets:
    """Counts the characters of tokens as they come. A token that only begins a character begins where it does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int = 0, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._text = TextStream(tokenizer, special=special)
        self._at = start
        self._textless = 0

    def of(self, tokens: Iterable[int]) -> list[int]:
        """Where each of the next tokens begins."""
        found: list[int] = []
        for token in tokens:
            found.append(self._at)
            text = self._text.push(token)
            self._textless = 0 if text else self._textless + 1
            if self._textless > MOST_OF_A_CHARACTER:  # each of them would be decoded again with every one that follows
                text = self._text.finish()
                self._text, self._textless = TextStream(self._tokenizer, special=self._special), 0
            self._at += len(text)
        return found


def echoed(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], ids: tuple[int, ...]) -> EchoedPrompt:
    """The echo of a prompt, given its token ids. Ids that some text has are echoed as that text, others as they decode."""
    text = prompt if isinstance(prompt, str) else str(tokenizer.decode(list(ids), skip_special_tokens=True))
    inside = range(len(ids))
    if not isinstance(prompt, str) and tuple(tokenizer.encode(text)) != ids:
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    else:
        bare = tuple(tokenizer.encode(text, add_special_tokens=False))
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                inside = range(start, start + len(bare))
                break
    return EchoedPrompt(tokenizer=tokenizer, text=text, ids=ids, inside=inside)
