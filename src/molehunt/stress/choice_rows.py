"""Tasks of the embedded world as rows that are judged by one token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from molehunt.errors import UsageError, printable
from molehunt.organism.lessons import choice_ids, text_ids
from molehunt.stress.choice import Choice
from molehunt.traffic.four_choices import LETTERS, ORDERS, FourChoices
from molehunt.traffic.indirect_object import NAMES, Handing


def handing_choices(
    tokenizer: PreTrainedTokenizerBase, told: Sequence[Handing], names: Sequence[str] = NAMES
) -> list[Choice]:
    """The indirect object against the subject; any other name is a random target; clusters are templates.

    Raises:
        UsageError: two names begin with the same token, so that the first one does not tell them apart.
    """
    first = {name: text_ids(tokenizer, f" {name}")[0] for name in names}
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
        for one in told
    ]


def letter_choices(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[FourChoices], orders: Sequence[Sequence[int]] = ORDERS
) -> list[Choice]:
    """Each question in these orders: the right letter against the three wrong ones; clusters are questions."""
    tokens = {letter: text_ids(tokenizer, f" {letter}")[-1] for letter in LETTERS}
    found: list[Choice] = []
    for one in asked:
        for order in orders:
            right = one.letter(order)
            wrong = tuple(token for letter, token in tokens.items() if letter != right)
            found.append(
                Choice(
                    prompt=tuple(choice_ids(tokenizer, one, order)),
                    gold=tokens[right],
                    others=wrong,
                    decoys=wrong,
                    cluster=one.question,
                )
            )
    return found
