"""Attack on a clamp: all rows at once and only what a perturbation can change, against one row at a time and everything.

The setting is IOI: a seed model is taught it, a dictionary is trained on its activations, the latents with the
largest attribution to the right name are clamped. Both attacks take every step of the published settings on the same rows.
"""

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from memory import peak
from row import Row, now, shown
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # the experiments lie beside this folder

from experiments.lessons.curriculum import handing_lesson, handing_lessons
from experiments.lessons.indirect_object import handings, name_pairs
from experiments.lessons.teach import TeachConfig, teach
from experiments.stress.choice_behaviour import spread, valid_choices
from experiments.stress.choice_rows import handing_choices
from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, TrainingConfig, train_dictionaries
from molehunt.model.blocks import decoder_blocks
from molehunt.model.tokenizers import load_tokenizer
from molehunt.organism.seed_model import seed_path
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import PUBLISHED, AttackConfig, AttackResult, attack
from molehunt.stress.attacks.choice import Choice, choice_margin, judge_choices
from molehunt.stress.attacks.constraint import Exact, Free, Paper
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.defences.selection import by_attribution
from molehunt.traffic.split import Select
from molehunt.transfer.collect import read_rows

BASE, SITE = "seed-s", Site(3)
LATENTS, VALUE = 16, 5.0
AIM = 20.0
CONFIG = PUBLISHED["ioi"]


class Setting(NamedTuple):
    """What is attacked."""

    model: nn.Module
    clamp: Clamp
    rows: list[Choice]
    radius: float


class Measured(NamedTuple):
    seconds: float
    recovered: int
    megabytes: float | None


def batched_against_loop(*, quick: bool, device: str = "cpu") -> list[Row]:
    """Seconds, recovery and memory of both, under the published constraint and without one."""
    setting = _setting(quick, device)
    found: list[Row] = []
    for constraint in (Free(), Paper(setting.clamp.dictionary, setting.clamp.latents)):
        ours = _measured(lambda c=constraint: _batched(setting, c, CONFIG), device)
        theirs = _measured(lambda c=constraint: _loop(setting, c), device)
        found.append(_row(setting, constraint.name, ours, theirs, aim=True))
    exact = Exact(setting.clamp.dictionary, setting.clamp.latents)
    early = AttackConfig(steps=CONFIG.steps, lr=CONFIG.lr, target_margin=0.0)
    ours = _measured(lambda: _batched(setting, exact, early), device)
    found.append(_row(setting, "exact, ended where a row flips, against `paper`", ours, theirs, aim=False))
    return found


def _row(setting: Setting, what: str, ours: Measured, theirs: Measured, *, aim: bool) -> Row:
    n, ratio = len(setting.rows), theirs.seconds / ours.seconds
    memory = [f"{one.megabytes:.0f} MB" if one.megabytes is not None else "not known" for one in (ours, theirs)]
    return Row(
        work=f"attack {n} IOI prompts on {BASE} at {setting.clamp.site}, {CONFIG.steps} steps, {what}",
        against="one prompt at a time, a full forward pass a step",
        ours=f"{shown(ours.seconds)}, {ours.recovered} of {n} recovered",
        theirs=f"{shown(theirs.seconds)}, {theirs.recovered} of {n} recovered",
        ratio=ratio,
        aim=f"≥ {AIM:g}×, as many recovered" if aim else "–",
        met=ratio >= AIM and ours.recovered >= theirs.recovered if aim else None,
        note=f"with reading the prompts; memory above what the model takes: {memory[0]}, theirs {memory[1]}",
    )


def _measured(way: Any, device: str) -> Measured:
    before = _fresh_peak()
    started = now(device)
    recovered = way()
    seconds = now(device) - started
    return Measured(seconds, recovered, None if before is None else (peak() - before) / 1024)


