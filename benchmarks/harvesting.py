"""Both models' activations of every block: `stream`, nnsight, and two `output_hidden_states` passes.

Run by `run.py`; as a script it is the measurement itself, for the Python that has nnsight.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from row import Row, now, shown
from taps import HOW_TO
from torch import Tensor

AIM = 2.0
REPEATS = 3
ROWS = 32
"""Rows in a batch of the others: in the order of the traffic, padded to the longest."""
Found = tuple[list[Tensor], list[Tensor]]
"""Activations of base and tuned, per block [tokens d_model] in bf16, in the order of the traffic."""


def against_nnsight(python: Path | None, *, quick: bool, device: str) -> list[Row]:
    """One row per pair, traffic and rival."""
    source = Path(__file__).parent.parent / "src"
    command = [str(python or sys.executable), __file__, "--device", device] + ["--quick"] * quick
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(source)})
    if finished.returncode:
        raise SystemExit(f"{command[0]} cannot run the comparison; {HOW_TO}")
    return [Row(**row) for row in json.loads(finished.stdout.splitlines()[-1])]


def measure(*, quick: bool, device: str) -> list[Row]:
    import importlib.util

    shape = (192, 4, 2048) if quick else (256, 6, 8192)
    rng = random.Random(0)
    varied = [round(min(192, max(6, rng.lognormvariate(3.6, 0.8)))) for _ in range(32 if quick else 96)]
    traffics = {"6 to 192 tokens a row": varied, "64 tokens in every row": [64] * (16 if quick else 48)}
    have_nnsight = importlib.util.find_spec("nnsight") is not None
    measured: list[Row] = []
    for lora in (False, True):
        for traffic, lengths in traffics.items():
            rows = [[rng.randrange(3, shape[2]) for _ in range(length)] for length in lengths]
            took = _race(_models(shape, lora=lora, device=device), rows, have_nnsight=have_nnsight)
            work = f"read {shape[1]} blocks of a {'LoRA' if lora else 'full'} pair, d_model {shape[0]}, {traffic}"
            tokens = sum(lengths)
            for rival, seconds in took.items():
                if rival in ("stream", "harvest"):
                    continue
                ratio = seconds / took["stream"]
                aimed = rival.startswith("nnsight")
                measured.append(
                    Row(
                        work=work,
                        against=rival,
                        ours=shown(took["stream"]),
                        theirs=shown(seconds),
                        ratio=ratio,
                        aim=f"≥ {AIM:g}×" if aimed else "–",
                        met=ratio >= AIM if aimed else None,
                        note=f"{tokens / took['stream']:,.0f} tokens/s; to a store on disk {seconds / took['harvest']:.2f}×",
                    )
                )
    if not have_nnsight:
        note = f"skipped, not installed: {HOW_TO}"
        measured.append(
            Row(
                work="read all blocks",
                against="nnsight",
                ours="–",
                theirs="–",
                ratio=None,
                aim="–",
                met=None,
                note=note,
            )
        )
    return measured


def _models(shape: tuple[int, int, int], *, lora: bool, device: str) -> Any:
    """A pair of random models as `ModelPair` holds them."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from molehunt.model.pair import ModelPair

    d_model, layers, vocab = shape
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=layers,
        num_attention_heads=d_model // 64,
        vocab_size=vocab,
        max_position_embeddings=256,
    )

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().to(device)

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(vocab), pad_token="<pad>")
    base = model(0)
    if not lora:
        return ModelPair(base, model(1), tokenizer)
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).eval()
    return ModelPair(tuned, tuned, tokenizer)


def _tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, vocab)}}, unk_token="<pad>"))


def _race(pair: Any, rows: list[list[int]], *, have_nnsight: bool) -> dict[str, float]:
    """Median seconds of each way, interleaved. Raises AssertionError unless all read the same activations."""
    import tempfile
    from importlib import metadata

    from molehunt.activation.harvest import harvest, stream
    from molehunt.activation.manifest import Identity
    from molehunt.site import Site

    sites = [Site(layer) for layer in range(pair.n_layers)]

    def ours() -> list[Any]:
        return list(stream(pair, rows, sites))

    def to_disk() -> None:
        with tempfile.TemporaryDirectory() as folder:
            who = Identity(base="a", tuned="b", tokenizer="c")
            harvest(pair, rows, sites=sites, into=Path(folder) / "store", identity=who)

    ways: dict[str, Callable[[], Any]] = {"stream": ours, "harvest": to_disk}
    ways["two output_hidden_states passes"] = lambda: _both(pair, rows, _hidden_states)
    if have_nnsight:
        version = metadata.version("nnsight")
        ways[f"nnsight {version}"] = lambda: _both(pair, rows, _Traced(stop=False))
        ways[f"nnsight {version}, stopped after the last block"] = lambda: _both(pair, rows, _Traced(stop=True))
    pieces = ours()
    document, position = (torch.cat([getattr(p, name) for p in pieces]) for name in ("document", "position"))
    order = (document.long() * 100_000 + position).argsort()
    for name, way in ways.items():
        if name in ("stream", "harvest"):
            continue
        for side, acts in zip(("base", "tuned"), way(), strict=True):
            last = pair.n_layers - ("hidden" in name)  # the last entry there is after the final norm
            for site in sites[:last]:
                read = torch.cat([getattr(piece, side)[site] for piece in pieces])[order]
                torch.testing.assert_close(read.float(), acts[site.layer].float(), rtol=0.05, atol=0.02)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = now(str(pair.device))
            way()
            took[name].append(now(str(pair.device)) - start)
    return {name: median(each) for name, each in took.items()}


def _both(pair: Any, rows: list[list[int]], read: Callable[[Any, Tensor, Tensor], Sequence[Tensor]]) -> Found:
    """What a script around either of the others does: batch, pad, read, keep real tokens."""
    sides: list[list[Tensor]] = []
    for entered in (pair.base_model, pair.tuned_model):
        kept: list[list[Tensor]] = []
        for start in range(0, len(rows), ROWS):
            batch = rows[start : start + ROWS]
            width = max(map(len, batch))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=pair.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=pair.device)
            with entered() as model, torch.no_grad():
                acts = read(model, tokens, mask)
            kept.append([layer[mask.bool()].bfloat16().cpu() for layer in acts])
        sides.append([torch.cat(layer) for layer in zip(*kept, strict=True)])
    return sides[0], sides[1]


def _hidden_states(model: Any, tokens: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[1:]


class _Traced:
    def __init__(self, *, stop: bool) -> None:
        self.stop = stop

    def __call__(self, model: Any, tokens: Tensor, mask: Tensor) -> Sequence[Tensor]:
        import nnsight

        traced = nnsight.NNsight(model)
        layers = (traced.base_model.model if hasattr(model, "peft_config") else traced).model.layers
        if self.stop:
            with traced.trace(input_ids=tokens, attention_mask=mask, use_cache=False) as tracer:
                read = nnsight.save([layer.output for layer in layers])
                tracer.stop()
        else:
            with traced.trace(input_ids=tokens, attention_mask=mask, use_cache=False):
                read = nnsight.save([layer.output for layer in layers])
        return [each[0] if isinstance(each, tuple) else each for each in read]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(json.dumps([asdict(row) for row in measure(quick=args.quick, device=args.device)]))


if __name__ == "__main__":
    main()
