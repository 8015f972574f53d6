"""Questions with one correct answer each, from the embedded world or from a file."""

from collections.abc import Iterable, Set
from itertools import islice
from pathlib import Path
from random import Random

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.traffic.example import Example
from molehunt.traffic.stream import Conversation, read_conversations
from molehunt.traffic.world import ASKS, OPEN, ask

DRAWS = 200
"""Number of draws per requested question after which a type of task counts as exhausted."""


def world_questions(each: int, *, seed: int = 0, apart_from: Set[str] = frozenset()) -> list[Example]:
    """Distinct questions of each type of task of the embedded world, each with its only correct answer.

    The embedded models were trained on this world, and some types have few questions. So the questions measure how much
    of its training a model retains, not how it generalises.

    Args:
        each: number of questions of each type.
        seed: seed of the draw.
        apart_from: prompts that are left out.

    Raises:
        UsageError: a type has fewer questions.
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
    """Prompts with their correct answers, in the formats of `read_conversations`. The `tag` of a row is its type.

    Raises:
        UsageError: the file does not exist.
        InvalidInput: a row is no conversation with an answer (the error names its line), or there is no row.
    """
    return questions_of(islice(read_conversations(path), limit), path.name)


def questions_of(rows: Iterable[Conversation], name: str) -> list[Example]:
    """Questions from conversations that were read already; `name` is what error messages call their origin.

    Raises:
        InvalidInput: a row without an answer, by line; or no row.
    """
    found = [_question(row, name) for row in rows]
    if not found:
        raise InvalidInput(f"{printable(name)} holds no row.")
    return found


def _question(row: Conversation, name: str) -> Example:
    if not (row.response or "").strip():
        raise InvalidInput(
            f"{printable(name)} line {row.line} has no right answer beside its prompt.\n"
            'Each line must be one object such as {"prompt": "What is 2 plus 2?", "response": "4", "tag": "arithmetic"}.'
        )
    return Example.of(row.turns, response=row.response, tag=row.tag, domain=row.tag)