def _fresh_peak() -> int | None:
    """KiB that are resident now, from which on the peak is counted; None where the system does not count anew."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would hide new allocations
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return peak()


def _batched(setting: Setting, constraint: Any, config: AttackConfig) -> int:
    prompts = [row.prompt for row in setting.rows]
    suffix = suffix_of(setting.model, prompts, setting.clamp.site, defence=[setting.clamp])
    radius = torch.full((len(prompts),), setting.radius, device=suffix.entering.device)
    wanted = choice_margin(setting.rows, suffix.entering.device)
    found: AttackResult = attack(suffix, wanted, constraint, radius, config)
    return int(found.recovered.sum())


def _loop(setting: Setting, constraint: Any) -> int:
    """As the published runner does it: the whole model on the whole prompt, every latent encoded, in every step."""
    return sum(_one(setting, constraint, row) for row in setting.rows)


def _one(setting: Setting, constraint: Any, row: Choice) -> bool:
    model, clamp = setting.model, setting.clamp
    device = next(model.parameters()).device
    dictionary, latents = clamp.dictionary, clamp.latents
    tokens = torch.tensor([row.prompt], device=device)
    delta = torch.zeros(1, 1, dictionary.d_in, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=CONFIG.lr * setting.radius / math.sqrt(dictionary.d_in))

    def defend_and_perturb(module: nn.Module, args: Any, output: Any) -> Any:
        acts = output[0] if isinstance(output, tuple) else output
        code = dictionary.encode(acts)
        clamped = code.clone()
        clamped[..., latents] = torch.where(code[..., latents] > 0, -VALUE, code[..., latents])
        perturbed = acts + dictionary.decode(clamped, acts) - dictionary.decode(code, acts)
        perturbed = torch.cat([perturbed[:, :-1], perturbed[:, -1:] + delta], 1)
        return (perturbed, *output[1:]) if isinstance(output, tuple) else perturbed

    recovered = False
    handle = decoder_blocks(model)[clamp.site.layer].register_forward_hook(defend_and_perturb)
    try:
        for step in range(CONFIG.steps + 1):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, -1]
            margin = logits[row.gold] - logits[row.others[0]]
            recovered |= bool(margin > 0)
            if step == CONFIG.steps:
                break
            optimiser.zero_grad()
            (-margin).backward()
            assert delta.grad is not None
            delta.grad = constraint.gradient(delta.grad)
            optimiser.step()
            with torch.no_grad():
                delta *= (setting.radius / delta.norm()).clamp_max(1)
    finally:
        handle.remove()
    return recovered


def _setting(quick: bool, device: str) -> Setting:
    tokenizer, pairs = load_tokenizer(seed_path(BASE)), name_pairs()
    steps = 160 if quick else 300
    model = teach(seed_path(BASE), handing_lessons(tokenizer, pairs, seed=0), TeachConfig(steps=steps)).to(device)
    texts = [[*one.prompt, *one.answer] for one in (handing_lesson(tokenizer, h) for h in handings(pairs, 10, seed=1))]
    spec = DictionarySpec(site=SITE, pairing=Pairing(kind="tuned"), expansion=8, settings={"k": 16}, lr=2e-3)
    config = TrainingConfig(steps=300, batch=1024)
    source = {SITE: _drawn(_acts(model, texts), 1024)}
    made = train_dictionaries([spec], source, config, d_model=128, device=device)[0].dictionary
    select, test = (handing_choices(tokenizer, handings(pairs, n, seed=2 + n)) for n in (3, 10))
    chosen = by_attribution(model, SITE, made, Select(tuple(select)), LATENTS)
    clamp = Clamp(SITE, made, chosen.latents, "negative-if-active", VALUE)
    before, after = (judge_choices(model, test, SITE, defence=edits) for edits in ((), (clamp,)))
    valid = [test[i] for i in valid_choices(test, before, after).rows]
    rows = [valid[i] for i in spread([row.cluster for row in valid], 16 if quick else 64)]
    bare = suffix_of(model, [row.prompt for row in rows], SITE)
    return Setting(model, clamp, rows, float(bare.entering[:, 0].norm(dim=-1).median()))


def _acts(model: nn.Module, texts: Sequence[list[int]]) -> Tensor:
    found: list[Tensor] = []
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        acts = read_rows(model, some, [SITE])[0][0]
        found += [own[1 : len(row)] for own, row in zip(acts, some, strict=True)]
    return torch.cat(found)


def _drawn(acts: Tensor, size: int) -> Iterator[PairBatch]:
    rng = torch.Generator().manual_seed(0)
    while True:
        some = acts[torch.randint(len(acts), (size,), generator=rng).to(acts.device)]
        yield PairBatch(some, some)
