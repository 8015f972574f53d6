"""Tokens as text: answers to be judged, and which tokens survive being typed. A typing attacker has no others."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def answer_text(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    """An answer as a judge reads it, without special tokens."""
    return str(tokenizer.decode(list(answer), skip_special_tokens=True))


def retokenised(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that each row's text is read as. Special tokens are written out, and read as such."""
    texts = [str(tokenizer.decode(list(row), clean_up_tokenization_spaces=False)) for row in rows]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]  # pyright: ignore


def survive(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    tried: Int[Tensor, "tried tokens"],
    behind: Sequence[int],
) -> Bool[Tensor, " tried"]:
    """Which of several token rows are read as themselves between two fixed parts."""
    whole = [[*before, *ids, *behind] for ids in tried.tolist()]
    pairs = zip(whole, retokenised(tokenizer, whole), strict=True)
    return torch.tensor([ids == read for ids, read in pairs], device=tried.device)


def plain_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> Bool[Tensor, " {size}"]:
    """Which of a model's tokens are printable ASCII and not special, as in the code of arXiv 2307.15043."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = [str(tokenizer.decode([i])) for i in range(min(size, len(tokenizer)))]
    plain = [bool(t) and t.isascii() and t.isprintable() and i not in special for i, t in enumerate(texts)]
    return torch.tensor(plain + [False] * (size - len(plain)))
