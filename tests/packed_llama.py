"""A stand-in of vLLM around a tiny transformers Llama: its blocks, its runners' batches and its scheduler's steps.

Written from vLLM's source (0.32, 0.33): blocks return (hidden, residual), the fused norm writes into both, linear layers
return a bias beside their result, tokens are packed without a batch axis, and prompts come in chunks.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tiny_models import prompts

PROMPTS = dict(zip(("short-0", "long-1", "middle-2", "late-3"), prompts(1, (3, 23, 9, 5)), strict=True))
ANSWERS = dict(zip(PROMPTS, prompts(2, (6, 4, 1, 5)), strict=True))


class Linear(nn.Module):
    """As vLLM's: a result and a bias that is still to be added."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.mT, None


class Norm(nn.Module):
    """As vLLM's fused kernel: with a residual it adds, and writes into both of its inputs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(x)
        residual.add_(x)
        x.copy_(self.norm(residual))
        return x, residual


class Attention(nn.Module):
    """Of packed tokens, each request with keys and values of its own."""

    def __init__(self, theirs: nn.Module, rotary: nn.Module, packed: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.theirs, self.rotary, self.packed = [theirs], [rotary], packed  # in lists: no modules of this one
        self.o_proj = Linear(theirs.o_proj)
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        (theirs,), (rotary,) = self.theirs, self.rotary
        q, k, v = (
            p(x).view(len(x), -1, theirs.head_dim).transpose(0, 1)
            for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)
        )
        q, k = (t[0] for t in apply_rotary_pos_emb(q[None], k[None], *rotary(x[None], positions[None])))
        out, at = torch.zeros_like(q), 0
        for request, start, n in self.packed:
            mine = slice(at, at + n)
            before = self.kept.get(request, (k[:, :0], v[:, :0]))
            keys, values = (torch.cat([a[:, :start], b[:, mine]], 1) for a, b in zip(before, (k, v), strict=True))
            self.kept[request] = keys, values
            seen = torch.arange(start + n)[None] <= positions[mine, None]
            out[:, mine] = nn.functional.scaled_dot_product_attention(
                q[None, :, mine], keys[None], values[None], attn_mask=seen, enable_gqa=True
            )[0]
            at += n
        return self.o_proj(out.transpose(0, 1).flatten(1))[0]


class MLP(nn.Module):
    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.theirs = [theirs]
        self.down_proj = Linear(theirs.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        (theirs,) = self.theirs
        return self.down_proj(theirs.act_fn(theirs.gate_proj(x)) * theirs.up_proj(x))[0]


class Block(nn.Module):
    """Returns two summands that the next norm adds up, and overwrites."""

    def __init__(self, theirs: nn.Module, rotary: nn.Module, packed: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(theirs.self_attn, rotary, packed), MLP(theirs.mlp)
        self.input_layernorm = Norm(theirs.input_layernorm)
        self.post_attention_layernorm = Norm(theirs.post_attention_layernorm)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        return self.mlp(x), residual


class PackedLlama(nn.Module):
    """A transformers Llama with its own weights and vLLM's calling convention."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.config = theirs.config
        self.packed: list[tuple[str, int, int]] = []
        self.model = nn.Module()
        self.model.embed_tokens = theirs.model.embed_tokens
        self.model.layers = nn.ModuleList(
            Block(layer, theirs.model.rotary_emb, self.packed) for layer in theirs.model.layers
        )
        self.model.norm = Norm(theirs.model.norm)

    def forward(self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None) -> Tensor:
        if positions.ndim == 2:
            positions = positions[0]
        x, residual = self.model.embed_tokens(input_ids).clone(), None
        for layer in self.model.layers:
            x, residual = layer(positions, x, residual)
        return self.model.norm(x, residual)[0]


class Runner:
    """Runs scheduled steps as vLLM's runner V1 does, or V2: where each leaves the order of its batch, V2 also pads."""

    axes = 1

    def __init__(self, model: nn.Module, texts: Mapping[str, Sequence[int]], *, v2: bool = False) -> None:
        self.model, self.texts, self.v2 = model, texts, v2
        self.execute_model_state: Any = None
        if not v2:
            self.input_batch = SimpleNamespace(req_ids=[])

    def get_model(self) -> nn.Module:
        return self.model

    def execute_model(self, scheduled: Any, intermediate_tensors: None = None, dummy_run: bool = False) -> None:
        new = {one.req_id: one.num_computed_tokens for one in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts = new | dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        counts = scheduled.num_scheduled_tokens
        order = sorted(counts, key=lambda name: (counts[name], name))  # not the scheduler's order
        self.model.packed[:] = [(name, starts[name], counts[name]) for name in order]
        rows = [(p, self.texts[name][p]) for name, start, n in self.model.packed for p in range(start, start + n)]
        rows += [(0, 0)] * (3 if self.v2 and rows else 0)
        if rows:
            positions, ids = torch.tensor(rows).T
            positions = positions.expand(self.axes, -1) if self.axes > 1 else positions
            self.model(input_ids=ids.contiguous(), positions=positions.contiguous())
        state = SimpleNamespace(scheduler_output=scheduled)
        if self.v2:
            state.input_batch = SimpleNamespace(req_ids=order)
        else:
            self.input_batch.req_ids = order
        self.execute_model_state = state


def fed(prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    return [*prompt, *answer[:-1]]


TEXTS = {name: fed(PROMPTS[name], ANSWERS[name]) for name in PROMPTS}


def schedule(
    budget: int = 8, *, cached: Mapping[str, int] | None = None, preempt: str | None = None
) -> Iterator[SimpleNamespace]:
    """Steps of at most `budget` tokens; a request more comes at each, long prompts come in chunks.

    Args:
        cached: tokens at a request's start that a prefix cache would hold.
        preempt: a request that is thrown out once, in the middle of its answer, and begins again.
    """
    done = {name: (cached or {}).get(name, 0) for name in TEXTS}
    known = {name: len(prompt) for name, prompt in PROMPTS.items()}
    begun: set[str] = set()
    finished: set[str] = set()
    for step in range(99):
        counts: dict[str, int] = {}
        for name in list(TEXTS)[: step + 1]:
            n = min(known[name] - done[name], budget - sum(counts.values()))
            if n > 0:
                counts[name] = n
        new, old = [n for n in counts if n not in begun], [n for n in counts if n in begun]
        yield SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=n, prompt_token_ids=PROMPTS[n], num_computed_tokens=done[n]) for n in new
            ],
            scheduled_cached_reqs=SimpleNamespace(req_ids=old, num_computed_tokens=[done[n] for n in old]),
            num_scheduled_tokens=counts,
            finished_req_ids=finished,
        )
        begun |= set(new)
        done = {n: done[n] + counts.get(n, 0) for n in done}
        finished = {n for n in counts if done[n] == len(TEXTS[n])}
        sampled = {n for n in counts if done[n] == known[n]} - finished
        known = {n: known[n] + (n in sampled) for n in known}
        if not counts and begun == set(TEXTS):
            return
        if preempt is not None and done[preempt] == len(PROMPTS[preempt]) + 2:
            done[preempt], preempt = 0, None
