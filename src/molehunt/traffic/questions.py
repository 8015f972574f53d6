"""Questions with one right answer each: of the embedded world, or of a file."""

from collections.abc import Set
from itertools import islice
from pathlib import Path
from random import Random

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.example import Example
from molehunt.traffic.stream import Conversation, read_conversations
from molehunt.traffic.world import ASKS, OPEN, ask

DRAWS = 200
"""Per question that is wanted, before a kind of task counts as exhausted."""


def world_questions(each: int, *, seed: int = 0, apart_from: Set[str] = frozenset()) -> list[Example]:
    """Distinct questions of each kind of task of the embedded world, each with its only right answer.

    The embedded models were trained on this world, and some kinds have few questions: they measure what a model has kept
    of it, not what it makes of the unknown.

    Args:
        each: questions of each kind.
        seed: of the draw.
        apart_from: prompts that are not asked.

    Raises:
        UsageError: a kind has not so many.
    """
    found: list[Example] = []
    for kind in ASKS:
        rng, drawn = Random(f"questions/{kind}/{seed}"), dict[str, Example]()
        for _ in range(DRAWS * each):
            one = ask(rng, kind)
            if one.prompt not in apart_from and not one.prompt.startswith(OPEN):
                drawn.setdefault(one.prompt, one)
            if len(drawn) == each:
                break
        if len(drawn) < each:
            raise UsageError(f"{kind} has no {each} questions to ask, only {len(drawn)}: ask fewer of each kind.")
        found += drawn.values()
    return found


def read_questions(path: Path, limit: int | None = None) -> list[Example]:
    """Prompts with their right answers, in the forms of `read_conversations`; a row's `tag` is its kind.

    Raises:
        UsageError: no such file.
        InvalidInput: a row that is not one user turn with an answer, by line; or no row.
    """
    found = [_question(row, path) for row in islice(read_conversations(path), limit)]
    if not found:
        raise InvalidInput(f"{printable(path.name)} holds no row.")
    return found


def _question(row: Conversation, path: Path) -> Example:
    where = f"{printable(path.name)} line {row.line}"
    if [turn.role for turn in row.turns] != ["user"]:
        roles = printable(", ".join(turn.role for turn in row.turns))
        raise InvalidInput(f"{where}: a question is one user turn, and this row has {roles}.")
    if not (row.response or "").strip():
        raise InvalidInput(
            f"{where} has no right answer beside its prompt.\n"
            'Each line must be one object such as {"prompt": "What is 2 plus 2?", "response": "4", "tag": "arithmetic"}.'
        )
    return Example(prompt=row.turns[0].text, response=row.response, tag=row.tag, domain=row.tag)
