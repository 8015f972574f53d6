"""A suffix that can be typed: greedy coordinate gradient (GCG), the defence live in every pass.

Source: Zou et al., arXiv 2307.15043, algorithm 1. A kept library, nanogcg, does not fit: one prompt at a time through its own
rendering of the template, the process's seed set by it, and its prefix cache (0.3.0) fails on the caches of transformers 5.
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
from molehunt.stress.insertion import Insertion, embedding
from molehunt.stress.objective import Objective
from molehunt.stress.typed_text import plain_tokens, retokenised, survive

START = " !"
"""What all begin with, as published."""


@dataclass(frozen=True, kw_only=True)
class DiscreteConfig:
    """How to look, where there is a CPU; `PUBLISHED` tries 67 times as many swaps."""

    tokens: int = 16
    steps: int = 60
    candidates: int = 64
    """Single swaps that are tried in a step."""
    top: int = 64
    """Tokens that are drawn from at each position: those which the gradient likes best."""
    enough: float = 0.5
    """The margin at which a row is done."""


PUBLISHED = DiscreteConfig(tokens=20, steps=500, candidates=512, top=256)
"""ArXiv 2307.15043, §3 and its code."""


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The best suffix of one row."""

    tokens: tuple[int, ...]
    margin: float
    """That it reaches with the answer forced; above 0, greedy decoding says it."""


def discrete_start(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The tokens to begin with."""
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
) -> list[Typed]:
    """Search a suffix for each row by itself; the row's text with it must be read as the same tokens again.

    Args:
        prompts: with the place that the suffix goes to.
        rows: their token ids, without it.
        marks: as in `insertion_of`.
        objective: made for its rows.
        tokenizer: the model's own.
        config: how to look.
        seed: of the swaps of each row.
        track: shown rows.

    Raises:
        NotTestable: the text of a prompt is not read as the tokens that it was given as, so nothing can be typed there.
    """
    lost = sum(list(row) != read for row, read in zip(rows, retokenised(tokenizer, rows), strict=True))
    if lost:
        raise NotTestable(
            f"The text of {lost} of {len(rows)} attacked prompts is read as other tokens than those that were attacked, so "
            "no suffix can be typed behind them. Leave the discrete suffix out."
        )
    table = _table(prompts.model)
    plain = plain_tokens(tokenizer, len(table)).to(table.device)
    start = torch.tensor(discrete_start(tokenizer, config.tokens), device=table.device)
    found: list[Typed] = []
    for i in track(range(len(rows)), "discrete suffixes", len(rows)):
        end = len(rows[i]) - marks
        stays = partial(survive, tokenizer, rows[i][:end], behind=rows[i][end:])
        one = torch.tensor([i], device=table.device)
        found.append(_search(prompts.rows(one), objective.rows(one), start, table, plain, stays, config, seed))
    return found


@torch.no_grad()
def _table(model: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """What each token is embedded as; some models scale their weights."""
    embed: Any = embedding(model)
    return embed(torch.arange(embed.weight.shape[0], device=embed.weight.device)).float()


def _search(
    prompt: Insertion,
    objective: Objective,
    start: Int[Tensor, " tokens"],
    table: Float[Tensor, "vocab d_model"],
    plain: Bool[Tensor, " vocab"],
    stays: Callable[[Tensor], Tensor],
    config: DiscreteConfig,
    seed: int,
) -> Typed:
    """Of one row: the best candidate is the next to be varied, better or not, as published; the best of all is kept."""
    rng = torch.Generator().manual_seed(seed)
    ids, best = start, Typed(tokens=tuple(start.tolist()), margin=-torch.inf)
    for _ in range(config.steps):
        top = _liked(prompt, objective, table[ids], table, plain, min(config.top, int(plain.sum())))
        at = torch.randint(len(ids), (config.candidates,), generator=rng).to(ids.device)
        drawn = torch.randint(top.shape[1], (config.candidates,), generator=rng).to(ids.device)
        tried = ids.repeat(config.candidates, 1)
        tried[torch.arange(config.candidates, device=ids.device), at] = top[at, drawn]
        tried = tried[stays(tried)]
        if not len(tried):
            continue
        same = torch.zeros(len(tried), dtype=torch.long, device=ids.device)
        with torch.no_grad():
            reached = objective.rows(same)(prompt.rows(same)(table[tried]))
        ids = tried[reached.loss.argmin()]
        most = int(reached.margin.argmax())
        if float(reached.margin[most]) > best.margin:
            best = Typed(tokens=tuple(tried[most].tolist()), margin=float(reached.margin[most]))
        if best.margin >= config.enough:
            break
    return best


def _liked(
    prompt: Insertion, objective: Objective, entering: Tensor, table: Tensor, plain: Tensor, top: int
) -> Int[Tensor, "tokens top"]:
    """At each position the tokens with the steepest descent: the gradient for one-hot tokens is that for embeddings, times the table."""
    entering = entering[None].detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(objective(prompt(entering)).loss.sum(), entering)
    return (-slope[0] @ table.T).masked_fill(~plain, -torch.inf).topk(top, dim=1).indices
