"""Sentences that end where the name of one of two people must follow: the one that was said once, not twice.

The task of Wang et al., arXiv 2211.00593. Templates, names, places and things are this project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from molehunt.errors import UsageError
from molehunt.traffic.wording import OBJECTS, PEOPLE

Order = Literal["BABA", "ABBA"]
ORDERS: tuple[Order, ...] = get_args(Order)
"""Who comes first where both are named: the one that is named again, or the other."""
DRAWS = 200
"""For each sentence that is wanted, before the pairs count as exhausted."""
NAMES: tuple[str, ...] = tuple(person[0].split()[0] for person in PEOPLE)
PLACES = ("garden", "river", "island", "door", "table", "kitchen", "market", "school")
TEMPLATES = (
    "In the morning {both} walked to the {place}. {subject} handed a {thing} to",
    "Before supper {both} met near the {place}, and {subject} passed a {thing} to",
    "Late that day {both} sat by the {place}. {subject} sold a {thing} to",
    "When {both} came home from the {place}, {subject} showed a {thing} to",
    "While {both} waited at the {place}, {subject} threw a {thing} to",
    "After {both} left the {place}, {subject} sent a {thing} to",
    "Last winter {both} worked in the {place}. {subject} lent a {thing} to",
    "Once {both} shared a room near the {place}, so {subject} gave a {thing} to",
    "As {both} crossed the {place}, {subject} carried a {thing} over to",
    "The neighbours {both} cleaned the {place}. Then {subject} brought a {thing} to",
    "At noon {both} opened the {place}. Soon {subject} offered a {thing} to",
    "Because {both} liked the {place}, {subject} made a {thing} there and gave it to",
    "The {place} had a {thing} that {both} wanted. {subject} bought it and took it to",
    "On Sunday {both} argued about the {place}. In the end {subject} said sorry to",
    "Two friends, {both}, found a {thing} behind the {place}, and {subject} gave it to",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Handing:
    """One sentence without its last word."""

    text: str
    indirect: str
    """The name that follows."""
    subject: str
    """The name that is said twice, and must not follow."""
    template: int
    order: Order


def name_pairs(names: Sequence[str] = NAMES) -> list[tuple[str, str]]:
    """Every two names, once; split these, so that no pair of a test was seen before."""
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def handings(pairs: Sequence[tuple[str, str]], each: int, *, seed: int) -> list[Handing]:
    """Distinct sentences, `each` of every template in both orders, template by template.

    Args:
        pairs: of names; either may be the one that is handed something.
        each: sentences of one template in one order.
        seed: of the draw.

    Raises:
        UsageError: the pairs make not so many.
    """
    rng, found = Random(f"indirect object/{seed}"), list[Handing]()
    for template in range(len(TEMPLATES)):
        for order in ORDERS:
            own: dict[str, Handing] = {}
            for _ in range(DRAWS * each):
                one = _handing(rng, pairs, template, order)
                own.setdefault(one.text, one)
                if len(own) == each:
                    break
            if len(own) < each:
                raise UsageError(
                    f"{len(pairs)} pairs of names make no {each} sentences of one template: ask for fewer."
                )
            found += own.values()
    return found


def _handing(rng: Random, pairs: Sequence[tuple[str, str]], template: int, order: Order) -> Handing:
    indirect, subject = rng.sample(rng.choice(pairs), 2)
    both = (subject, indirect) if order == "BABA" else (indirect, subject)
    text = TEMPLATES[template].format(
        both=" and ".join(both), subject=subject, place=rng.choice(PLACES), thing=rng.choice(OBJECTS)
    )
    return Handing(text=text, indirect=indirect, subject=subject, template=template, order=order)
