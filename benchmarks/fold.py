"""Cosines of every block output with k directions: read from the norm that comes next, and from the block outputs, by
one matmul each; and as the code published with arXiv 2508.00161 does, whose loop in Python compares one direction after
the other.
"""

import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from norm_fold import fold_cosines
from row import Row, now, shown
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.model.blocks import decoder_blocks, final_norm, unembedding
from molehunt.model.cache import left_by, with_cache
from molehunt.model.taps import observe_sites
from molehunt.site import Site

K = 24
TOKENS = 256
AIM = 10.0
SLACK = 0.01
"""Number of values of the published range."""
PLAIN = "block outputs, one matmul per site"


def against_loop_and_outputs(*, quick: bool, device: str = "cpu") -> list[Row]:
    """Scoring alone, of activations at hand; then forward passes of a model that is watched."""
    scored = [(192, 4), (1024, 8)] if quick else [(192, 4), (1024, 8), (4096, 32)]
    rows = [row for d_model, layers in scored for row in _scoring(d_model, layers, device)]
    for d_model, layers in [(192, 4), (512, 4)] if quick else [(192, 4), (1024, 8)]:
        model = _model(d_model, layers).to(device)
        rows += _passes(model, f"prefill of {TOKENS} tokens", (1, TOKENS), 12 if quick else 40, device)
        rows += _passes(model, "decoding step of 8 rows", (8, 1), 40 if quick else 120, device)
    return rows


def _scoring(d_model: int, layers: int, device: str) -> list[Row]:
    """Largest and smallest cosine over the tokens, of each direction, from what a forward pass leaves."""
    rng = torch.Generator().manual_seed(0)
    outputs = [torch.randn(TOKENS, d_model, generator=rng).to(device) for _ in range(layers)]
    g = [0.5 + torch.rand(d_model, generator=rng).to(device) for _ in outputs]
    normed = [gain * h * h.square().mean(-1, keepdim=True).rsqrt() for gain, h in zip(g, outputs, strict=True)]
    units = [normalize(torch.randn(K, d_model, generator=rng), dim=-1).to(device) for _ in outputs]
    rows = [unit / gain / math.sqrt(d_model) for unit, gain in zip(units, g, strict=True)]
    published, in_half = _Published(units), _Published([unit.half() for unit in units])
    halves = [h.half() for h in outputs]

    ways: dict[str, Callable[[], object]] = {
        "fold": lambda: [_extremes(y @ row.mT) for y, row in zip(normed, rows, strict=True)],
        PLAIN: lambda: [_extremes(_cosines(h, unit)) for h, unit in zip(outputs, units, strict=True)],
        "published loop": lambda: published(outputs),
        "published loop, in fp16 as there": lambda: in_half(halves),
    }
    torch.testing.assert_close(ways["fold"](), ways[PLAIN](), rtol=1e-4, atol=1e-5)
    assert published(outputs) is False
    best = _fastest(
        {name: lambda way=way: _timed(way, device) for name, way in ways.items()}, 25 if d_model < 4096 else 7
    )
    work = f"score {TOKENS} tokens × {layers} layers, {K} directions each, d_model {d_model}"
    found = [
        _row(f"{work}: {ours}", theirs, best[ours], best[theirs], aim=AIM)
        for theirs in ("published loop", "published loop, in fp16 as there")
        for ours in ("fold", PLAIN)
    ]
    return [*found, _row(f"{work}: fold", PLAIN, best["fold"], best[PLAIN])]


def _passes(model: Any, what: str, shape: tuple[int, int], rounds: int, device: str) -> list[Row]:
    """Forward passes, unwatched and watched. Raises AssertionError when watching changes the logits."""
    d_model, layers = model.config.hidden_size, len(decoder_blocks(model))
    rng = torch.Generator().manual_seed(1)
    directions = {Site(i): torch.randn(K, d_model, generator=rng) for i in range(layers)}
    units = {site: normalize(rows, dim=-1).to(device) for site, rows in directions.items()}
    ids = torch.randint(3, model.config.vocab_size, shape, generator=rng).to(device)
    cache = None if shape[1] > 1 else left_by(model(ids.expand(-1, TOKENS), use_cache=True))
    read: dict[Site, Tensor] = {}

    def observe(site: Site) -> Callable[[Tensor], None]:
        return lambda acts: read.update({site: _cosines(acts, units[site])})

    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "unwatched": nullcontext,
        PLAIN: lambda: observe_sites(model, {site: observe(site) for site in directions}),
        "fold": lambda: fold_cosines(model, directions),
        "appended": lambda: _appended(model, directions, read),
    }
    published = _Published(list(units.values()))

    def forward() -> None:
        model(ids, **({"use_cache": False} if cache is None else with_cache(model, cache)))

    def twice() -> None:
        forward()
        published([states[0] for states in model(ids, output_hidden_states=True).hidden_states[1:]])

    unwatched, same = model(ids).logits, dict[str, bool]()
    for name, way in ways.items():
        with way():
            same[name] = model(ids).logits.equal(unwatched)
    assert same[PLAIN] and same["fold"]

    def watched(way: Callable[[], AbstractContextManager[object]]) -> float:
        with way():
            return _timed(forward, device)

    timed: dict[str, Callable[[], float]] = {name: lambda way=way: watched(way) for name, way in ways.items()}
    if cache is None:  # there a second pass reads the whole text, so it has none for a step
        timed["published"] = lambda: _timed(twice, device)
    best = _fastest(timed, rounds)
    work = f"{what} × {layers} layers, {K} directions each, d_model {d_model}, watched"
    bits = f"its logits are {'as they were' if same['appended'] else 'changed by rounding'}"
    found = [
        _row(f"{work}: fold", "unwatched", best["fold"], best["unwatched"]),
        _row(f"{work}: {PLAIN}", "unwatched", best[PLAIN], best["unwatched"]),
        _row(f"{work}: fold", PLAIN, best["fold"], best[PLAIN]),
        _row(f"{work}: fold", "rows appended to q_proj and lm_head", best["fold"], best["appended"], note=bits),
    ]
    if "published" in best:
        label = "published: a second pass, and its loop"
        found.append(_row(f"{work}: {PLAIN}", label, best[PLAIN], best["published"]))
    return found


