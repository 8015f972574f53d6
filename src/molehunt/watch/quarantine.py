"""From a judged answer to an alert: what it names, what it resembles, and the answer again without what gave it away."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from molehunt.model.generate import generate
from molehunt.steer.ablate import Ablate
from molehunt.watch.alert import Action, Alert, Extreme
from molehunt.watch.answers import token_columns
from molehunt.watch.bank import Bank, Watched
from molehunt.watch.monitor import Judged, Monitor
from molehunt.watch.profile import Profile

SHOWN = 48
"""Tokens of an alert that are kept around its span."""
ALIKE = 0.7
"""Cosine of two answers' exceedances above which one is called a look-alike of the other."""
ALIKE_SHOWN = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Answered:
    """One answer, what it looked like, and what the monitor says."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    profile: Profile
    judged: Judged
    coverage: float
    """Tokens scored / tokens in the request."""

    @property
    def token(self) -> int:
        """Where the loudest column peaks, as an index into prompt and answer."""
        return int(self.profile.peaks[self.judged.columns[0]]) + len(self.prompt) - 1


def loudest(bank: Bank, judged: Judged) -> list[Watched]:
    """The directions behind the columns that say most, each once: what is taken out of a flagged answer."""
    found = {direction.name: direction for direction in map(bank.direction, judged.columns)}
    return list(found.values())


def alert_of(
    bank: Bank,
    tokenizer: PreTrainedTokenizerBase,
    one: Answered,
    *,
    request: str,
    action: Action,
    fpr: float,
    extremes: Sequence[Extreme] = (),
    look_alikes: Sequence[str] = (),
) -> Alert:
    """The alert of a flagged answer, by what is known without running the model again (see `explained`)."""
    direction = bank.direction(one.judged.columns[0])
    nearest = sorted(extremes, key=lambda extreme: abs(extreme.score - one.judged.score))
    return Alert(
        request=request,
        action=action,
        score=one.judged.score,
        p_value=one.judged.p_value,
        fpr=fpr,
        region="decision" if one.judged.look == 0 else "answer",
        direction=direction.name,
        layer=direction.site.layer,
        span=(one.token, one.token + 1),
        coverage=one.coverage,
        profile=one.profile.looks[-1].numpy().astype("<f4").tobytes(),
        extremes=tuple(sorted(nearest[:3], key=lambda extreme: -extreme.score)),
        look_alikes=tuple(look_alikes),
        answer=_text(tokenizer, one.answer),
    )


def explained(
    alert: Alert,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    bank: Bank,
    monitor: Monitor,
    one: Answered,
    *,
    max_new_tokens: int,
    layers_path: str | None = None,
) -> Alert:
    """The alert with a score for each token, and with the greedy answer while its loudest directions are projected out.

    Raises as `generate` and `watched`.
    """
    ids = (*one.prompt, *one.answer)
    scores = monitor.by_token(one.judged, token_columns(model, bank, ids, layers_path=layers_path)).tolist()
    by_site: dict[int, list[Watched]] = {}
    for direction in loudest(bank, one.judged):
        by_site.setdefault(direction.site.layer, []).append(direction)
    without = generate(
        model,
        tokenizer,
        [one.prompt],
        max_new_tokens=max_new_tokens,
        interventions=[Ablate(each[0].site, torch.stack([d.vector for d in each])) for each in by_site.values()],
        layers_path=layers_path,
    )[0]
    start = max(0, one.token - SHOWN // 2)
    shown = slice(start, start + SHOWN)
    return replace(
        alert,
        tokens=tuple(str(tokenizer.decode([i])) for i in ids[shown]),
        token_scores=tuple(scores[shown]),
        tokens_from=start,
        answer_without=_text(tokenizer, without),
    )


def look_alikes(monitor: Monitor, one: Answered, earlier: Sequence[Alert]) -> list[str]:
    """Ids of the earlier alerts whose columns stand out as this answer's do, most similar first."""
    mine = one.profile.looks[-1]
    rows = [torch.frombuffer(bytearray(alert.profile), dtype=torch.float32) for alert in earlier]
    known = [(alert.id, row) for alert, row in zip(earlier, rows, strict=True) if len(row) == len(mine)]
    if not known:
        return []
    score = monitor.of_kind[one.judged.kind].looks[-1].score
    stood_out = score.by_column(torch.stack([mine, *(row for _, row in known)]))
    similar = cosine_similarity(stood_out[:1], stood_out[1:])
    order = similar.argsort(descending=True)[:ALIKE_SHOWN].tolist()
    return [known[i][0] for i in order if similar[i] > ALIKE]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
