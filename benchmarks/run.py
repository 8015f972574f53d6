"""Speed and memory as ratios, ours and theirs side by side in one run.

python benchmarks/run.py [--quick] [--json] [--only PARTS] [--peers PYTHON] [--nnsight PYTHON] [--device cuda]

Parts: directions, lora, memory, taps, training, harvest, store, together, scoring, watch, serve, transfer, stress. A peer that no Python was given for, and that
this one lacks, has a row that says how to install it.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import dictionaries
import directions
import fold
import harvesting
import mapping
import memory
import serving
import stores
import stressing
import taps
import torch
import watching
from row import CLOCK, HEADER, Row, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller matrices, stores and models, shorter trainings")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", help="comma-separated parts; all by default")
    parser.add_argument("--peers", type=Path, help="a Python that has sae-lens and dictionary-learning")
    parser.add_argument("--nnsight", type=Path, help="a Python that has torch, transformers, jaxtyping, nnsight")
    parser.add_argument("--scratch", type=Path, help="folder for synthetic pairs and stores (deleted afterwards)")
    parser.add_argument(
        "--device", default="cpu", help="of training, harvest, scoring, watch, serve, transfer, stress: cpu or cuda"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a machine with other work on it"
    )
    args = parser.parse_args()
    if args.cpu_time:
        os.environ[CLOCK] = "cpu"  # inherited by the processes that measure
    where = {"quick": args.quick, "device": args.device}
    sizes = stores.QUICK_GIGABYTES if args.quick else stores.GIGABYTES
    shape = (2048, 5632) if args.quick else (4096, 11008)
    parts: dict[str, Callable[[], list[Row]]] = {
        "directions": lambda: directions.against_full_svd(shape),
        "lora": lambda: directions.lora_against_merged(shape),
        "memory": lambda: memory.peak_rss(1 if args.quick else 4, args.scratch),
        "taps": lambda: taps.against_nnsight(args.nnsight),
        "training": lambda: dictionaries.against_peers(args.peers, scratch=args.scratch, **where),
        "harvest": lambda: harvesting.against_nnsight(args.nnsight, **where),
        "store": lambda: stores.memory_by_size(sizes, args.scratch),
        "together": lambda: stores.together(scratch=args.scratch, **where),
        "scoring": lambda: fold.against_loop_and_outputs(**where),
        "watch": lambda: watching.scan_state_and_memory(**where),
        "serve": lambda: serving.guarded_against_unguarded(**where),
        "transfer": lambda: mapping.closed_form_and_grid(**where),
        "stress": lambda: stressing.batched_against_loop(**where),
    }
    chosen = args.only.split(",") if args.only else list(parts)
    unknown = set(chosen) - parts.keys()
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    rows: list[Row] = []
    if not args.json:
        print(HEADER)
    for part in chosen:
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
