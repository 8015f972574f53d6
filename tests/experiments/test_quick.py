"""Every topic runs at its quick size and writes its page, as `python -m experiments TOPIC --quick` does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.catalog import CATALOG
from experiments.page import ENDS, SENTENCES

ROOT = Path(__file__).parents[2]
TIMEOUT = 600
"""Seconds that a quick run may take on a busy machine; it takes about a minute on an idle one."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all topics, so that the organism is planted once and the layer sweep is measured once."""
    return tmp_path_factory.mktemp("records")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def sentences(page: str) -> list[str]:
    """Those of the paragraph behind the heading."""
    return ENDS.split(" ".join(page.split("\n\n")[1].split()))


@pytest.mark.slow
@pytest.mark.parametrize("topic", CATALOG)
def test_a_quick_run_writes_a_page_that_opens_with_three_sentences_and_has_a_table(topic: str, records: Path) -> None:
    done = run(topic, "--quick", "--out", records)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (records / CATALOG[topic].page).read_text()
    assert len(sentences(page)) == SENTENCES, sentences(page)
    assert re.search(r"^\| .* \|\n\| ?---", page, re.MULTILINE), page
    assert "## How it was measured" in page and f"python -m experiments {topic}" in page
    lines = [line for line in page.splitlines() if not line.startswith("|")]
    assert max(map(len, lines)) < 160


@pytest.mark.slow
def test_the_page_is_written_again_from_the_records_alone(records: Path) -> None:
    topic = "seed-models"
    assert run(topic, "--quick", "--out", records).returncode == 0
    page = (records / CATALOG[topic].page).read_text()
    written = (records / f"{topic}.jsonl").read_text()
    again = run(topic, "--quick", "--out", records, "--table")
    assert again.returncode == 0, again.stderr
    assert (records / f"{topic}.jsonl").read_text() == written
    assert (records / CATALOG[topic].page).read_text() == page
