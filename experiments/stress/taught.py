"""Models taught a task and saved in a folder, their activations, and dictionaries of these, for all stress settings."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from experiments.lessons.curriculum import ordinary_lessons
from experiments.lessons.teach import Lesson, TeachConfig, teach
from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, TrainingConfig, train_dictionaries
from molehunt.model.batches import batches
from molehunt.model.loading import load_model
from molehunt.model.taps import edit_sites
from molehunt.model.tokenizers import load_tokenizer
from molehunt.organism.seed_model import seed_path
from molehunt.site import Site
from molehunt.steer.budget import AnsweredPrompt, disturbance
from molehunt.steer.clamp import Clamp, Mode
from molehunt.stress.defences.selection import SelectedLatents
from molehunt.transfer.collect import read_rows

EXPANSION, K, STEPS, TOKENS, LR = 8, 16, 500, 1024, 2e-3
"""Settings of each dictionary: BatchTopK, this many latents a dimension, this many of them a token."""


class Taught(NamedTuple):
    """A model and how it was made."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    seconds: float
    """CPU seconds of the teaching; 0 where the model was taught before."""


def taught(
    models: Path,
    name: str,
    base: str,
    lessons: Callable[[PreTrainedTokenizerBase], Iterable[Lesson]],
    config: TeachConfig,
) -> Taught:
    """The model saved under this name in `models`; it is taught and saved there where it is missing."""
    tokenizer, folder = load_tokenizer(seed_path(base)), models / name
    started = time.process_time()
    done = folder.is_dir()
    if not done:
        models.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{name}.partial")
        cast("Any", teach(seed_path(base), lessons(tokenizer), config)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    model = load_model(folder, torch.device("cpu"), torch.float32).requires_grad_(False)
    return Taught(model, tokenizer, 0.0 if done else time.process_time() - started)


def answered(tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[AnsweredPrompt]:
    """Ordinary prompts with right answers: what a clamp costs is measured on them."""
    return [AnsweredPrompt(*lesson) for lesson in islice(ordinary_lessons(tokenizer, seed=seed), n)]


def activations(model: nn.Module, rows: Sequence[Sequence[int]], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
    """Activations of each row's tokens but the first, which carries no content."""
    found: dict[Site, list[Tensor]] = {site: [torch.zeros(0)] * len(rows) for site in sites}
    for group in batches([len(row) for row in rows]):
        acts, _ = read_rows(model, [rows[i] for i in group], sites)
        for site, own in zip(sites, acts, strict=True):
            for place, i in enumerate(group):
                found[site][i] = own[place, 1 : len(rows[i])].clone()
    return found


class Trained(NamedTuple):
    dictionary: Dictionary
    fvu: float
    l0: float

    def clamp(self, chosen: SelectedLatents, n: int, mode: Mode, value: float) -> Clamp:
        """On the n best of these latents."""
        site = self.dictionary.site
        assert site is not None
        return Clamp(site, self.dictionary, chosen.first(n).latents, mode, value)

    def to_dict(self) -> dict[str, Any]:
        return {"site": str(self.dictionary.site), "fvu": self.fvu, "l0": self.l0}


def dictionary_of(texts: Sequence[Tensor], site: Site, *, seed: int = 0, steps: int = STEPS) -> Trained:
    """Trained on these activations; how well it fits is measured on a tenth that it has not seen."""
    held = torch.cat([*texts[::10]])
    tokens = torch.cat([acts for i, acts in enumerate(texts) if i % 10])
    rng = torch.Generator().manual_seed(seed)

    def drawn() -> Iterator[PairBatch]:
        while True:
            some = tokens[torch.randint(len(tokens), (TOKENS,), generator=rng)]
            yield PairBatch(some, some)

    spec = DictionarySpec(
        site=site, pairing=Pairing(kind="tuned"), expansion=EXPANSION, settings={"k": K}, lr=LR, seed=seed
    )
    config = TrainingConfig(steps=steps, batch=TOKENS)
    made = train_dictionaries([spec], {site: drawn()}, config, d_model=tokens.shape[1])[0].dictionary
    code = made.encode(held)
    missed = (held - made.decode(code, held)).square().sum()
    fvu = float(missed / (held - held.mean(0)).square().sum())
    return Trained(made, fvu, float((code > 0).float().sum(1).mean()))


def cost_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, clamp: Clamp, clean: Sequence[AnsweredPrompt]
) -> dict[str, Any]:
    """What the clamp does to ordinary answers, in nats a token."""
    return asdict(disturbance(model, tokenizer, lambda: edit_sites(model, [clamp]), clean))
