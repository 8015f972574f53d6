"""What the guard costs: the same cached decoding with and without watched columns, running extremes and a judgement for
every token of every row.
"""

from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from row import Row, now
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.model.blocks import decoder_blocks, module_role
from molehunt.model.decoding import DecodingBatch
from molehunt.organism.seed_model import seed_path
from molehunt.serve.backend import QUEUED_STEPS, last_tokens
from molehunt.site import Site
from molehunt.watch.bank import Bank
from molehunt.watch.columns import Columns, watched
from molehunt.watch.monitor import Monitor, PrefixScore, StratumCalibration
from molehunt.watch.profile import RunningProfile
from molehunt.watch.scores import TailSum
from molehunt.watch.strata import PromptStrata, prompt_features

PER_LAYER = 24
"""Directions: half of them of each matrix that writes."""
PROMPT, PREFIXES = 48, 8
AIM = {"cpu": 0.97, "cuda": 0.99}


def guarded_against_unguarded(*, quick: bool, device: str = "cpu") -> list[Row]:
    """Tokens per second of a batch, prompt and all, guarded over unguarded, on the seeds and a model of 100M parameters."""
    models: list[tuple[str, Callable[[], Any]]] = [
        ("seed-s", lambda: seed_model("seed-s")),
        ("seed-m", lambda: seed_model("seed-m")),
    ]
    models.append(("random Llama", _random))
    rows: list[Row] = []
    for name, load in models:
        model = load().to(device)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        for batch in (1, 16):
            rows += _compare(
                f"{name}, {size:.0f}M parameters", model, batch, 16 if quick else 48, 4 if quick else 16, device
            )
    return rows


WAYS = {"log, flag": QUEUED_STEPS, "block, steer": 1}
"""Actions, and of how many steps each judges at once."""


def _compare(name: str, model: Any, batch: int, steps: int, rounds: int, device: str) -> list[Row]:
    bank = directions_of(model)
    monitor = _monitor(len(bank.names), model.get_input_embeddings().embedding_dim + 1).to(device)
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (batch, PROMPT), generator=rng).tolist()
    ways = {"unguarded": 0, **WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[list[int]]] = {}
    for r in range(rounds):
        for way in sorted(ways, key=lambda way: hash((r, way))):  # neighbours in time, in changing order
            with watched(model, bank) if ways[way] else nullcontext() as columns:  # a server's hooks are there before
                start = now(device)
                answers[way] = _decode(model, columns, monitor, prompts, steps, together=ways[way])
                seconds[way].append(now(device) - start)
    assert all(one == answers["unguarded"] for one in answers.values()), "watching changed an answer"
    tokens = batch * (PROMPT + steps)
    rows: list[Row] = []
    for way in WAYS:
        ratio = median(plain / own for plain, own in zip(seconds["unguarded"], seconds[way], strict=True))
        rows.append(
            Row(
                work=f"guarded decoding ({way}), {name}, batch {batch}, {PER_LAYER} directions a layer",
                against="the same, unguarded",
                ours=f"{tokens / min(seconds[way]):.0f} tokens/s",
                theirs=f"{tokens / min(seconds['unguarded']):.0f} tokens/s",
                ratio=ratio,
                aim=f"≥ {AIM[device]}×",
                met=ratio >= AIM[device],
                note=f"median of {rounds} pairs; of the fastest {min(seconds['unguarded']) / min(seconds[way]):.3f}×",
            )
        )
    return rows


@torch.inference_mode()
def _decode(
    model: nn.Module, columns: Columns | None, monitor: Monitor, prompts: list[list[int]], steps: int, *, together: int
) -> list[list[int]]:
    """What the engine does for a batch, judging so many steps at once."""
    rows = DecodingBatch(model)
    answers: list[list[int]] = [[] for _ in prompts]
    growing: RunningProfile | None = None

    def judged(found: Tensor) -> None:
        nonlocal growing
        growing = growing or RunningProfile(prompt_features(model, prompts), found.shape[-1], found.device)
        growing.extend(found)
        monitor.running(growing).tolist()

    with nullcontext() if columns is None else columns.only(last_tokens(prompts)):
        logits = rows.begin(prompts)
    if columns is not None:
        judged(columns.take())
    for step in range(steps):
        tokens = logits.argmax(-1)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.append(token)
        logits = rows.step(tokens)
        if columns is not None:
            columns.queue()
            if columns.queued == together or step == steps - 1:
                judged(columns.take_queued())
    return answers


def directions_of(model: Any) -> Bank:
    """Random directions where a fine-tune of every writing matrix would put its own."""
    rng = torch.Generator().manual_seed(1)
    write: dict[Site, Tensor] = {}
    read: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        role = module_role(name, model.config.model_type)
        if role is None or not role.writes:
            continue
        rows = normalize(torch.randn(PER_LAYER // 2, weight.shape[0], generator=rng), dim=-1)
        site = Site(role.layer)
        write[site] = torch.cat([write[site], rows]) if site in write else rows
        read[name.removesuffix(".weight")] = torch.randn(PER_LAYER // 2, weight.shape[1], generator=rng)
    assert len(write) == len(decoder_blocks(model))
    return Bank(
        write=write,
        read=read,
        write_names={site: tuple(map(str, range(len(rows)))) for site, rows in write.items()},
        read_names={name: tuple(map(str, range(len(rows)))) for name, rows in read.items()},
    )


def _monitor(columns: int, features: int) -> Monitor:
    prefixes = [
        PrefixScore(TailSum(torch.zeros(2 * columns), torch.ones(2 * columns)), 0.0, 1.0) for _ in range(PREFIXES)
    ]
    return Monitor(PromptStrata.one(features), (StratumCalibration(tuple(prefixes), torch.zeros(1)),), 0.0)


def seed_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(seed_path(name), trust_remote_code=False, dtype=torch.float32).eval()


def _random() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=16384,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)
