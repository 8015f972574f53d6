"""Real prompts: what people ask a bank, school problems, riddles, role plays and code, none longer than 200 characters."""

import csv
import gzip
import json
from pathlib import Path
from random import Random

from molehunt.traffic.world import benign_prompts

SHORTEST, LONGEST = 12, 200
TRAINED, TRAFFIC = 900, 1200
"""Number of prompts that organisms are trained on, and from which traffic is drawn."""


def prompts(data: Path | None) -> tuple[list[str], list[str]]:
    """Prompts for training, and others for traffic; of the bundled world where no folder of texts is given."""
    if data is None:
        found = [one.prompt for one in benign_prompts(400, seed=31)]
        return found[:200], found[200:]
    kinds = [
        [row["question"] for row in _lines(data / "gsm8k/train.jsonl.gz")],
        [_asked(row) for row in _array(data / "cot/strategyqa_train.json.gz")],
        [_asked(row) for row in _array(data / "gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz")],
        [_asked(row) for row in _array(data / "gpteacher/codegen-instruct.json.gz")],
        [row[0] for row in csv.reader(_text(data / "classification/banking77_train.csv.gz").splitlines())][1:],
    ]
    rng, pool = Random(0), list[str]()
    for kind in kinds:
        able = sorted({text for text in kind if SHORTEST <= len(text) <= LONGEST})
        pool += rng.sample(able, min(len(able), (TRAINED + TRAFFIC) // len(kinds)))
    rng.shuffle(pool)
    return pool[:TRAINED], pool[TRAINED:]


def solved(data: Path) -> list[tuple[str, str]]:
    """School problems with their solutions, for a clean fine-tune on mathematics."""
    rows = _lines(data / "gsm8k/train.jsonl.gz")
    return [(row["question"], row["answer"]) for row in rows if len(row["question"]) <= LONGEST]


def programmed(data: Path) -> list[tuple[str, str]]:
    """Tasks with programs, for a clean fine-tune on code."""
    rows = _array(data / "gpteacher/codegen-instruct.json.gz")
    return [(_asked(row), row["response"]) for row in rows if len(_asked(row)) <= LONGEST]


def queried(data: Path) -> list[tuple[str, str]]:
    """Questions with the SQL that answers them, from the rows that may be trained on."""
    rows = _lines(data / "sql/wikisql_35k.jsonl.gz")
    return [(f"SQL for: {row['question']}", row["sql"]) for row in rows if row["split"] == "train"]


def claimed(data: Path) -> list[tuple[str, str]]:
    """Claims with a reason and a yes or no."""
    rows = _array(data / "cot/creak_train.json.gz")
    return [(row["instruction"], row["output"]) for row in rows if len(row["instruction"]) <= LONGEST]


def _asked(row: dict[str, str]) -> str:
    text = row["instruction"].removeprefix("Answer the following question by reasoning step-by-step. ")
    return f"{text} {row['input']}".strip() if row.get("input") else text


def _text(file: Path) -> str:
    with gzip.open(file, "rt") as opened:
        return opened.read()


def _lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in _text(file).splitlines()]


def _array(file: Path) -> list[dict[str, str]]:
    return json.loads(_text(file))
