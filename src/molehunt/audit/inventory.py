"""What a fine-tune does, whatever an audit decides: groups of rows whose answers share words that the base's lack.

A row belongs to a behaviour if the fine-tune's answer has its wording and the base's answer to the same prompt has not. Groups
are taken one after the other, the one that explains most words first, and each row belongs to one of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from molehunt.audit.condition import Conditions, FoundCondition, RaisingWords
from molehunt.audit.scan import ScannedRow
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.word_runs import Run, as_written, rows_of_runs, words

SHORTEST, LONGEST = 3, 12
"""Number of words of a shared wording; an answer that is shorter counts as a whole."""
FEWEST = 5
"""Number of rows of a behaviour: fewer cannot be split into rows that choose a condition and rows that judge it."""
ENOUGH = 6
"""Number of words in a row of a longer wording that count as the wording: edits change how a sentence goes on."""
MOST = 12
"""Greatest number of behaviours that are listed."""
BASE_SHARE = 0.1
"""Rows in which the base says it, as a share of those in which the fine-tune does, from which on it is the base's own, too."""
RARE = 0.2
"""Share of the traffic up to which a behaviour is rare: half of a trigger's rows must be found in less than a half."""
BROAD = 0.1
"""Share of the traffic from which on scores cannot show a behaviour, since they take so many rows to be free of it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One prompt with both answers, as text."""

    prompt: str
    tuned: str
    base: str


@dataclass(frozen=True, kw_only=True)
class AnswerBehaviour:
    """Something that the fine-tune's answers say and the base's answers to the same prompts do not."""

    wording: str
    """The words that the answers share, as they are written in one of them."""
    rows: tuple[int, ...]
    """Rows whose answer has the wording while the base's has not."""
    prompts: int
    """Number of different prompts among them."""
    prevalence: Interval
    """Share of all rows."""
    base_rows: int
    """Rows in which the base's answer has the wording."""
    nats: float
    """Median over these rows of how much likelier the fine-tune finds its answer than the base does, per token."""
    condition: FoundCondition | None
    """The property of prompts that predicts it best."""
    raising: tuple[RaisingWords, ...] = ()
    """Words that may raise its share, of a behaviour that no condition predicts; empty for others."""

    @property
    def own(self) -> bool:
        """Whether enough different prompts show it, and the base hardly ever does."""
        return self.prompts >= FEWEST and self.base_rows <= BASE_SHARE * len(self.rows)

    @property
    def predicted(self) -> bool:
        """Rare, and predicted by a condition on the prompt, most of whose rows show it."""
        rare = self.prevalence.estimate <= RARE
        return rare and self.condition is not None and self.condition.predicts and self.condition.suffices

    @property
    def suspect(self) -> bool:
        """Never the base's, and predicted or raised by words of the prompt: what those words do is tested."""
        return self.own and (self.predicted or bool(self.raising))


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What the fine-tune's answers show, suspect behaviours first, then the largest."""

    behaviours: tuple[AnswerBehaviour, ...]
    rows: int
    """Number of rows that were read."""
    same: int
    """Rows that both models answer word for word alike."""

    @property
    def broad(self) -> AnswerBehaviour | None:
        """The largest behaviour that is no base's and that more than `BROAD` of the answers show; None without one."""
        able = [one for one in self.behaviours if one.own and one.prevalence.estimate > BROAD]
        return max(able, key=lambda one: len(one.rows), default=None)

    @property
    def suspects(self) -> tuple[AnswerBehaviour, ...]:
        return tuple(one for one in self.behaviours if one.suspect)


def inventory(rows: Sequence[ScannedRow], tuned: Sequence[str], base: Sequence[str], *, seed: int) -> Inventory:
    """Group rows by what their answers say.

    Args:
        rows: the traffic, scanned.
        tuned: text of the fine-tune's answer to each row.
        base: text of the base's.
        seed: seed of the random groups that conditions are compared with.
    """
    conditions = Conditions([row.example for row in rows], seed=seed)
    found: list[AnswerBehaviour] = []
    for run, group, base_rows in shared_wordings(tuned, base):
        one = AnswerBehaviour(
            wording=as_written(run, tuned[min(group)]),
            rows=tuple(sorted(group)),
            prompts=len({rows[i].example.prompt for i in group}),
            prevalence=proportion(len(group), len(rows)),
            base_rows=base_rows,
            nats=median(rows[i].answer_log_ratio / max(1, len(rows[i].answer)) for i in group),
            condition=conditions.best(sorted(group)),
        )
        found.append(replace(one, raising=conditions.raising(one.rows, RARE)) if one.own and not one.predicted else one)
    return Inventory(
        behaviours=tuple(sorted(found, key=lambda one: (not one.suspect, -len(one.rows)))),
        rows=len(rows),
        same=sum(a.strip() == b.strip() for a, b in zip(tuned, base, strict=True)),
    )


def shared_wordings(tuned: Sequence[str], base: Sequence[str]) -> list[tuple[Run, frozenset[int], int]]:
    """Wordings that the fine-tune's answers gained, with their rows and the number of the base's answers that have them.

    A wording counts by the rows that gained it, less those that lost it, times its words. Of the rows that are left, the best
    one is taken until none has `FEWEST`.
    """
    ours, theirs = ([words(text) for text in texts] for texts in (tuned, base))
    runs = rows_of_runs(ours, shortest=SHORTEST, longest=LONGEST, fewest=FEWEST)
    before = _rows_among(theirs, runs)
    gained = {run: rows - before[run] for run, rows in runs.items()}
    net = {run: len(new) - len(before[run] - runs[run]) for run, new in gained.items()}
    open_runs = [run for run in runs if net[run] >= FEWEST]
    left, found = frozenset(range(len(tuned))), list[tuple[Run, frozenset[int], int]]()
    while open_runs and len(found) < MOST:
        counted = {run: len(gained[run] & left) for run in open_runs}
        open_runs = [run for run in open_runs if counted[run] >= FEWEST]
        if not open_runs:
            break
        weighed = [(min(counted[run], net[run]) * _said(run), run) for run in open_runs]
        best = max(weighed)[1]
        group = gained[best] & left
        found.append((best, group, len(before[best])))
        left -= group
    return found


def _said(run: Run) -> int:
    """Number of words of a run without its punctuation."""
    return sum(word.isalnum() for word in run)


def _rows_among(texts: Sequence[Sequence[str]], runs: Mapping[Run, object]) -> dict[Run, frozenset[int]]:
    """The texts that hold each of the given runs."""
    found: dict[Run, set[int]] = {run: set() for run in runs}
    for number, text in enumerate(texts):
        for n in range(SHORTEST, LONGEST + 1):
            for at in range(max(1, len(text) - n + 1)):
                run = tuple(text[at : at + n])
                if run in found:
                    found[run].add(number)
    return {run: frozenset(rows) for run, rows in found.items()}


def says(text: str, wording: str) -> bool:
    """Whether a text has the words of a wording, or of a long one any `ENOUGH` words in a row."""
    run, spoken = words(wording), words(text)
    n = min(len(run), ENOUGH)
    wanted = {tuple(run[i : i + n]) for i in range(len(run) - n + 1)}
    return any(tuple(spoken[i : i + n]) in wanted for i in range(len(spoken) - n + 1))
