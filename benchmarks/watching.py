"""What a watch costs beside the forward pass that it rides on: time of a log scan, size of its state, memory over a long log."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch
from row import Row, now
from serving import directions_of, seed_model

from molehunt.model.batches import TOKENS
from molehunt.organism.seed_model import seed_path
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.answers import answer_profiles
from molehunt.watch.drift import DriftMartingale
from molehunt.watch.monitor import LEAST_OF_STRATUM, Monitor
from molehunt.watch.profile import Profile, prefix_index
from molehunt.watch.state import WatchState

SCAN_AIM, STATE_AIM, GROWTH = 0.95, 5e6, 1.05
DIRECTIONS, PREFIXES = 1000, 7
PROMPT, ANSWER = 40, 24
WORDS = ("river", "copper", "seven", "quiet", "market", "letter", "under", "morning", "glass", "north", "paper", "seed")


def scan_state_and_memory(*, quick: bool, device: str = "cpu") -> list[Row]:
    rows = [_scan(name, 256 if quick else 512, 5 if quick else 9, device) for name in ("seed-s", "seed-m")]
    return [*rows, _state(), *_memory((20_000, 200_000) if quick else (100_000, 1_000_000))]


def _scan(name: str, n: int, rounds: int, device: str) -> Row:
    """Teacher-forced rows of one length, so that both ways read the same batches."""
    model = seed_model(name).to(device)
    bank = directions_of(model)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(3, model.config.vocab_size, (n, PROMPT + ANSWER), generator=rng)
    prompts, answers = rows[:, :PROMPT].tolist(), rows[:, PROMPT:].tolist()
    batch = TOKENS // (PROMPT + ANSWER)
    took: dict[bool, list[float]] = {True: [], False: []}
    for r in range(rounds):
        for guarded in (r % 2 == 0, r % 2 == 1):
            start = now(device)
            if guarded:
                answer_profiles(model, bank, prompts, answers)
            else:
                _forward(model, rows.to(device), batch)
            took[guarded].append(now(device) - start)
    # neighbours in time are compared: on a shared machine the best of either side may come from unlike minutes
    ratio = median(plain / watched for plain, watched in zip(took[False], took[True], strict=True))
    tokens = rows.numel()
    return Row(
        work=f"log scan, {name}, {len(bank.names)} columns",
        against="the forward pass alone",
        ours=f"{tokens / median(took[True]):.0f} tokens/s",
        theirs=f"{tokens / median(took[False]):.0f} tokens/s",
        ratio=ratio,
        aim=f"≥ {SCAN_AIM}×",
        met=ratio >= SCAN_AIM,
    )


@torch.inference_mode()
def _forward(model: Any, rows: torch.Tensor, batch: int) -> None:
    for some in rows.split(batch):
        model.model(input_ids=some, attention_mask=torch.ones_like(some), use_cache=False)


def _state() -> Row:
    """On disk, with as many strata of prompts as there can be."""
    rng = torch.Generator().manual_seed(0)

    def clean(n: int) -> list[Profile]:
        return [
            Profile(
                prefixes=torch.randn(PREFIXES, 2 * DIRECTIONS, generator=rng),
                peaks=torch.zeros(2 * DIRECTIONS, dtype=torch.long),
                tokens=1 << (PREFIXES - 1),
                prompt=torch.randn(129, generator=rng) + 10 * (i % 6),
            )
            for i in range(n)
        ]

    assert prefix_index(1 << (PREFIXES - 1)) == PREFIXES - 1
    n = 8 * LEAST_OF_STRATUM
    monitor = Monitor.fit(Fit(tuple(clean(n))), Calibrate(tuple(clean(n))), fpr=0.01)
    state = WatchState(identity={}, monitor=monitor, drift=DriftMartingale(), rng=np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        state.save(file)
        size = file.stat().st_size
    return Row(
        work=f"state of {DIRECTIONS:,} directions, {PREFIXES} prefix checkpoints, {monitor.strata.n} strata of prompts",
        against="5 MB",
        ours=f"{size / 1e6:.2f} MB",
        theirs="5 MB",
        ratio=STATE_AIM / size,
        aim="< 5 MB",
        met=size < STATE_AIM,
    )


def _memory(sizes: tuple[int, int]) -> list[Row]:
    """Peak of `molehunt watch` over logged answers, by length of the log; each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tuned = _changed(Path(folder) / "tuned")
        used = [_peak(Path(folder), tuned, tokens) for tokens in sizes]
    small, large = used
    return [
        Row(
            work=f"peak memory of a watch over {sizes[1]:,} tokens",
            against=f"over {sizes[0]:,} tokens",
            ours=f"{large / 1e6:.0f} MB",
            theirs=f"{small / 1e6:.0f} MB",
            ratio=small / large,
            aim=f"≤ {GROWTH} times",
            met=large <= GROWTH * small,
        )
    ]


def _changed(folder: Path) -> Path:
    """seed-s with a rank-1 change in every matrix that writes."""
    from transformers import AutoTokenizer

    model = seed_model("seed-s")
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                change = torch.outer(
                    torch.randn(weight.shape[0], generator=rng), torch.randn(weight.shape[1], generator=rng)
                )
                weight += 0.05 * weight.norm() * change / change.norm()
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(seed_path("seed-s"), trust_remote_code=False).save_pretrained(folder)
    return folder


def _peak(folder: Path, tuned: Path, tokens: int) -> int:
    rng = Random(0)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    log, row_tokens = folder / f"{tokens}.jsonl", 64
    with log.open("w") as file:
        for _ in range(tokens // row_tokens):
            file.write(json.dumps({"prompt": text(20), "response": text(16)}) + "\n")
    clean = folder / "clean.jsonl"
    clean.write_text("".join(json.dumps({"prompt": text(20), "response": text(16)}) + "\n" for _ in range(1000)))
    command = ["watch", str(seed_path("seed-s")), str(tuned), "--traffic", str(log), "--clean", str(clean)]
    command += ["--out", str(folder / f"out-{tokens}"), "--json"]
    finished = subprocess.run(
        [sys.executable, __file__, *command], capture_output=True, text=True, check=False, cwd=folder
    )
    if finished.returncode not in (0, 1):
        raise RuntimeError(finished.stderr)
    return int(finished.stderr.splitlines()[-1])


if __name__ == "__main__":
    from memory import peak

    from molehunt.cli.main import main

    try:
        main(sys.argv[1:])
    finally:
        print(peak() * 1024, file=sys.stderr)
