"""From a judged answer to an alert: its direction, similar alerts, and the answer again with that direction ablated."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from molehunt.model.generate import generate
from molehunt.steer.ablate import Ablate
from molehunt.watch.alert import Action, Alert, Extreme
from molehunt.watch.answers import token_columns
from molehunt.watch.bank import Bank, WatchedDirection
from molehunt.watch.judge import JudgedAnswer
from molehunt.watch.monitor import Judgement, Monitor

SHOWN = 48
"""Number of tokens around its span that an alert keeps."""
ALIKE = 0.7
"""Two alerts are look-alikes when the cosine of their exceedances is above this."""
ALIKE_SHOWN = 3


def top_scoring(bank: Bank, judged: Judgement) -> list[WatchedDirection]:
    """The directions behind the top-scoring columns, each once: those that are ablated in a flagged answer."""
    found = {direction.name: direction for direction in map(bank.direction, judged.columns)}
    return list(found.values())


def alert_of(
    bank: Bank,
    tokenizer: PreTrainedTokenizerBase,
    one: JudgedAnswer,
    *,
    request: str,
    action: Action,
    fpr: float,
    extremes: Sequence[Extreme] = (),
    look_alikes: Sequence[str] = (),
) -> Alert:
    """The alert of a flagged answer, without running the model again (see `explained`)."""
    direction = bank.direction(one.judged.columns[0])
    nearest = sorted(extremes, key=lambda extreme: abs(extreme.score - one.judged.score))
    return Alert(
        request=request,
        action=action,
        score=one.judged.score,
        p_value=one.judged.p_value,
        fpr=fpr,
        region="decision" if one.judged.prefix == 0 else "answer",
        direction=direction.name,
        layer=direction.site.layer,
        span=(one.token, one.token + 1),
        coverage=one.coverage,
        profile=one.profile.prefixes[-1].numpy().astype("<f4").tobytes(),
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
    one: JudgedAnswer,
    *,
    max_new_tokens: int,
    layers_path: str | None = None,
) -> Alert:
    """The alert with a score for each token, and with the greedy answer while its top-scoring directions are projected out.

    Where the answer was logged, the model's own greedy answer is added: only that one can be compared with the other.

    Raises as `generate` and `watched`.
    """
    ids = (*one.prompt, *one.answer)
    scores = monitor.by_token(one.judged, token_columns(model, bank, ids, layers_path=layers_path)).tolist()
    by_site: dict[int, list[WatchedDirection]] = {}
    for direction in top_scoring(bank, one.judged):
        by_site.setdefault(direction.site.layer, []).append(direction)
    edits = [Ablate(each[0].site, torch.stack([d.vector for d in each])) for each in by_site.values()]

    def answered(interventions: Sequence[Ablate]) -> str:
        (ids,) = generate(
            model,
            tokenizer,
            [one.prompt],
            max_new_tokens=max_new_tokens,
            interventions=interventions,
            layers_path=layers_path,
        )
        return _text(tokenizer, ids)

    start = max(0, one.token - SHOWN // 2)
    shown = slice(start, start + SHOWN)
    return replace(
        alert,
        tokens=tuple(str(tokenizer.decode([i])) for i in ids[shown]),
        token_scores=tuple(scores[shown]),
        tokens_from=start,
        answer_without=answered(edits),
        answer_own=answered(()) if one.logged else None,
    )


def look_alikes(monitor: Monitor, one: JudgedAnswer, earlier: Sequence[Alert]) -> list[str]:
    """Ids of the earlier alerts with exceedances similar to those of this answer, most similar first."""
    mine = one.profile.prefixes[-1]
    rows = [torch.frombuffer(bytearray(alert.profile), dtype=torch.float32) for alert in earlier]
    known = [(alert.id, row) for alert, row in zip(earlier, rows, strict=True) if len(row) == len(mine)]
    if not known:
        return []
    score = monitor.by_stratum[one.judged.stratum].prefixes[-1].score
    stood_out = score.by_column(torch.stack([mine, *(row for _, row in known)]))
    similar = cosine_similarity(stood_out[:1], stood_out[1:])
    order = similar.argsort(descending=True)[:ALIKE_SHOWN].tolist()
    return [known[i][0] for i in order if similar[i] > ALIKE]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
