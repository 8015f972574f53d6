"""The records of a topic: one JSON line for each run that is done, so that a killed experiment goes on where it was."""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, printable


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """What each run found, by the name of the run; the last line of a name counts.

    A line that ends in the middle was cut off by a kill: it is reported on stderr and measured again.

    Raises:
        InvalidInput: a whole line is no record.
    """
    if not file.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            print(f"{file}:{number}: this line was cut off; its run is measured again.", file=sys.stderr)
            continue
        if not isinstance(record, dict) or not {"run", "found"} <= record.keys():
            raise InvalidInput(
                f"{printable(str(file))}:{number} is no record of a run. Delete the line and start again."
            )
        found[record["run"]] = record["found"]
    return found


def append_record(file: Path, run: str, found: dict[str, Any]) -> None:
    """Add one line to a file that several processes may write to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"run": run, "found": found}, ensure_ascii=False) + "\n"
    with file.open("ab+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        if out.tell():
            out.seek(-1, os.SEEK_END)
            line = line if out.read(1) == b"\n" else "\n" + line
        out.write(line.encode())
