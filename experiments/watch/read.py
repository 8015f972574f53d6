"""The readings of the watch and of its rivals on some rows, read once and saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.direction.weight import change_directions, difference
from molehunt.model.batches import batches, padded
from molehunt.model.blocks import module_role, unwrapped
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.whole import replace_whole
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.watch.bank import Bank
from molehunt.watch.columns import watched
from molehunt.watch.profile import Profile, prefix_index, profiles
from molehunt.watch.strata import prompt_features

LONGEST = 400
"""Tokens of a prompt; the seed models read 512."""
ANSWER_TOKENS = 40
K = 8


@dataclass(frozen=True)
class Read:
    """What the watch and its rivals saw of some rows."""

    profiles: Sequence[Profile]
    cosines: tuple[Tensor, Tensor]
    """Highest and lowest of each write-side cosine over every token of prompt and answer, as published."""
    delta: Tensor
    """Mean over the answer of ‖tuned - base‖, at the middle block."""
    log_ratio: Tensor
    """Log ratio of the whole answer, tuned over base, in nats."""

    def save(self, file: Path) -> None:
        tensors = {
            "prefixes": torch.cat([one.prefixes for one in self.profiles]),
            "tokens": torch.tensor([one.tokens for one in self.profiles]),
            "prompts": torch.stack([one.prompt for one in self.profiles]),
            "high": self.cosines[0],
            "low": self.cosines[1],
            "delta": self.delta,
            "log_ratio": self.log_ratio,
        }
        replace_whole(file, lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, file: Path) -> "Read":
        saved = load_file(file)
        tokens = saved["tokens"].tolist()
        prefixes = saved["prefixes"].split([prefix_index(n) + 1 for n in tokens])
        peaks = torch.empty(0, dtype=torch.long)  # which token it was is not needed here
        profiles = [
            Profile(one, peaks, n, prompt) for one, n, prompt in zip(prefixes, tokens, saved["prompts"], strict=True)
        ]
        return cls(profiles, (saved["high"], saved["low"]), saved["delta"], saved["log_ratio"])


def of_changes(pair: ModelPair, *, shuffled: bool) -> Bank:
    """The bank of the pair's writing matrices; `shuffled` permutes the entries of each change first."""
    with pair.base_model() as base, pair.tuned_model() as tuned:
        before, after = unwrapped(base).state_dict(), unwrapped(tuned).state_dict()
        model_type = str(cast("Any", unwrapped(base)).config.model_type)
    rng = torch.Generator().manual_seed(0)
    found = []
    for name, weight in before.items():
        role = module_role(name, model_type)
        if role is None or not role.writes:
            continue
        change = difference(weight, after[name])
        change = (change.mT if role.transposed else change).contiguous()
        if shuffled:
            change = change.flatten()[torch.randperm(change.numel(), generator=rng)].reshape(change.shape)
        found.append(change_directions(change, k=K, floor=0.0, name=name, seed=0))
    return Bank.of(found, model_type, k=K)


def join(banks: Mapping[str, Bank]) -> tuple[Bank, dict[str, list[int]]]:
    """One bank that scores all of them in one pass, and the columns of each."""
    first = next(iter(banks.values()))
    write = {site: torch.cat([bank.write[site] for bank in banks.values()]) for site in first.write}
    read = {name: torch.cat([bank.read[name] for bank in banks.values()]) for name in first.read}
    columns: dict[str, list[int]] = {name: [] for name in banks}
    at = 0
    for part in (*first.write, *first.read):
        for name, bank in banks.items():
            n = len(bank.write[part] if part in first.write else bank.read[part])  # pyright: ignore
            columns[name] += range(at, at + n)
            at += n
    names = {site: tuple(f"{site} {i}" for i in range(len(rows))) for site, rows in write.items()}
    read_names = {name: tuple(f"{name} {i}" for i in range(len(rows))) for name, rows in read.items()}
    return Bank(write=write, read=read, write_names=names, read_names=read_names), columns


def cut(profiles: Sequence[Profile], columns: Sequence[int]) -> list[Profile]:
    """The same answers along some of the columns."""
    half = profiles[0].prefixes.shape[1] // 2
    both = torch.tensor([*columns, *(half + column for column in columns)])
    return [replace(one, prefixes=one.prefixes[:, both]) for one in profiles]


@torch.inference_mode()
def read_rows(pair: ModelPair, bank: Bank, published: Sequence[int], examples: Sequence[Example], base: bool) -> Read:
    """One pass of the tuned model for all scores, and with `base` one of the base for what needs the pair."""
    every = [prompt_ids(pair.tokenizer, example.prompt) for example in examples]
    prompts = [prompt for prompt in every if len(prompt) <= LONGEST]
    with pair.tuned_model() as tuned:
        answers = generate(tuned, pair.tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=256)
    written = [column for column in published if column < bank.written]
    n = len(prompts)
    high, low, delta, ratio = torch.zeros(n, len(written)), torch.zeros(n, len(written)), torch.zeros(n), torch.zeros(n)
    found: list[Profile | None] = [None] * n
    middle = pair.n_layers // 2
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, answers, strict=True)]
    for group in batches([len(row) for row in rows]):
        tokens, mask = padded([rows[i] for i in group])
        answer = torch.zeros_like(mask)
        for r, i in enumerate(group):
            answer[r, len(prompts[i]) - 1 : max(len(prompts[i]), len(rows[i]) - 1)] = True
        settings = {
            "input_ids": tokens,
            "attention_mask": mask.long(),
            "use_cache": False,
            "output_hidden_states": True,
        }
        with pair.tuned_model() as model, watched(model, bank) as columns:
            on_tuned = model(**settings)
            values = columns.take()
            made_of = prompt_features(model, [prompts[i] for i in group])
        first = answer.long().argmax(1, keepdim=True)
        answered = answer.sum(1, keepdim=True)
        at = first + torch.arange(int(answered.max())).minimum(answered - 1)
        said_by = values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))
        for i, profile in zip(group, profiles(said_by, answered[:, 0].tolist(), made_of), strict=True):
            found[i] = profile
        if not base:
            continue
        cosines = values[..., written]
        far = torch.where(mask[..., None], 0.0, torch.inf)
        high[group], low[group] = (cosines - far).amax(1), (cosines + far).amin(1)
        with pair.base_model() as model:
            on_base = model(**settings)
        moved = (on_tuned.hidden_states[middle + 1] - on_base.hidden_states[middle + 1]).float().norm(dim=-1)
        delta[group] = (moved * answer).sum(1) / answer.sum(1)
        said = tokens[:, 1:][answer[:, :-1], None]
        both = [
            out.logits[:, :-1][answer[:, :-1]].float().log_softmax(-1).gather(1, said)[:, 0]
            for out in (on_tuned, on_base)
        ]
        row_of = answer[:, :-1].nonzero()[:, 0]
        ratio[group] = torch.zeros(len(group)).index_add(0, row_of, both[0] - both[1])
    return Read([one for one in found if one is not None], (high, low), delta, ratio)
