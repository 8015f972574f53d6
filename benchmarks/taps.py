"""Reading every block's output: our taps, nnsight, `output_hidden_states`, and no reading at all.

Run by `run.py`; as a script it is the measurement itself, for the Python that has nnsight.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from row import Row, seconds, shown

BATCH, POS, LAYERS, D_MODEL = 16, 10, 4, 192
ROUNDS = 40
HOW_TO = (
    "give --nnsight PYTHON, a Python of its own environment: python -m venv NN; "
    "NN/bin/pip install torch transformers jaxtyping nnsight"
)


def against_nnsight(python: Path | None) -> list[Row]:
    """Rows of the comparison, or one row that says why there is none."""
    work = f"read all {LAYERS} blocks, {BATCH}×{POS} tokens, d_model {D_MODEL}"
    if python is None or not python.exists():
        skipped = f"skipped: {HOW_TO}"
        return [Row(work=work, against="nnsight", ours="–", theirs="–", ratio=None, aim="–", met=None, note=skipped)]
    source = Path(__file__).parent.parent / "src"
    finished = subprocess.run(
        [str(python), __file__], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    if finished.returncode:
        raise SystemExit(f"{python} cannot run the comparison; {HOW_TO}\n{finished.stderr}")
    best = json.loads(finished.stdout.splitlines()[-1])
    ours = best["taps"]

    def row(against: str, note: str) -> Row:
        theirs = best[against]
        return Row(
            work=work,
            against=against,
            ours=shown(ours),
            theirs=shown(theirs),
            ratio=theirs / ours,
            aim="–",
            met=None,
            note=note,
        )

    bare = best["no reading"]
    added = f"reading adds {1000 * (ours - bare):.2f} ms to the pass, nnsight {1000 * (best['nnsight'] - bare):.2f}"
    same = f"nnsight {best['version']}, one process, one thread, interleaved, fastest of {ROUNDS}, equal tensors"
    return [
        row("nnsight", f"{added}; {same}"),
        row("output_hidden_states", "its last entry is after the final norm"),
        row("no reading", "what the forward pass itself costs"),
    ]


def measure() -> dict[str, object]:
    """Fastest seconds of each way, interleaved. Raises AssertionError unless all read the same tensors."""
    from importlib import metadata

    import nnsight
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from molehunt.model.taps import read_sites
    from molehunt.site import Site

    torch.set_num_threads(1)  # at this size a second thread adds noise, not speed
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=512,
    )
    model = LlamaForCausalLM(config).eval()
    traced = nnsight.NNsight(model)
    ids = torch.randint(512, (BATCH, POS))
    sites = [Site(layer) for layer in range(LAYERS)]

    @torch.no_grad()
    def with_taps() -> list[torch.Tensor]:
        with read_sites(model, sites) as tap:
            model(ids)
        return [tap[site] for site in sites]

    @torch.no_grad()
    def with_nnsight() -> list[torch.Tensor]:
        with traced.trace(ids):
            read = nnsight.save([layer.output for layer in traced.model.layers])
        return read  # noqa: RET504 (nnsight runs the body elsewhere, a return there is lost)

    @torch.no_grad()
    def with_hidden_states() -> list[torch.Tensor]:
        return list(model(ids, output_hidden_states=True).hidden_states[1:])

    @torch.no_grad()
    def with_nothing() -> None:
        model(ids)

    for ours, theirs in zip(with_taps(), with_nnsight(), strict=True):
        assert torch.equal(ours, theirs[0] if isinstance(theirs, tuple) else theirs)
    for ours, theirs in zip(with_taps()[:-1], with_hidden_states()[:-1], strict=True):
        assert torch.equal(ours, theirs)
    ways = {
        "taps": with_taps,
        "nnsight": with_nnsight,
        "output_hidden_states": with_hidden_states,
        "no reading": with_nothing,
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way, 1))
    return {**best, "version": metadata.version("nnsight")}


if __name__ == "__main__":
    print(json.dumps(measure()), file=sys.stdout)
