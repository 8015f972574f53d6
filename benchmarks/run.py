"""Speed and memory as ratios, ours and theirs side by side in one run.

python benchmarks/run.py [--quick] [--json] [--only directions,lora,memory,taps] [--nnsight PYTHON]
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import directions
import memory
import taps
import torch
from row import HEADER, Row, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2048 × 5632 instead of 4096 × 11008; 1 GB, not 4")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", default="directions,lora,memory,taps", help="comma-separated parts")
    parser.add_argument("--nnsight", type=Path, help="a Python that has torch, transformers, jaxtyping, nnsight")
    parser.add_argument("--scratch", type=Path, help="folder for the synthetic pair (deleted afterwards)")
    args = parser.parse_args()
    shape = (2048, 5632) if args.quick else (4096, 11008)
    parts: dict[str, Callable[[], list[Row]]] = {
        "directions": lambda: directions.against_full_svd(shape),
        "lora": lambda: directions.lora_against_merged(shape),
        "memory": lambda: memory.peak_rss(1 if args.quick else 4, args.scratch),
        "taps": lambda: taps.against_nnsight(args.nnsight),
    }
    asked = args.only.split(",")
    unknown = set(asked) - parts.keys()
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    rows: list[Row] = []
    if not args.json:
        print(HEADER)
    for part in asked:
        print(f"{part} …", file=sys.stderr, flush=True)
        measured = parts[part]()
        rows += measured
        if not args.json:
            print("\n".join(map(line, measured)), flush=True)  # at once: a full run takes many minutes
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0],
    }
    if args.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    main()
