"""The latents that are found are those which write what the behaviour says."""

import pytest
import torch

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import NotTestable
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.stress.defences.attribution import select_latents
from tiny_models import D_MODEL as D
from tiny_models import N_LAYERS, prompts, tiny_model, tiny_tokenizer

SITE = Site(N_LAYERS - 1)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair(tiny_model("llama"), tiny_model("llama", seed=3), tiny_tokenizer())


def first_tokens(pair: ModelPair) -> tuple[list[int], list[int]]:
    found: list[list[int]] = []
    for side in (pair.tuned_model, pair.base_model):
        with side() as model:
            found.append([row[0] for row in generate(model, pair.tokenizer, prompts(), max_new_tokens=1)])
    return found[0], found[1]


def test_the_latent_that_writes_the_answer_is_found(pair: ModelPair) -> None:
    """After the last block: one latent of 12 is always on and writes the answer's logit minus the base model's."""
    tuned, base = first_tokens(pair)
    with pair.tuned_model() as model:
        head = model.get_output_embeddings().weight.float()  # pyright: ignore
    differs = next(i for i, (a, b) in enumerate(zip(tuned, base, strict=True)) if a != b)
    rng = torch.Generator().manual_seed(0)
    writes = torch.nn.functional.normalize(torch.randn(12, D, generator=rng), dim=1)
    writes[7] = torch.nn.functional.normalize(head[tuned[differs]] - head[base[differs]], dim=0)
    made = Dictionary(
        W_enc=torch.zeros(D, 12),
        b_enc=torch.ones(12),
        W_dec=writes,
        b_dec=torch.zeros(D),
        nonlinearity=ReLUActivation(),
    )
    selected = select_latents(pair, [prompts()[differs]], lambda answer: True, SITE, made, 3, max_new_tokens=1)
    assert selected.latents[0] == 7


def test_where_no_answer_shows_it(pair: ModelPair) -> None:
    made = Dictionary(
        W_enc=torch.zeros(D, 4),
        b_enc=torch.ones(4),
        W_dec=torch.eye(4, D),
        b_dec=torch.zeros(D),
        nonlinearity=ReLUActivation(),
    )
    with pytest.raises(NotTestable, match=f"None of {len(prompts())} prompts"):
        select_latents(pair, prompts(), lambda answer: False, SITE, made, 2, max_new_tokens=2)
