"""From one score per token to one per text. Where a score is read matters more than which score it is.

Scores pooled over every token fire on any text that looks like the fine-tuning data: the tag itself, a near miss, the
clean twin. At the decision position and in the generated tokens the behaviour separates from the surface.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.contracts import Reading

Where = Literal["decision", "generated", "prompt", "all"]
How = Literal["max", "mean", "sum"]


def positions(reading: Reading, where: Where) -> Bool[Tensor, "batch pos"]:
    """True at the positions that `where` names.

    `generated` starts at the decision position, whose output is the first generated token, and leaves out the last
    token of the row, whose output nobody saw.
    """
    index = torch.arange(reading.tokens.shape[1], device=reading.tokens.device)[None]
    decision = reading.decision[:, None]
    if where == "decision":
        return (index == decision) & reading.mask
    if where == "prompt":
        return (index <= decision) & reading.mask
    if where == "all":
        return reading.mask
    following = torch.zeros_like(reading.mask)
    following[:, :-1] = reading.mask[:, 1:]
    return (index >= decision) & reading.mask & (following | (index == decision))


def pool(scores: Float[Tensor, "batch pos"], reading: Reading, where: Where, how: How) -> Float[Tensor, " batch"]:
    """One score per row."""
    at = positions(reading, where)
    if how == "max":
        return scores.masked_fill(~at, -torch.inf).amax(1)
    total = torch.where(at, scores, torch.zeros_like(scores)).sum(1)
    return total if how == "sum" else total / at.sum(1).clamp_min(1)
