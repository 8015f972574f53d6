"""Peak resident memory of `compare_weights` on a synthetic sharded pair that is larger than what it may use.

As a script it is the comparison itself, in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from row import Row
from safetensors.torch import save_file

D_MODEL, D_MLP = 4096, 11008
MATRICES_IN_SHARD = 6


def peak() -> int:
    """Peak resident memory of this process in KiB."""
    status = Path("/proc/self/status")  # a child inherits its parent's ru_maxrss on Linux, but not its VmHWM
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_rss(gigabytes: float, scratch: Path | None) -> list[Row]:
    """What the comparison adds to a process that has already loaded torch, in a child process."""
    tensor = D_MODEL * D_MLP * 2
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        size = _write_pair(Path(folder), gigabytes)
        finished = subprocess.run(
            [sys.executable, __file__, f"{folder}/base", f"{folder}/tuned"],
            check=True,
            capture_output=True,
            text=True,
        )
    peak = json.loads(finished.stdout)
    added, allowed = (peak["after"] - peak["before"]) * 1024 / 1e6, (2 * tensor) / 1e6 + 200
    return [
        Row(
            work=f"peak memory, sharded pair of {size / 1e9:.1f} GB",
            against="both checkpoints in memory",
            ours=f"{added:.0f} MB",
            theirs=f"{size / 1e6:.0f} MB",
            ratio=size / 1e6 / added,
            aim=f"≤ 2 tensors + 200 MB = {allowed:.0f} MB",
            met=added <= allowed and peak["outcome"] == "DIRECTIONS FOUND",
            note=f"above the {peak['before'] / 1024:.0f} MB of a process with torch loaded",
        )
    ]


def _write_pair(folder: Path, gigabytes: float) -> int:
    """Two folders of o and down projections in shards; the tuned side differs by a rank-4 change."""
    count = max(2, round(gigabytes * 1e9 / 2 / (2 * D_MODEL * D_MLP)))
    rng = torch.Generator().manual_seed(0)
    total = 0
    for side in ("base", "tuned"):
        (folder / side).mkdir()
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": count}
        config |= {"hidden_size": D_MODEL, "intermediate_size": D_MLP, "vocab_size": 32}
        (folder / side / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    n_shards = -(-count // MATRICES_IN_SHARD)
    for shard in range(n_shards):
        layers = range(shard * MATRICES_IN_SHARD, min(count, (shard + 1) * MATRICES_IN_SHARD))
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        base = {
            f"model.layers.{i}.mlp.down_proj.weight": 0.02 * torch.randn(D_MODEL, D_MLP, generator=rng).bfloat16()
            for i in layers
        }
        save_file(base, folder / "base" / file, metadata={"format": "pt"})
        for weight in base.values():
            left, right = torch.randn(D_MODEL, 4, generator=rng), torch.randn(4, D_MLP, generator=rng)
            weight.add_((1e-3 * left @ right).bfloat16())
        save_file(base, folder / "tuned" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(base, file)
        total += sum(2 * weight.nbytes for weight in base.values())
    index = json.dumps({"metadata": {"total_size": total // 2}, "weight_map": weight_map})
    for side in ("base", "tuned"):
        (folder / side / "model.safetensors.index.json").write_text(index)
    return total


if __name__ == "__main__":
    from molehunt.audit.weights import compare_weights

    torch.linalg.svd(torch.randn(600, 600))  # load the solvers
    torch.linalg.qr(torch.randn(600, 60))
    start = peak()
    outcome = compare_weights(sys.argv[1], sys.argv[2]).outcome
    print(json.dumps({"before": start, "after": peak(), "outcome": outcome}))
