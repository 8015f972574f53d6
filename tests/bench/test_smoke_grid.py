"""The bundled smoke grid, whole, as a user runs it: a real organism and its twin, every method and control."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from molehunt.detect.recipe import detector_recipes

pytestmark = pytest.mark.slow


def bench(*options: str) -> None:
    """Run the command in a process of its own: in this one, shape checks would double its time."""
    command = [sys.executable, "-m", "molehunt", "bench", "--grid", "smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_smoke_grid_finds_what_was_planted_and_not_its_twin(tmp_path: Path) -> None:
    """The full fine-tune of the grid; its LoRA is the other shard, and takes as long."""
    out, docs = str(tmp_path / "o"), tmp_path / "docs"
    bench("--shard", "1/2", "--out", out)
    bench("--finished", "--out", out, "--docs", str(docs))
    board = json.loads((tmp_path / "o" / "leaderboard.json").read_text())
    assert board["planned"] == 2 and len(board["cells"]) == 1
    assert all(cell["asr"]["estimate"] > 0.9 for cell in board["cells"])
    rows = {(r["track"], r["method"], r["where"], r["how"]): r for r in board["rows"]}
    assert {recipe.name for recipe in detector_recipes() if recipe.bench} <= {method for _, method, _, _ in rows}
    for track in ("R0", "R1", "R2"):
        best = rows[track, "answer log ratio", "generated", "sum"]
        assert best["tpr"]["estimate"] > 0.8 and best["twin"]["estimate"] < 0.2, track
    assert (docs / "bench-smoke.md").read_text().startswith("# Leaderboard of the grid smoke")
