"""The words that prompts at the ends of directions share, as a watch reports them: with names and clean rows beside them."""

from collections.abc import Sequence

from molehunt.measure.phrases import delimited
from molehunt.measure.word_runs import words
from molehunt.report.watch_schema import EndOfWords, EndWords, SharedWords
from molehunt.watch.ends import WordsAtEnds
from molehunt.watch.extremes import Inputs
from molehunt.watch.label import LIMIT, log_odds

WORDS = 50
"""Greatest number of words at ends that are reported. A topic has hundreds, and names itself by the first."""


def end_words(inputs: Inputs, names: Sequence[str], clean: Sequence[str]) -> EndWords:
    """The words that prompts at the ends of directions share beyond chance, with the names of the directions.

    Topics are in the clean rows, too, and a trigger seldom is. So the order is by the lower limit of the log-odds ratio
    of the inputs at the best end against clean rows, as for the keywords of each end.

    Args:
        clean: prompts of clean rows.
    """
    spelled = [delimited(words(prompt)) for prompt in clean]

    def named(one: WordsAtEnds) -> SharedWords:
        ends = tuple(
            EndOfWords(direction=names[end.direction], side="high" if end.high else "low", rows=end.rows, of=end.of)
            for end in one.ends
        )
        run = delimited(one.run)
        return SharedWords(
            text=one.text,
            rows=one.rows,
            clean=sum(run in prompt for prompt in spelled),
            p_value=one.p_value,
            ends=ends,
            n_ends=one.n_ends,
        )

    def at_least(one: SharedWords) -> float:
        ratio, error = log_odds(one.ends[0].rows, one.ends[0].of, one.clean, len(clean))
        return ratio - LIMIT * error

    found = sorted(map(named, inputs.prompts.shared_words()), key=at_least, reverse=True)
    return EndWords(
        prompts=len(inputs.prompts.texts),
        clean_rows=len(clean),
        found=tuple(found[:WORDS]),
        more=max(0, len(found) - WORDS),
    )
