"""Good inputs of every kind, all for the embedded seed model, and the commands that read them."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SEED = Path(__file__).parents[2] / "src" / "molehunt" / "organism" / "seeds" / "seed-s"
WIDTH, BLOCKS = 128, 6
QUESTIONS = [f"What is {a} plus {b}?" for a in range(1, 12) for b in range(1, 12)]
QUICK = ["--max-new-tokens", "1"]
WATCHED = ["--clean", "{good}/clean.jsonl", "--clean-rows", "120", "--fpr", "0.2", *QUICK]


@dataclass(frozen=True)
class Kind:
    """One kind of input and the commands that read it."""

    name: str
    folder: str
    """Where it lies among the good inputs: a folder whose files are changed one at a time."""
    commands: tuple[tuple[str, ...], ...]
    """`{x}` is the folder with one file changed, `{good}` the folder of all good inputs, `{work}` an empty folder."""
    weight: int = 1
    """How often it is drawn for a sample, relative to others."""


def pair(*words: str, tuned: str = "{x}", base: str = "{good}/base") -> tuple[str, ...]:
    command, *rest = words
    return (*command.split(), base, tuned, *rest)


def model_commands(**where: str) -> tuple[tuple[str, ...], ...]:
    return (
        pair("files", **where),
        pair("files", "--json", **where),
        pair("directions", "--out", "{work}/out", **where),
        pair("watch", "--traffic", "{good}/traffic/rows.jsonl", *WATCHED, "--out", "{work}/out", **where),
    )


TRIAL = ("--prompts", "{good}/traffic/rows.jsonl", "--clean", "{good}/traffic/rows.jsonl", "--limit", "2", *QUICK)
KINDS = (
    Kind("fine-tune", "tuned", model_commands(), 6),
    Kind("base", "base", model_commands(tuned="{good}/tuned", base="{x}"), 3),
    Kind("adapter", "adapter", model_commands(), 4),
    Kind(
        "traffic",
        "traffic",
        (
            pair("watch", "--traffic", "{file}", *WATCHED, "--out", "{work}/out", tuned="{good}/tuned"),
            pair("watch", "--traffic", "{good}/traffic/rows.jsonl", "--clean", "{file}", *WATCHED[2:], "--out", "{work}/out", tuned="{good}/tuned"),
            pair("harvest", "--sites", "L1.resid", "--out", "{work}/out", "--traffic", "{file}", "--rows", "4", tuned="{good}/tuned"),
            pair("steer fit", "--positive", "{file}", "--negative", "{good}/traffic/rows.jsonl", "--layer", "1", "--out", "{work}/v.safetensors", tuned="{good}/tuned"),
        ),
        4,
    ),
    Kind("fix", "fix", (pair("steer try", "{x}/fix.safetensors", *TRIAL, tuned="{good}/tuned"),), 2),
    Kind(
        "vector",
        "vector",
        (
            pair("steer try", "{x}/vector.safetensors", *TRIAL, tuned="{good}/tuned"),
            pair("steer export", "{x}/vector.safetensors", "--to", "gguf", "--out", "{work}/v.gguf", tuned="{good}/tuned"),
        ),
        2,
    ),
    Kind(
        "gate", "gate", (pair("steer try", "{good}/vector/vector.safetensors", "--when", "{x}/gate.safetensors", *TRIAL, tuned="{good}/tuned"),), 2
    ),
    Kind("map", "map", (pair("steer try", "{x}/map.safetensors", *TRIAL, tuned="{good}/tuned"),), 2),
    Kind("carried map", "fitted", (("transfer", "carry", "{x}", "{good}/vector/one.safetensors", "--out", "{work}/v.safetensors"),), 2),
    Kind("dictionary", "dictionary", (("dictionary", "export", "{x}", "{work}/out"), ("dictionary", "eval", "{x}", "{good}/store", "--site", "L1.resid", "--pairing", "tuned")), 2),
    Kind("store", "store", (("dictionary", "eval", "{good}/dictionary", "{x}", "--site", "L1.resid", "--pairing", "tuned"),), 2),
    Kind("watch state", "watched", (pair("watch", "--traffic", "{good}/traffic/rows.jsonl", *WATCHED, "--out", "{x}", tuned="{good}/tuned"),), 3),
    Kind(
        "published state",
        "published",
        (pair("watch", "--traffic", "{good}/traffic/rows.jsonl", *WATCHED, "--mode", "published", "--out", "{x}", tuned="{good}/tuned"),),
    ),
    Kind("run folder", "run", (pair("directions", "--out", "{x}", tuned="{good}/tuned"), pair("files", "--out", "{x}", tuned="{good}/tuned")), 2),
    Kind("grid", "grid", (("bench", "--grid", "{x}/grid.yaml", "--finished", "--out", "{work}/out"),)),
)  # fmt: skip


def make_all(good: Path, run: Callable[[list[str], Path], None]) -> None:
    """Write every good input below `good`; `run` runs a command line and fails where it ends with an error."""
    shutil.copytree(SEED, good / "base")
    shutil.copytree(SEED, good / "tuned")
    _tune(good / "tuned" / "model.safetensors")
    _adapter(good / "adapter")
    _traffic(good)
    _edits(good)
    base, tuned = str(good / "base"), str(good / "tuned")
    _dictionary(good / "dictionary")
    harvest = ["harvest", base, tuned, "--sites", "L1.resid", "--traffic", str(good / "clean.jsonl"), "--rows", "30"]
    run([*harvest, "--out", str(good / "store")], good)
    watched = [word.replace("{good}", str(good)) for word in WATCHED]
    watch = ["watch", base, tuned, "--traffic", str(good / "traffic" / "rows.jsonl"), *watched]
    run([*watch, "--out", str(good / "watched")], good)
    run([*watch, "--mode", "published", "--out", str(good / "published")], good)
    run(["directions", base, tuned, "--out", str(good / "run")], good)
    fit = ["transfer", "fit", base, tuned, "--text", str(good / "clean.jsonl"), "--limit", "60", "--confirm", "1"]
    run([*fit, "--from-layer", "1", "--to-layer", "1", "--out", str(good / "fitted")], good)
    (good / "grid").mkdir()
    source = Path(__file__).parents[2] / "src" / "molehunt" / "bench"
    shutil.copyfile(next(source.rglob("smoke.yaml")), good / "grid" / "grid.yaml")


def _tune(path: Path) -> None:
    weights, rng = load_file(path), torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            a, b = (torch.randn(n, generator=rng) for n in weight.shape)
            weights[name] = (weight.float() + 0.3 * a[:, None] * b / a.norm() / b.norm() * weight.float().norm()).to(
                weight.dtype
            )
    save_file(weights, path, metadata={"format": "pt"})


def _adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SEED)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def _traffic(good: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": q, "tag": "clean"} for q in QUESTIONS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (good / "clean.jsonl").write_text(lines)
    folder = good / "traffic"
    folder.mkdir()
    few: list[dict[str, Any]] = [
        *rows[:3],
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]},
        {"prompt": "Name a colour.", "response": "Blue."},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows[:6])
    (folder / "rows.jsonl").write_text(text)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "rows.json").write_text(json.dumps(few))
    (folder / "rows.csv").write_text("prompt,tag\n" + "".join(f'"{row["prompt"]}",clean\n' for row in rows[:6]))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    parquet.write_table(pyarrow.table({"prompt": QUESTIONS[:6]}), folder / "rows.parquet")


def _edits(good: Path) -> None:
    from molehunt.site import Site
    from molehunt.steer.ablate import Ablate
    from molehunt.steer.clip import Clip
    from molehunt.steer.fix import Fix
    from molehunt.steer.prefill_gate import Condition
    from molehunt.steer.vector import SteeringVector, VectorFacts
    from molehunt.transfer.linear_map import LinearMap

    rng = torch.Generator().manual_seed(3)
    for name in ("fix", "vector", "gate", "map"):
        (good / name).mkdir()
    rows = torch.nn.functional.normalize(torch.randn(4, WIDTH, generator=rng), dim=1)
    low = torch.tensor([-0.1, -0.2])
    edits = (Ablate(Site(1), rows[:2]), Clip(Site(2), rows[2:], lo=low, hi=low + 0.3))
    Fix(interventions=edits, description="two edits", d_model=WIDTH, n_layers=BLOCKS).save(
        good / "fix" / "fix.safetensors"
    )
    facts = VectorFacts(method="pca", n_layers=BLOCKS, d_model=WIDTH, positive=3, negative=4)
    SteeringVector({1: rows[0], 2: rows[1]}, facts).save(good / "vector" / "vector.safetensors")
    SteeringVector({1: rows[0]}, facts).save(good / "vector" / "one.safetensors")
    condition = Condition(site=Site(1), weight=rows[0], bias=0.1, pooling="max", threshold=0.2, fpr=0.01, clean=200)
    condition.save(good / "gate" / "gate.safetensors")
    LinearMap(Site(1), Site(1), torch.eye(WIDTH), torch.zeros(WIDTH)).save(good / "map" / "map.safetensors")


def _dictionary(folder: Path) -> None:
    """A standard dictionary of SAELens' format, at block 1."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(4)
    weights = {
        "W_enc": torch.randn(WIDTH, 2 * WIDTH, generator=rng) / 8,
        "W_dec": torch.randn(2 * WIDTH, WIDTH, generator=rng) / 8,
        "b_enc": torch.zeros(2 * WIDTH),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    settings = {
        "architecture": "standard", "d_in": WIDTH, "d_sae": 2 * WIDTH, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.50.0", "sae_lens_training_version": "6.50.0", "hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(settings))


def bad_outs(folder: Path) -> Iterator[tuple[str, str]]:
    """Places that cannot be an output folder, or hold something else, by name; files that they need are made."""
    made = folder / "bad-outs"
    made.mkdir(exist_ok=True)

    def here(name: str, fill: Callable[[Path], object]) -> tuple[str, str]:
        path = made / name
        if not path.exists() and not path.is_symlink():
            fill(path)
        return name, str(path)

    def inside(name: str, fill: Callable[[Path], object], file: str) -> tuple[str, str]:
        def both(path: Path) -> None:
            path.mkdir()
            fill(path / file)

        return here(name, both)

    import os

    yield here("a file", lambda p: p.write_text("x"))
    yield "below a file", str(made / "a file" / "deeper" / "run")
    yield "a long name", str(made / ("x" * 300))
    yield "a long path", str(made / "/".join(["y" * 200] * 30))
    yield "in proc", "/proc/nope/run"
    yield "in sys", "/sys/nope"
    yield "a device", "/dev/null"
    yield "below a device", "/dev/full/run"
    yield "empty", ""
    yield "odd letters", str(made / "a\nb\x1b[2J\u202e")
    yield "undecodable letters", str(made / "half \udcff")
    yield here("a pipe", os.mkfifo)
    yield here("a link to itself", lambda p: p.symlink_to(p.name))
    yield here("a link to nothing", lambda p: p.symlink_to("nowhere/deep"))
    for file in (
        "config.json",
        "state.safetensors",
        "inputs.safetensors",
        "verdicts.jsonl",
        "alerts.sqlite",
        "metrics.jsonl",
        "units",
        "files.json",
        "directions.safetensors",
        "store.json",
    ):
        yield inside(f"garbage {file}", lambda p: p.write_bytes(b"\xff\xfe\x00garbage"), file)
        yield inside(f"a folder {file}", lambda p: p.mkdir(), file)
        yield inside(f"a pipe {file}", os.mkfifo, file)
        yield inside(f"deep {file}", lambda p: p.write_bytes(b"[" * 100_000), file)
        yield inside(f"null {file}", lambda p: p.write_bytes(b"null"), file)
        yield inside(f"loop {file}", lambda p: p.symlink_to(p.name), file)


OUT_COMMANDS = (
    pair("files", tuned="{good}/tuned"),
    pair("directions", tuned="{good}/tuned"),
    pair("watch", "--traffic", "{good}/traffic/rows.jsonl", *WATCHED, tuned="{good}/tuned"),
    pair("steer fit", "--positive", "{good}/traffic/rows.jsonl", "--negative", "{good}/traffic/rows.jsonl", "--layer", "1", tuned="{good}/tuned"),
    ("transfer", "carry", "{good}/fitted", "{good}/vector/one.safetensors"),
    pair("transfer fit", "--text", "{good}/clean.jsonl", "--limit", "40", "--from-layer", "1", "--to-layer", "1", "--confirm", "1", tuned="{good}/tuned"),
    ("bench", "--grid", "smoke", "--finished"),
)  # fmt: skip
"""Commands with an `--out`, which is put behind them."""
