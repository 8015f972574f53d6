"""A suffix that can be typed: greedy coordinate gradient (GCG), the defence live in every pass.

Source: Zou et al., arXiv 2307.15043, algorithm 1. A maintained library, nanogcg, does not fit. It takes one prompt at a time
through its own rendering of the template, sets the process's seed, and its prefix cache (0.3.0) fails on the caches of
transformers 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable
from molehunt.run.progress import Track, silent
from molehunt.stress.attacks.insertion import Insertion, embedding
from molehunt.stress.attacks.objective import Objective
from molehunt.stress.attacks.typed_text import plain_tokens, retokenised, survive

START = " !"
"""The token that every suffix starts from, as published."""


@dataclass(frozen=True, kw_only=True)
class DiscreteConfig:
    """Settings of the search, small enough for a CPU. `PUBLISHED` tries 67 times as many swaps."""

    tokens: int = 16
    """Number of tokens in the suffix."""
    steps: int = 60
    """Number of optimisation steps."""
    candidates: int = 64
    """Number of single swaps that are tried in a step."""
    top: int = 64
    """Number of tokens to draw from at each position: those that the gradient ranks highest."""
    target_margin: float = 0.5
    """Margin at which a row is done."""


PUBLISHED = DiscreteConfig(tokens=20, steps=500, candidates=512, top=256)
"""ArXiv 2307.15043, §3 and its code."""


@dataclass(frozen=True, kw_only=True)
class TypedSuffix:
    """The best suffix of one row."""

    tokens: tuple[int, ...]
    margin: float
    """Margin with the answer forced. Above 0, greedy decoding produces the answer."""


def discrete_start(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The tokens of the first suffix."""
    return tokenizer.encode(START * tokens, add_special_tokens=False)[:tokens]


def discrete_suffixes(
    prompts: Insertion,
    rows: Sequence[Sequence[int]],
    marks: int,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    config: DiscreteConfig,
    *,
    seed: int,
    track: Track = silent,
) -> list[TypedSuffix]:
    """Search a suffix for each row separately. The row's text with the suffix must be read as the same tokens again.

    Args:
        prompts: prompts with the place for the suffix.
        rows: token ids of the prompts, without a suffix.
        marks: as in `insertion_of`.
        objective: the objective for the rows.
        tokenizer: the model's tokenizer.
        config: settings of the search.
        seed: seed of each row's swaps.
        track: shows the rows.

    Raises:
        NotTestable: the text of a prompt is not read as the tokens that it was given as, so nothing can be typed there.
    """
    lost = sum(list(row) != read for row, read in zip(rows, retokenised(tokenizer, rows), strict=True))
    if lost:
        raise NotTestable(
            f"The text of {lost} of {len(rows)} attacked prompts is read as other tokens than those that were attacked, so "
            "no suffix can be typed after them. Leave the discrete suffix out."
        )
    table = _table(prompts.model)
    plain = plain_tokens(tokenizer, len(table)).to(table.device)
    start = torch.tensor(discrete_start(tokenizer, config.tokens), device=table.device)
    found: list[TypedSuffix] = []
    for i in track(range(len(rows)), "discrete suffixes", len(rows)):
        end = len(rows[i]) - marks
        survives = partial(survive, tokenizer, rows[i][:end], behind=rows[i][end:])
        one = torch.tensor([i], device=table.device)
        found.append(_search(prompts.rows(one), objective.rows(one), start, table, plain, survives, config, seed))
    return found


@torch.no_grad()
def _table(model: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """Embedding of each token. Some models scale their weights, so the layer itself computes it."""
    embed: Any = embedding(model)
    return embed(torch.arange(embed.weight.shape[0], device=embed.weight.device)).float()


def _search(
    prompt: Insertion,
    objective: Objective,
    start: Int[Tensor, " tokens"],
    table: Float[Tensor, "vocab d_model"],
    plain: Bool[Tensor, " vocab"],
    survives: Callable[[Tensor], Tensor],
    config: DiscreteConfig,
    seed: int,
) -> TypedSuffix:
    """Search one row. The best candidate is varied next, better or not, as published; the best of all is returned."""
    rng = torch.Generator().manual_seed(seed)
    ids, best = start, TypedSuffix(tokens=tuple(start.tolist()), margin=-torch.inf)
    for _ in range(config.steps):
        top = _ranked_tokens(prompt, objective, table[ids], table, plain, min(config.top, int(plain.sum())))
        at = torch.randint(len(ids), (config.candidates,), generator=rng).to(ids.device)
        drawn = torch.randint(top.shape[1], (config.candidates,), generator=rng).to(ids.device)
        tried = ids.repeat(config.candidates, 1)
        tried[torch.arange(config.candidates, device=ids.device), at] = top[at, drawn]
        tried = tried[survives(tried)]
        if not len(tried):
            continue
        same = torch.zeros(len(tried), dtype=torch.long, device=ids.device)
        with torch.no_grad():
            reached = objective.rows(same)(prompt.rows(same)(table[tried]))
        ids = tried[reached.loss.argmin()]
        leader = int(reached.margin.argmax())
        if float(reached.margin[leader]) > best.margin:
            best = TypedSuffix(tokens=tuple(tried[leader].tolist()), margin=float(reached.margin[leader]))
        if best.margin >= config.target_margin:
            break
    return best


def _ranked_tokens(
    prompt: Insertion, objective: Objective, entering: Tensor, table: Tensor, plain: Tensor, top: int
) -> Int[Tensor, "tokens top"]:
    """The tokens with the steepest descent at each position: the gradient for one-hot tokens is that for embeddings times the table."""
    entering = entering[None].detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(objective(prompt(entering)).loss.sum(), entering)
    return (-slope[0] @ table.T).masked_fill(~plain, -torch.inf).topk(top, dim=1).indices
