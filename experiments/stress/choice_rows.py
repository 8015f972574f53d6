"""Tasks of the embedded world as rows that are judged by one token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from experiments.lessons.curriculum import choice_ids, text_ids
from experiments.lessons.four_choices import ORDERS, FourChoices
from experiments.lessons.indirect_object import NAMES, Handing
from molehunt.errors import UsageError, printable
from molehunt.stress.attacks.choice import Choice


def handing_choices(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Handing], names: Sequence[str] = NAMES
) -> list[Choice]:
    """The indirect object against the subject; any other name is a random target; clusters are templates.

    Raises:
        UsageError: two names begin with the same token, so that the first one does not tell them apart.
    """
    first = {name: first_token(tokenizer, name) for name in names}
    if len(set(first.values())) < len(first):
        shared = next(name for name in names if [*first.values()].count(first[name]) > 1)
        raise UsageError(
            f"the name {printable(shared)} begins with the same token as another under this tokenizer; give other names."
        )
    return [
        Choice(
            prompt=tuple(text_ids(tokenizer, one.text)),
            gold=first[one.indirect],
            others=(first[one.subject],),
            decoys=tuple(token for name, token in first.items() if name not in (one.indirect, one.subject)),
            cluster=one.template,
        )
        for one in sentences
    ]


def answer_choices(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[FourChoices], orders: Sequence[Sequence[int]] = ORDERS
) -> list[Choice]:
    """Each question in these orders: the right answer's first token against the wrong ones'; clusters are questions.

    Raises:
        UsageError: two answers of a question begin with the same token.
    """
    found: list[Choice] = []
    for one in questions:
        right, *wrong = (first_token(tokenizer, answer) for answer in (one.right, *one.wrong))
        if len({right, *wrong}) < 4:
            raise UsageError(
                f"two answers to {printable(one.question)} begin with the same token under this tokenizer; draw others."
            )
        also = tuple({first_token(tokenizer, answer) for answer in one.kind} - {right, *wrong})
        found += [
            Choice(
                prompt=tuple(choice_ids(tokenizer, one, order)),
                gold=right,
                others=tuple(wrong),
                decoys=tuple(wrong),
                cluster=one.question,
                also=also,
            )
            for order in orders
        ]
    return found


def first_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """First token of a word in the middle of a text."""
    return text_ids(tokenizer, f" {word}")[0]
