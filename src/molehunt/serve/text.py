"""Decode tokens while they are generated, without half characters and without any part of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer. Text that could still become a stop string is withheld."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, special: bool = False) -> None:
        """`special` keeps the text of special tokens, which answers are shown without."""
        self._tokenizer = tokenizer
        self._skip_special = not special
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._settled = 0
        """Tokens whose text was given out; a few before them are decoded again, for some tokens' text depends on them."""
        self._context = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string came. The text ends before it."""

    def push(self, token: int) -> str:
        """Text that is certain now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._until_stop(self._fresh(final=False))

    def finish(self) -> str:
        """The rest of the text, at the end of the answer."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._fresh(final=True))
        held, self._held = self._held, ""
        return rest + ("" if self.stopped else held)

    def _fresh(self, *, final: bool) -> str:
        before = self._decoded(self._ids[self._context : self._settled])
        now = self._decoded(self._ids[self._context :])
        if not final and (now.endswith(UNFINISHED) or len(now) <= len(before)):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return now[len(before) :]

    def _until_stop(self, text: str) -> str:
        self._held += text
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            out, self._held = self._held[: min(ends)], ""
            return out
        longest = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - longest
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
