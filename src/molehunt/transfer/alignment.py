"""Which positions of two tokenisations have read the same text: those whose prefixes end at the same character."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from molehunt.errors import UsageError, printable


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """One text in two models' tokens."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    """Positions (source, target), ascending, whose prefixes are the same characters. Without special tokens and the
    first one, which attention uses as a sink."""

    @property
    def coverage(self) -> float:
        """Share of the target's tokens that have a partner."""
        return len(self.pairs) / len(self.target) if self.target else 0.0


def align(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, text: str) -> Aligned:
    """Tokenise `text` both ways and pair the positions that have seen the same characters.

    Exact for any two tokenizers: what is paired is where in the text a model stands, not the tokens themselves.

    Raises UsageError for a tokenizer that does not say which characters a token covers.
    """
    (source_ids, source_ends), (target_ids, target_ends) = _ends(source, text), _ends(target, text)
    at = {end: i for i, end in enumerate(target_ends) if end}  # of several tokens inside one character, the last
    last = {end: i for i, end in enumerate(source_ends) if end}
    pairs = tuple((i, at[end]) for end, i in last.items() if end in at and i and at[end])
    return Aligned(source=tuple(source_ids), target=tuple(target_ids), pairs=pairs)


def by_index(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, text: str) -> Aligned:
    """Token i with token i, as published: the baseline, misaligned from the first token that differs."""
    (source_ids, _), (target_ids, _) = _ends(source, text), _ends(target, text)
    n = min(len(source_ids), len(target_ids))
    return Aligned(source=tuple(source_ids), target=tuple(target_ids), pairs=tuple((i, i) for i in range(1, n)))


def _ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Sequence[int], list[int]]:
    """Token ids, and the character that each one's prefix ends at; 0 for special tokens, written out or not."""
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {printable(tokenizer.name_or_path)} does not say which characters a token covers, so it "
            "cannot be aligned with another.\nUse a folder with a tokenizer.json."
        )
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not tokenizer.chat_template)
    ids: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # pyright: ignore[reportAssignmentType]
    special = set(tokenizer.all_special_ids)
    return ids, [end if end > start and id not in special else 0 for id, (start, end) in zip(ids, offsets, strict=True)]
