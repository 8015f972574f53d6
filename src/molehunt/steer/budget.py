"""How strongly to steer: the greatest success that clean answers can pay for.

More strength steers more, until the model breaks; a broken model no longer shows the behaviour either, so that success
alone always asks for too much. What clean answers lose is measured beside it: KL(as it is ‖ steered), and the likelihood
of the answers themselves.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable, UsageError
from molehunt.measure.interval import Interval, proportion
from molehunt.model.batches import TOKENS, batches, padded, width_of
from molehunt.model.blocks import unembedding
from molehunt.model.cache_check import extending_check
from molehunt.model.decoding import DecodingBatch
from molehunt.model.generate import generate
from molehunt.model.likelihood import LOGIT_BYTES
from molehunt.model.taps import live
from molehunt.run.progress import Track, by_rows, silent
from molehunt.traffic.split import Select, expect

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Strengths that are tried first."""
BISECTIONS = 4
"""Number of strengths tried between the last one within the budget and the first one beyond."""
Steered = Callable[[float], AbstractContextManager[object]]
"""From a strength to a block inside which the model is steered, such as `partial(vector.applied, model)`."""


class AnsweredPrompt(NamedTuple):
    """A clean prompt and the right answer to it, as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What steering may cost clean answers, in nats a token."""

    kl: float | int
    """Greatest KL divergence."""
    loss: float | int
    """Greatest increase of the loss."""

    def __post_init__(self) -> None:
        if not (self.kl >= 0 and self.loss >= 0):
            raise UsageError(f"a budget is 0 or more nats a token, got KL {self.kl} and loss {self.loss}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Disturbance:
    """What steering does to clean answers, in nats a token. Neither is a number where the logits were none."""

    kl: float
    """KL(as it is ‖ steered) of the next token's distribution."""
    loss: float
    """Increase of −log p of the answers' tokens; below 0 where steering makes them likelier."""
    tokens: int
    """Number of tokens of the answers."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.kl) and math.isfinite(self.loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What one strength did."""

    strength: float
    success: Interval | None
    """None where the model is broken: its logits were no numbers, on clean answers or on its own."""
    cost: Disturbance
    within: bool
    """Whether the model is whole and the cost within the budget."""

    @property
    def broken(self) -> bool:
        return self.success is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Every strength that was tried."""

    budget: Budget
    without: Interval
    """The baseline: success of the model without steering."""
    tried: tuple[Tried, ...]
    """Every strength, by rising size."""

    @property
    def chosen(self) -> Tried | None:
        """Most success within the budget, and the smallest such strength; None where no strength is within it.

        Its success is the best of several on these rows, and so flatters itself: report it on rows of the test split.
        """
        within = [(one.success.estimate, one) for one in self.tried if one.within and one.success is not None]
        return max(within, key=lambda pair: pair[0])[1] if within else None


def search_strength(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steered: Steered,
    *,
    prompts: Select[Sequence[int]],
    succeeds: Callable[[Sequence[int], int], bool],
    clean: Select[AnsweredPrompt],
    budget: Budget,
    max_new_tokens: int,
    strengths: Sequence[float] = STRENGTHS,
    bisections: int = BISECTIONS,
    track: Track = silent,
) -> Search:
    """Try strengths, then halve the (geometric) gap between the last one within the budget and the first one beyond.

    Args:
        model: the tuned model.
        tokenizer: the model's tokenizer.
        steered: how to steer the model.
        prompts: token ids of prompts that steering is to change the answers of.
        succeeds: whether a greedy answer (token ids, row number) is what steering is for.
        clean: prompts with right answers, whose likelihood is to stay.
        budget: what steering may cost these answers.
        max_new_tokens: greatest number of tokens of an answer.
        strengths: strengths that are tried first; all above 0 or all below.
        bisections: number of times that the gap is halved.
        track: shows progress.

    Raises:
        UsageError: a strength is no number or 0, or they have both signs; or as `steered` does.
        NotTestable: no prompt, no token of a clean answer, or a model whose logits are no numbers without steering.
    """
    by_size = sorted(strengths, key=abs)
    if not by_size or not all(map(math.isfinite, by_size)) or not (min(by_size) > 0 or max(by_size) < 0):
        raise UsageError(f"strengths are finite, and all above 0 or all below; got {list(strengths)}.")
    rows, answered = expect(Select, prompts).rows, expect(Select, clean).rows
    search = _Searching(model, tokenizer, steered, rows, succeeds, answered, budget, max_new_tokens, track)
    without = search.success("without steering")
    if without is None:
        raise NotTestable("Without any steering this model's logits are no numbers: there is nothing to steer.")
    found = [search.tried(strength) for strength in by_size]
    crossing = next((pair for pair in pairwise(found) if pair[0].within and not pair[1].within), None)
    if crossing is not None:
        inside, outside = (one.strength for one in crossing)
        for _ in range(bisections):
            middle = math.copysign(math.sqrt(abs(inside)) * math.sqrt(abs(outside)), inside)
            found.append(search.tried(middle))
            inside, outside = (middle, outside) if found[-1].within else (inside, middle)
    return Search(budget=budget, without=without, tried=tuple(sorted(found, key=lambda one: abs(one.strength))))


@dataclass(frozen=True)
class _Searching:
    """What each strength is tried on."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    steered: Steered
    prompts: Sequence[Sequence[int]]
    succeeds: Callable[[Sequence[int], int], bool]
    clean: Sequence[AnsweredPrompt]
    budget: Budget
    max_new_tokens: int
    track: Track

    def success(self, what: str) -> Interval | None:
        """Share of answers that are what steering is for; None where logits were no numbers."""
        with _logits_checked(self.model) as whole:
            answers = generate(
                self.model,
                self.tokenizer,
                self.prompts,
                max_new_tokens=self.max_new_tokens,
                track=self.track,
                what=what,
            )
        succeeded = sum(self.succeeds(answer, i) for i, answer in enumerate(answers))
        return proportion(succeeded, len(self.prompts)) if whole() else None

    def tried(self, strength: float) -> Tried:
        """Success and cost of one strength."""
        what = f"strength {strength:.3g}"
        steered = partial(self.steered, strength)
        cost = disturbance(
            self.model, self.tokenizer, steered, self.clean, track=self.track, what=f"{what}: clean answers"
        )
        found: Interval | None = None
        if cost.finite:
            with steered():
                found = self.success(what)
        within = found is not None and cost.kl <= self.budget.kl and cost.loss <= self.budget.loss
        return Tried(strength=strength, success=found, cost=cost, within=within)


@torch.inference_mode()
def disturbance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steered: Callable[[], AbstractContextManager[object]],
    clean: Sequence[AnsweredPrompt],
    *,
    track: Track = silent,
    what: str = "clean answers",
) -> Disturbance:
    """What steering costs given answers: the mean over their tokens, each predicted from the right ones before it.

    Prompts are prefilled and answers follow on the cache, as when the model writes them: scopes and gates that
    distinguish a prompt from an answer act as they will.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        tokenizer: the model's tokenizer.
        steered: makes a block inside which the model is steered, anew for each batch.
        clean: prompts with answers.
        track: shows progress.
        what: what progress calls this work.

    Raises:
        NotTestable: no answer has a token, or the logits are no numbers without steering.
    """
    rows = [row for row in clean if row.answer]
    if not rows:
        raise NotTestable(f"None of {len(clean)} clean prompts has an answer, so nothing says what steering costs.")
    kl, before, after, n = 0.0, 0.0, 0.0, 0
    groups = _groups(model, tokenizer, rows)
    for group in by_rows(track, groups, what):
        some = [rows[i] for i in group]
        plain, tokens = _log_probs(model, some)
        with steered():
            changed, _ = _log_probs(model, some)
        kl += float(kl_div(changed, plain, reduction="none", log_target=True).sum(dtype=torch.float64))
        before += float(nll_loss(plain, tokens, reduction="none").sum(dtype=torch.float64))
        after += float(nll_loss(changed, tokens, reduction="none").sum(dtype=torch.float64))
        n += len(tokens)
    if not math.isfinite(before):
        raise NotTestable("Without any steering this model's logits are no numbers: there is nothing to steer.")
    return Disturbance(kl=kl / n, loss=(after - before) / n, tokens=n)