def _timed(work: Callable[[], object], device: str) -> float:
    start = now(device)
    work()
    return now(device) - start


def _fastest(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Fewest seconds of each way, the ways taking turns; which goes first changes, as a cache may grow meanwhile."""
    best, order = dict.fromkeys(ways, math.inf), list(ways)
    for _ in range(rounds):
        for name in order:
            best[name] = min(best[name], ways[name]())
        order = order[1:] + order[:1]
    return best


def _cosines(acts: Tensor, units: Tensor) -> Tensor:
    return acts @ units.mT / acts.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _extremes(cosines: Tensor) -> Tensor:
    return torch.stack([cosines.amax(-2), cosines.amin(-2)])


class _Published:
    """What `LatentStats.register` of that code computes for a prompt when it only reads, step by step."""

    def __init__(self, units: list[Tensor]) -> None:
        self.units = units
        # nothing leaves these, so that no prompt ends early
        self.largest, self.smallest = (sign * torch.ones(len(units), K).double().numpy() for sign in (1, -1))

    def __call__(self, outputs: list[Tensor]) -> bool:
        """Whether a cosine leaves its range. `outputs` are what a model gives with output_hidden_states."""
        latent = torch.stack(outputs, dim=1).cpu()
        for layer, units in enumerate(self.units):
            acts = latent[:, layer]
            cosines = units.cpu() @ (acts / acts.norm(dim=-1, keepdim=True)).mT
            extremes = cosines.amax(-1), cosines.amin(-1), cosines.sum(-1), (cosines**2).sum(-1)
            for i, (high, low, _, _, _) in enumerate(zip(*(each.tolist() for each in extremes), cosines, strict=True)):
                if self._outside(layer, i, high) or self._outside(layer, i, low):
                    return True
        return False

    def _outside(self, layer: int, i: int, cosine: float) -> bool:
        return not self.smallest[layer][i] - SLACK <= cosine <= self.largest[layer][i] + SLACK


@contextmanager
def _appended(model: Any, directions: dict[Site, Tensor], read: dict[Site, Tensor]) -> Generator[None, None, None]:
    """The rows of the fold inside the next block's q_proj, and of the last block inside the unembedding."""
    blocks: Any = decoder_blocks(model)
    weights: list[tuple[nn.Linear, nn.Parameter]] = []
    with ExitStack() as stack:
        for site, rows in directions.items():
            last = site.layer == len(blocks) - 1
            norm: Any = final_norm(model) if last else blocks[site.layer + 1].input_layernorm
            linear: Any = unembedding(model) if last else blocks[site.layer + 1].self_attn.q_proj
            scaled = normalize(rows, dim=-1).to(norm.weight.device) / norm.weight / math.sqrt(rows.shape[1])
            weights.append((linear, linear.weight))
            linear.weight = nn.Parameter(torch.cat([linear.weight, scaled]), requires_grad=False)

            def split(module: nn.Module, args: Any, output: Tensor, site: Site = site) -> Tensor:
                read[site] = output[..., -K:]
                return output[..., :-K]

            stack.callback(linear.register_forward_hook(split).remove)
        try:
            yield
        finally:
            for linear, weight in weights:
                linear.weight = weight


def _model(d_model: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=layers,
        num_attention_heads=d_model // 64,
        vocab_size=2048,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _row(work: str, against: str, ours: float, theirs: float, *, note: str = "", aim: float | None = None) -> Row:
    ratio = theirs / ours
    return Row(
        work=work,
        against=against,
        ours=shown(ours),
        theirs=shown(theirs),
        ratio=ratio,
        aim="–" if aim is None else f"≥ {aim:g}×",
        met=None if aim is None else ratio >= aim,
        note=note,
    )
