"""The page on what is read: how many cells work, what does not and why, and the tables."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.page import counted, grid, page
from experiments.setting import Setting
from experiments.what_is_read.case import COMMANDS
from experiments.what_is_read.check_models import LOGGED
from experiments.what_is_read.command import PLAN
from experiments.what_is_read.measure import DEEP, SAVINGS
from experiments.what_is_read.zoo import NO_DECODER, WIDTH, WRAPPED

MARKS = {"works": "✓", "NOT TESTABLE": "?", "refused": "–", "WRONG": "✗"}
LIKE_SINGLE = {saving.name for saving in SAVINGS if saving.like_single}
WIDE = 7
"""Ways of saving in one table of architectures."""
LONGEST_REASON = 100
ENCODER = "encoders and encoder–decoders do not continue one text"
HOW = """\
Each architecture is a tiny random model of three blocks and width {width}. The fine-tune is the model with a planted change of rank 1 \
in each matrix of block 1 that writes to the residual stream, one expert's among them; its singular values are known. Both are written \
to folders by transformers and PEFT themselves, and the real commands are run on the folders.

- `files` is right when it has no finding where only weights differ, none for a copy of the base saved in the same way as the fine-tune, \
and a finding or a refusal where loaders would not find the weights.
- `directions` is right when it names exactly the changed matrices, each with its largest singular value to 1 in 1,000 (2 in 100 for \
bf16), and none for the unchanged copy.
- `read` is `ModelPair.load`, with which audit, watch, stress and serve load models: it is right when the logits of both sides are those \
of the models in memory, and those that transformers and PEFT load.
- `audit` is right when it comes to a verdict and writes its report, and `watch` when it is calibrated and judges each of {rows} rows. The \
same weights saved in another way must give the same threshold and the same scores. \
Audits have {clean} clean prompts and {logged} rows of traffic. Both are run for all architectures in three ways of saving, and for \
{deep} in all.

A refusal counts as right only where the way of saving leaves no choice: names that no loader finds, pickles, layouts that need a package \
or a GPU, and models that are no decoders.

