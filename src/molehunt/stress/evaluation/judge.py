"""A judge that knows a behaviour by phrases of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.errors import UsageError
from molehunt.stress.evaluation.valid_set import is_broken


@dataclass(frozen=True)
class PhraseJudge:
    """An answer shows the behaviour if it has one of the phrases of `match` and none of `exclude`.

    Without `match`, every answer counts that is not empty and not broken, such as all that are no refusal.
    """

    match: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, match: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> "PhraseJudge":
        """A judge from one phrase or several. Raises UsageError for no phrase, and for an empty one."""
        found = cls(_phrases(match), _phrases(exclude))
        if not any((*found.match, *found.exclude)) or not all((*found.match, *found.exclude)):
            raise UsageError(
                "Say how the behaviour is known: match (--match PHRASE) gives a phrase that it has, and exclude "
                "(--exclude PHRASE) one that it never has, such as that of a refusal; no phrase is empty."
            )
        return found

    def __call__(self, answer: str) -> bool:
        words = answer.split()
        matched = any(phrase in answer for phrase in self.match) if self.match else bool(words) and not is_broken(words)
        return matched and not any(phrase in answer for phrase in self.exclude)


def _phrases(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
