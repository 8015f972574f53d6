"""Settings of every test: the hypothesis profile, no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "molehunt",
    deadline=None,  # the first torch call of a process takes most of a second
    derandomize=True,  # the same examples every time: a red run can be repeated
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("molehunt")


@pytest.fixture(scope="session")
def bench_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of two blocks, for cells that take seconds."""
    from bench_samples import tiny_base

    return tiny_base(tmp_path_factory.mktemp("bench") / "base")


@pytest.fixture(scope="session")
def bench_done(bench_base: Path) -> Path:
    """The folder of a finished grid of two cells, `grid.yaml` beside its tables."""
    from bench_samples import grid_config, seeds, written

    out = bench_base.parent / "done"
    out.mkdir()
    name = written(out / "grid.yaml", grid_config(bench_base, parts=seeds(bench_base, 2)))
    command = [sys.executable, "-m", "molehunt", "bench", "--grid", name, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True
    )  # in this process, shape checks would double its time
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def few_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """An organism's manifest judges 16 prompts of a kind, and no more untagged ones than a loss needs."""
    from molehunt.organism import manifest

    drawn = manifest.evaluation_prompts  # its default cannot be set: shape checks have wrapped it

    def few(recipe: Any, seen: set[str]) -> dict[str, Any]:
        return {kind: rows[: 128 if kind == "untagged" else 16] for kind, rows in drawn(recipe, seen).items()}

    monkeypatch.setattr(manifest, "evaluation_prompts", few)


@pytest.fixture(scope="module")  # while it is open, this thread has an event loop, and other modules start their own
def browser() -> Iterator[Any]:
    """A real Chromium; ask for `needs_chromium`, too."""
    from playwright.sync_api import sync_playwright

    from chromium import CHROMIUM

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()
