"""The likelihood of given answers under a model, with or without interventions."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.model.batches import padded
from molehunt.model.last_logits import last_logits
from molehunt.model.taps import edit_sites
from molehunt.run.progress import Track, by_rows, silent

LOGIT_BYTES = 256 * 2**20
"""Greatest number of bytes of one batch of fp32 logits."""


def logits_from(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], start: int
) -> Float[Tensor, "batch kept vocab"]:
    """Logits of one pass at every position from `start` on: those of prompts cost as much as a block, and few need them."""
    kept = tokens.shape[1] - start
    with last_logits(model, kept) as given:
        logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False, **given).logits
    return logits[:, -kept:].float()


@torch.inference_mode()
def answer_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
    *,
    track: Track = silent,
    what: str = "likelihood of answers",
) -> list[float]:
    """Log p(answer | prompt) of each row under `model`, in nats; 0 for an empty answer. One teacher-forced pass.

    Raises:
        ValueError: an empty prompt.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt without tokens has no position to predict an answer from")
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    longest = max((len(row) for row in rows), default=1)
    size = max(1, min(64, LOGIT_BYTES // (4 * len(tokenizer) * longest)))
    with edit_sites(model, interventions):
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        for group in by_rows(track, groups, what):
            tokens, mask = (each.to(device) for each in padded([rows[i] for i in group]))
            start = min(len(prompts[i]) for i in group) - 1
            logits = logits_from(model, tokens, mask, start)
            log_probs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, start + 1 :, None]).squeeze(-1)
            for r, i in enumerate(group):
                first = len(prompts[i]) - 1 - start
                found[i] = float(log_probs[r, first : first + len(answers[i])].sum())
    return found