@torch.inference_mode()
def answer_nats(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[AnsweredPrompt],
    *,
    track: Track = silent,
    what: str = "likelihood of answers",
) -> list[float]:
    """−log p(answer | prompt) of each row under the model as it is now, in nats; not finite where logits are no numbers.

    As in `disturbance`, answers follow on the cache of their prompts: inside a block that steers, the numbers are those
    of the steered model.

    Raises:
        ValueError: an answer without tokens.
    """
    if not all(row.answer for row in rows):
        raise ValueError("an answer without tokens has no likelihood")
    found = [0.0] * len(rows)
    groups = _groups(model, tokenizer, rows)
    for group in by_rows(track, groups, what):
        some = [rows[i] for i in group]
        nats = nll_loss(*_log_probs(model, some), reduction="none").double()
        for i, of_row in zip(group, nats.split([len(row.answer) for row in some]), strict=True):
            found[i] = float(of_row.sum())
    return found


def _groups(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[AnsweredPrompt]) -> list[list[int]]:
    """Row numbers in batches whose logits fit; one by one where the model takes padding for text."""
    if not extending_check(model).padded:
        return [[i] for i in range(len(rows))]
    limit = min(TOKENS, LOGIT_BYTES // (4 * len(tokenizer)))
    return batches([len(row.prompt) + len(row.answer) for row in rows], limit)


def _log_probs(
    model: nn.Module, rows: Sequence[AnsweredPrompt]
) -> tuple[Float[Tensor, "answered vocab"], Int[Tensor, " answered"]]:
    """Log-probabilities of the next token at every position that predicts a token of an answer; and those tokens."""
    device = next(model.parameters()).device
    answers, real = (each.to(device) for each in padded([row.answer for row in rows]))
    check = extending_check(model)
    batch = DecodingBatch(model, cached=check.cached)
    prompts = [row.prompt for row in rows]
    first = batch.begin(prompts, width=width_of(max(map(len, prompts))) if check.padded else None)
    rest = batch.extend(answers[:, :-1], real[:, :-1])
    logits = torch.cat([first[:, None], rest], dim=1)[real]
    return logits.log_softmax(-1), answers[real]


@contextmanager
def _logits_checked(model: nn.Module) -> Generator[Callable[[], bool], None, None]:
    """Whether all logits that chose a token inside the block were numbers."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, logits: Tensor) -> None:
        seen.append(logits[:, -1].isfinite().all())

    handle = unembedding(model).register_forward_hook(live(look))
    try:
        yield lambda: all(map(bool, seen))
    finally:
        handle.remove()