Written by `python -m experiments what-is-read`; the command ends with exit code 1 if a cell is wrong. One architecture: `python -m experiments what-is-read --only NAME`.
"""


class Entry(NamedTuple):
    """One cell with its place."""

    architecture: str
    saving: str
    command: str
    status: str
    why: str
    output: str


def entries(found: Mapping[str, dict[str, Any]]) -> Iterator[Entry]:
    """Every cell, in the order of the page; one that measured something else than `single` on the same weights is wrong."""
    for architecture, savings in found.items():
        for saving, cells in savings.items():
            for command, cell in cells.items():
                status, why = cell["status"], cell["why"]
                single = savings.get("single", {}).get(command, {})
                if saving in LIKE_SINGLE and status == single.get("status") == "works" and not agree(cell, single):
                    status, why = "WRONG", "it measures something else than on the same weights in a single file"
                yield Entry(architecture, saving, command, status, why, cell["output"])


def agree(cell: Mapping[str, Any], single: Mapping[str, Any]) -> bool:
    """Whether what was measured on the models is the same."""
    ours, theirs = cell["numbers"], single["numbers"]
    return len(ours) == len(theirs) and all(
        math.isclose(*pair, rel_tol=1e-2, abs_tol=1e-3) for pair in zip(ours, theirs, strict=True)
    )


def failures(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """Every wrong cell in a paragraph, with what the command printed."""
    return [
        f"{one.architecture} / {one.saving} / {one.command}: {one.why}\n{one.output}"
        for one in entries(found)
        if one.status == "WRONG"
    ]


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    """The page."""
    del setting  # the page has no number that depends on it
    cells = list(entries(found))
    deep = ", ".join(name for name in DEEP if name in found) or "none"
    how = HOW.format(width=WIDTH, rows=LOGGED, clean=PLAN.clean_prompts, logged=LOGGED, deep=deep)
    body = [*reasons(cells), *by_saving(cells), *by_architecture(found)]
    return page("What is read", opening(found, cells), body, how)


def opening(found: Mapping[str, dict[str, Any]], cells: Sequence[Entry]) -> list[str]:
    count = Counter(one.status for one in cells)
    savings = {one.saving for one in cells}
    refused = count["refused"] + count["NOT TESTABLE"]
    wrong = count["WRONG"]
    given = f"{counted(len(found), 'architecture')}, saved in {len(savings)} ways: {counted(len(cells), 'cell')}"
    rely = "No cell is wrong; try a folder of a kind that is not in the tables with `molehunt files` first."
    if wrong:
        rely = f"But {counted(wrong, 'cell')} ✗ gave a wrong answer: do not rely on such a folder until that is mended."
    return [
        f"Molehunt's commands were given {given}.",
        f"They read {count['works']:,} as they are, with the right answer, and refuse {refused:,} or call them NOT TESTABLE, with "
        "the reason.",
        rely,
    ]


def reasons(cells: Sequence[Entry]) -> list[str]:
    """What does not work, and why: one row for each way of saving and reason, and a message of each."""
    known = {saving.name: saving.why for saving in SAVINGS}
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for one in cells:
        if one.status != "works":
            place = "anything" if one.architecture in NO_DECODER and one.status != "WRONG" else one.saving
            why = ENCODER if place == "anything" else known.get(one.saving, "")
            groups.setdefault(
                (MARKS[one.status], place, plain(one.why) if one.status == "WRONG" or not why else why), []
            ).append(one)
    rows, messages = list[list[str]](), list[list[str]]()
    for (mark, place, why), some in sorted(groups.items(), key=lambda item: (item[0][0] != "✗", item[0][1])):
        commands = [command for command in COMMANDS if any(one.command == command for one in some)]
        n = len({one.architecture for one in some})
        rows.append([mark, place, ", ".join(commands), str(n), why])
        messages += [] if mark == "✗" else [[place, plain(some[0].why)]]
    if not rows:
        return []
    legend = "✓ works, ? NOT TESTABLE, – refused, ✗ wrong; n architectures."
    head = ["", "saved", "commands", "n", "reason"]
    begins = ["One message of each begins so:", "", *grid(["saved", "message"], messages), ""] if messages else []
    return ["## What does not work, and why", "", legend, "", *grid(head, rows), "", *begins]


def plain(why: str) -> str:
    """A message without what belongs to one folder, as a cell of a table."""
    text = re.sub(r"/\S*/", "", why)
    text = re.sub(r"[\w.]*(layers|layer|blocks|h)\.\d+\.[\w.]+|\b[\w.]+\.(weight|bias|qweight)\b", "TENSOR", text)
    text = re.sub(r"\d+\.\d{3,}", "…", text).replace("|", "\\|")
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1].rstrip()}…"


def by_saving(cells: Sequence[Entry]) -> list[str]:
    """One row for each way of saving: how many architectures work, by command."""
    present = {one.saving for one in cells}
    rows: list[list[str]] = []
    for saving in SAVINGS:
        if saving.name in present:
            shown = [share([one for one in cells if (one.saving, one.command) == (saving.name, c)]) for c in COMMANDS]
            rows.append([saving.name, saving.what, *shown])
    head = ["saved", "what is written", *COMMANDS]
    legend = "Number of architectures; `40 ✓ 3 ?` means that 40 work and 3 are NOT TESTABLE."
    return ["## Ways of saving", "", legend, "", *grid(head, rows), ""]


def share(cells: Sequence[Entry]) -> str:
    count = Counter(MARKS[one.status] for one in cells)
    return " ".join(f"{count[mark]} {mark}" for mark in MARKS.values() if count[mark])


def by_architecture(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """Architectures × ways of saving: a mark for each command, in the order of `COMMANDS`."""
    names = [saving.name for saving in SAVINGS if any(saving.name in savings for savings in found.values())]
    marks: dict[tuple[str, str], str] = {}
    for one in entries(found):
        place = one.architecture, one.saving
        marks[place] = marks.get(place, "") + MARKS[one.status]
    lines = [
        "## Architectures",
        "",
        f"A mark for each of {', '.join(COMMANDS)}, in this order; the last two only where they were run. "
        f"Decoders inside a model for images: {', '.join(WRAPPED)}.",
        "",
    ]
    for start in range(0, len(names), WIDE):
        some = names[start : start + WIDE]
        rows = [
            [
                architecture,
                *("".join(MARKS[cell["status"]] for cell in savings.get(name, {}).values()) for name in some),
            ]
            for architecture, savings in found.items()
            if any(name in savings for name in some)
        ]
        lines += [*grid(["architecture", *some], rows), ""]
    return lines
