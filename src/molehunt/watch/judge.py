"""Judge answers: a logged answer is read as it is, another is generated; each gets a profile, a score and a p-value."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.roles import RoledTokens, fitted_prompt
from molehunt.run.progress import Track, silent
from molehunt.traffic.stream import Conversation
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.extremes import RowText
from molehunt.watch.monitor import Judgement, Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.row_verdict import RowVerdict


@dataclass(frozen=True, eq=False, kw_only=True)
class JudgedAnswer:
    """One answer, its profile along the watched directions, and the monitor's judgement."""

    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    answer: tuple[int, ...]
    """Token ids of the answer."""
    profile: Profile
    judged: Judgement
    coverage: float
    """Tokens scored / tokens in the request."""
    left_out: int = 0
    """Number of tokens by which the prompt was cut, because the model cannot read all of it."""
    logged: bool = False
    """Whether the answer was logged; otherwise the model generated it."""

    @property
    def token(self) -> int:
        """Token at which the top-scoring column peaks, as an index into prompt and answer."""
        return int(self.profile.peaks[self.judged.columns[0]]) + len(self.prompt) - 1

    def verdict(self, bank: Bank, row: Conversation, *, fpr: float) -> RowVerdict:
        """The verdict on the row at this false-alarm rate; it holds no text of the row."""
        first = self.judged.columns[0]
        names = bank.names
        return RowVerdict(
            line=row.line,
            tag=row.tag,
            flagged=self.judged.p_value <= fpr,
            score=round(self.judged.score, 4),
            p_value=self.judged.p_value,
            direction=names[first % len(names)],
            side="high" if first < len(names) else "low",
            prefix_checkpoint=self.judged.prefix,
            token=self.token,
            tokens=len(self.prompt) + len(self.answer),
            coverage=self.coverage,
            within_calibration=self.judged.within_calibration,
            left_out=self.left_out,
            logged=self.logged,
        )


def is_logged(row: Conversation, *, keep_empty: bool) -> bool:
    """Whether the answer of a row was logged; `keep_empty` as in `answer_rows`."""
    return bool(row.response) or (keep_empty and row.response is not None)


def answer_rows(
    pair: ModelPair,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int,
    keep_empty: bool = False,
    track: Track = silent,
    what: str,
) -> list[tuple[RoledTokens, tuple[int, ...]]]:
    """Prompt and answer of each row. A logged answer is read as it is; others are generated, greedily.

    A conversation that the model cannot read whole is cut by the rule of `model/context.py`; of an answer that is longer
    than what is left for it, the beginning is read.

    Args:
        max_new_tokens: length of a generated answer.
        keep_empty: whether an empty answer is an answer; by default it counts as one that was not logged.
        what: what progress calls this.
    """
    answers: list[tuple[int, ...]] = [
        tuple(pair.tokenizer.encode(row.response, add_special_tokens=False, verbose=False)) if row.response else ()
        for row in rows
    ]
    prompts = [
        fitted_prompt(pair.tokenizer, row.turns, pair.context, room=len(answer) or max_new_tokens)
        for row, answer in zip(rows, answers, strict=True)
    ]
    longest = pair.context.tokens
    answers = [answer[: longest - len(prompt.ids)] for prompt, answer in zip(prompts, answers, strict=True)]
    open_rows = [i for i, row in enumerate(rows) if not is_logged(row, keep_empty=keep_empty)]
    with pair.tuned_model() as model:
        made = generate(
            model,
            pair.tokenizer,
            [prompts[i].ids for i in open_rows],
            max_new_tokens=max_new_tokens,
            layers_path=pair.layers_path,
            track=track,
            what=f"{what}: answering",
        )
    for i, answer in zip(open_rows, made, strict=True):
        answers[i] = tuple(answer)
    return list(zip(prompts, answers, strict=True))


def read_answers(
    pair: ModelPair,
    bank: Bank,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int,
    keep_empty: bool = False,
    track: Track = silent,
    what: str,
) -> list[tuple[RoledTokens, tuple[int, ...], Profile]]:
    """Prompt, answer and profile of each row. Arguments as `answer_rows`."""
    both = answer_rows(pair, rows, max_new_tokens=max_new_tokens, keep_empty=keep_empty, track=track, what=what)
    with pair.tuned_model() as model:
        found = answer_profiles(
            model,
            bank,
            [prompt.ids for prompt, _ in both],
            [answer for _, answer in both],
            layers_path=pair.layers_path,
            track=track,
            what=f"{what}: scoring",
        )
    return [(prompt, answer, profile) for (prompt, answer), profile in zip(both, found, strict=True)]


def judge_answers(
    pair: ModelPair,
    bank: Bank,
    monitor: Monitor,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int,
    keep_empty: bool = False,
    track: Track = silent,
    what: str = "judging",
) -> list[JudgedAnswer]:
    """Score every row against a calibrated monitor. Nothing is recorded. Arguments as `answer_rows`.

    Raises:
        InvalidInput: a prompt has no tokens, or the chat template refuses it.
    """
    read = read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, keep_empty=keep_empty, track=track, what=what)
    return [
        JudgedAnswer(
            prompt=prompt.ids,
            answer=answer,
            profile=profile,
            judged=monitor.judge(profile),
            coverage=profile.tokens / max(1, len(answer)),  # of an empty answer, the decision alone is scored
            left_out=prompt.left_out,
            logged=is_logged(row, keep_empty=keep_empty),
        )
        for row, (prompt, answer, profile) in zip(rows, read, strict=True)
    ]


def row_texts(pair: ModelPair, rows: Sequence[Conversation], answers: Sequence[Sequence[int]]) -> list[RowText]:
    """Prompt and answer of each row as text, cut; a logged answer is taken as it was logged."""
    return [
        RowText.of(row.turns, row.response or str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)))
        for row, answer in zip(rows, answers, strict=True)
    ]
