"""What a fix does to some prompts, and what it costs on others."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import nn

from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.budget import Answered, Disturbance, disturbance
from molehunt.traffic.chat import prompt_ids

Steered = Callable[[nn.Module], AbstractContextManager[object]]
"""A block inside which a model is steered, made anew for each pass."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One prompt, answered greedily."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Answers of the tuned model with and without the fix."""

    rows: tuple[TrialRow, ...]
    changed: Interval
    """Prompts whose answer the fix changed at all."""
    shown: tuple[Interval, Interval] | None
    """Prompts whose answer shows the behaviour, before and after; None where nobody said what that is."""
    clean_changed: Interval | None
    """Clean prompts whose answer it changed."""
    cost: Disturbance | None
    """On the tuned model's own answers to clean prompts; both None without such prompts."""


def try_fix(
    pair: ModelPair,
    steered: Steered,
    prompts: Sequence[str],
    clean: Sequence[str] = (),
    *,
    shows: Callable[[str], bool] | None = None,
    max_new_tokens: int,
    track: Track = silent,
) -> Trial:
    """Answer `prompts` and `clean` with and without the fix.

    Raises:
        NotTestable: the model gives no clean prompt an answer to measure a cost on.
        UsageError, CannotTap: the fix is of another model.
    """

    def texts(answers: Sequence[Sequence[int]]) -> list[str]:
        return [str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)) for answer in answers]

    with pair.tuned_model() as model:

        def answers(rows: Sequence[Sequence[int]], what: str) -> list[list[int]]:
            return generate(model, pair.tokenizer, rows, max_new_tokens=max_new_tokens, track=track, what=what)

        asked = [prompt_ids(pair.tokenizer, prompt) for prompt in prompts]
        before = answers(asked, "without the fix")
        with steered(model):
            after = answers(asked, "with the fix")
        cost, kept = None, None
        if clean:
            calm = [prompt_ids(pair.tokenizer, prompt) for prompt in clean]
            usual = answers(calm, "clean prompts without the fix")
            with steered(model):
                fixed = answers(calm, "clean prompts with the fix")
            kept = proportion(sum(a != b for a, b in zip(usual, fixed, strict=True)), len(calm))
            pairs = [Answered(prompt, answer) for prompt, answer in zip(calm, usual, strict=True)]
            cost = disturbance(model, pair.tokenizer, partial(steered, model), pairs, track=track)
    told = texts(before), texts(after)
    shown = None
    if shows is not None:
        first, second = (proportion(sum(map(shows, some)), len(prompts)) for some in told)
        shown = first, second
    return Trial(
        rows=tuple(TrialRow(prompt=p, before=a, after=b) for p, a, b in zip(prompts, *told, strict=True)),
        changed=proportion(sum(a != b for a, b in zip(before, after, strict=True)), len(prompts)),
        shown=shown,
        clean_changed=kept,
        cost=cost,
    )
