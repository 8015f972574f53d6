"""Four published settings in which a behaviour comes back past a clamp, on embedded models, and write the table.

`python recipes/stress_table.py --data DATA --models runs/stress-models --into runs/stress --write docs/stress-table.md` teaches
the models where `--models` does not have them yet. Only `tpp banking77` reads `--data`, a folder of public texts; leave
that run out with `--only`. It can be killed and repeated; `--table` writes from what is done.
"""

from pathlib import Path
from typing import Any

import stress_ioi
import stress_refusal
import stress_tpp
import stress_unlearning
from separate_runs import separate_runs
from stress_told import table

RUNS = ("ioi seed-s", "unlearning seed-s", "refusal seed-s", "tpp world seed-s", "tpp banking77 seed-s")


def main() -> None:
    separate_runs(__doc__, RUNS, measure, table, into="runs/stress", folders=("data", "models"))


def measure(name: str, data: Path, models: Path) -> dict[str, Any]:
    setting, *told = name.split(" ")
    if setting == "ioi":
        return stress_ioi.measure(told[0], models)
    if setting == "unlearning":
        return stress_unlearning.measure(told[0], models)
    if setting == "refusal":
        return stress_refusal.measure(told[0], models)
    return stress_tpp.measure(told[0], told[1], data)


if __name__ == "__main__":
    main()
