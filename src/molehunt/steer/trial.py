"""What a fix does to some prompts, and what it costs on others."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from molehunt.errors import UsageError
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.budget import AnsweredPrompt, Disturbance, disturbance
from molehunt.steer.prefill_gate import Condition
from molehunt.steer.vector import Scope, SteeringVector
from molehunt.traffic.chat import Text
from molehunt.traffic.turn import shown_text

Steered = Callable[[nn.Module], AbstractContextManager[object]]
"""Makes a block inside which a model is steered, anew for each pass."""


def strength_for(operator: Literal["add", "ablate"], strength: float | int | None = None) -> float | int:
    """The given strength, or the one that takes a behaviour away: -1 to add a vector, and 1 to ablate its direction.

    Raises UsageError for a negative share to ablate, which would amplify the behaviour.
    """
    if strength is None:
        return -1.0 if operator == "add" else 1.0
    if operator == "ablate" and strength < 0:
        raise UsageError(
            f"strength {strength:g} with the operator ablate amplifies the behaviour: it is the share of the projection "
            "that is removed. Give a strength from 0 to 1."
        )
    return strength


def steered_by(
    vector: SteeringVector,
    strength: float | int | None = None,
    *,
    operator: Literal["add", "ablate"] = "add",
    scope: Scope = "all",
    condition: Condition | None = None,
    layers_path: str | None = None,
) -> Steered:
    """Steer with a vector: every prompt, or only those that a condition opens for.

    Raises UsageError for a condition together with a scope, and for a strength that `strength_for` refuses.
    """
    strength = strength_for(operator, strength)
    if condition is None:
        return lambda model: vector.applied(model, strength, operator=operator, scope=scope, layers_path=layers_path)
    if scope != "all":
        raise UsageError("--when and --scope say opposite things: a condition opens for whole rows.")

    @contextmanager
    def gated(model: nn.Module) -> Generator[None, None, None]:
        with (
            condition.gate(model, layers_path=layers_path) as opens,
            vector.applied(model, strength, operator=operator, gate=opens, layers_path=layers_path),
        ):
            yield

    return gated


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One prompt, answered greedily."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class FixTrial:
    """Answers of the tuned model with and without the fix."""

    rows: tuple[TrialRow, ...]
    changed: Interval
    """Share of prompts whose answer the fix changed at all."""
    shown: tuple[Interval, Interval] | None
    """Share of prompts whose answer shows the behaviour, before and after; None where no phrase of it was given."""
    clean_changed: Interval | None
    """Share of clean prompts whose answer the fix changed."""
    cost: Disturbance | None
    """The cost on the tuned model's own answers to clean prompts; both are None without such prompts."""


def try_fix(
    pair: ModelPair,
    steered: Steered,
    prompts: Sequence[Text],
    clean: Sequence[Text] = (),
    *,
    shows: Callable[[str], bool] | None = None,
    max_new_tokens: int,
    track: Track = silent,
) -> FixTrial:
    """Answer `prompts` and `clean` with and without the fix.

    Args:
        pair: its tuned model answers.
        steered: the fix.
        prompts: prompts whose answers the fix is to change.
        clean: prompts whose answers it is to leave alone.
        shows: whether an answer shows the behaviour.
        max_new_tokens: greatest number of tokens of an answer.
        track: shows progress.

    Raises:
        NotTestable: the model gives no clean prompt an answer to measure a cost on.
        UsageError, CannotTap: the fix is for another model.
    """
    rows = pair.tokenize(prompts, room=max_new_tokens)
    with pair.tuned_model() as model:

        def answers(asked: Sequence[Sequence[int]], what: str) -> list[list[int]]:
            return generate(model, pair.tokenizer, asked, max_new_tokens=max_new_tokens, track=track, what=what)

        before = answers(rows, "without the fix")
        with steered(model):
            after = answers(rows, "with the fix")
        cost, clean_changed = None, None
        if clean:
            clean_rows = pair.tokenize(clean, room=max_new_tokens)
            plain = answers(clean_rows, "clean prompts without the fix")
            with steered(model):
                fixed = answers(clean_rows, "clean prompts with the fix")
            clean_changed = _share_that_differs(plain, fixed)
            pairs = [AnsweredPrompt(prompt, answer) for prompt, answer in zip(clean_rows, plain, strict=True)]
            cost = disturbance(model, pair.tokenizer, partial(steered, model), pairs, track=track)
    texts = [
        [str(pair.tokenizer.decode(answer, skip_special_tokens=True)) for answer in some] for some in (before, after)
    ]
    shown = None
    if shows is not None:
        first, second = (proportion(sum(map(shows, some)), len(prompts)) for some in texts)
        shown = first, second
    return FixTrial(
        rows=tuple(TrialRow(prompt=shown_text(p), before=a, after=b) for p, a, b in zip(prompts, *texts, strict=True)),
        changed=_share_that_differs(before, after),
        shown=shown,
        clean_changed=clean_changed,
        cost=cost,
    )


def _share_that_differs(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> Interval:
    return proportion(sum(a != b for a, b in zip(before, after, strict=True)), len(before))
