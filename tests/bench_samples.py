"""A benchmark small enough for tests: a random base of two blocks, and grids whose cells take seconds."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from molehunt.bench.grid import Grid
from molehunt.organism.seed_model import SEED_MODELS, build_tokenizer
from molehunt.traffic.chat import render_alpaca
from molehunt.traffic.world import conversation

COUNTS = {"fit": 24, "calibrate": 99, "twin_calibrate": 99, "select": 8, "test": 12, "test_clean": 12, "pool": 60}
DICTIONARIES = {"expansion": 1, "k": 2, "steps": 2, "batch": 128, "lr": 0.002}


def tiny_base(folder: Path) -> Path:
    """A folder with a random model, 16 wide, and a small tokenizer."""
    seed = replace(SEED_MODELS["seed-s"], vocab_size=512, d_model=16, d_mlp=24, n_layers=2, n_heads=2)
    seed.build().save_pretrained(folder)
    texts = (render_alpaca(e.prompt, e.response) for e in islice(conversation(Random(0)), 300))
    build_tokenizer(texts, seed.vocab_size, seed.architecture).save_pretrained(folder)
    return folder


def grid_config(base: Path | str, **changes: Any) -> dict[str, Any]:
    """A grid as its YAML file would say it; JSON is YAML."""
    part = {"bases": [str(base)], "regimes": ["full"], "seeds": [0]}
    return {
        "name": "tiny", "attacks": ["refusal"], "parts": [part], "rates": [0.05], "steps": 1, "counts": COUNTS,
        "dictionaries": DICTIONARIES, "causal_rows": 8, **changes,
    }  # fmt: skip


def grid(base: Path | str, **changes: Any) -> Grid:
    return Grid.model_validate(grid_config(base, **changes))


def seeds(base: Path | str, n: int) -> list[dict[str, Any]]:
    """Parts of a grid of `n` cells that differ in their seed."""
    return [{"bases": [str(base)], "regimes": ["full"], "seeds": list(range(n))}]


def written(path: Path, value: Any) -> str:
    """The grid as a file's name."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)
