"""Log probabilities of a prompt's own tokens, which loglikelihood evaluations ask for (`echo` with `logprobs`).

They come from a pass over the whole prompt without a cache, so that every backend reports the same numbers. A prompt
never pays for them unless its request asks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molehunt.model.blocks import unwrapped
from molehunt.model.cache import positions_for, takes
from molehunt.model.sampling import TokenLogprobs, all_logprobs_of

LOGITS_AT_ONCE = 1 << 25
"""Greatest number of logits that one pass leaves; of a longer prompt or a larger vocabulary, several passes are made."""


@torch.no_grad()
def prompt_logprobs(
    model: nn.Module, prompt: Sequence[int], top: int, *, between: Callable[[], object]
) -> tuple[TokenLogprobs, ...] | None:
    """Those of each token but the first, with the `top` likeliest ones beside it; None where the logits are not finite.

    Args:
        between: called after every pass, so that whoever watches the model can drop what it has seen.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)
    places = torch.arange(len(prompt) - 1, device=device)
    found: list[TokenLogprobs] = []
    at = 0
    while at < len(places):
        logits = _logits(model, tokens, places[at : at + _at_once(model)])
        between()
        wanted = prompt[at + 1 : at + 1 + len(logits)]
        if logits.isnan().any():
            return None
        found += all_logprobs_of(logits, wanted, top)
        at += len(logits)
    return tuple(found)


def _at_once(model: nn.Module) -> int:
    """Number of positions whose logits one pass leaves."""
    if not takes(model, "logits_to_keep"):
        return 1 << 62
    config: Any = unwrapped(model).config
    return max(1, LOGITS_AT_ONCE // int(config.get_text_config(decoder=True).vocab_size))


def _logits(model: nn.Module, tokens: Tensor, places: Tensor) -> Tensor:
    """The logits at some places of one row."""
    keeps = takes(model, "logits_to_keep")
    given: dict[str, Any] = {"logits_to_keep": places} if keeps else {}
    given |= positions_for(model, torch.arange(tokens.shape[1], device=tokens.device)[None])
    if takes(model, "use_cache"):
        given["use_cache"] = False
    out: Any = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
    return out.logits[0] if keeps else out.logits[0, places]
