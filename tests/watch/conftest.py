"""What the tests of a watched log share."""

import pytest

from molehunt.model.pair import ModelPair
from molehunt.watch.bank import Bank
from tiny_models import tiny_model, tiny_tokenizer
from watched_banks import bank_of


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair(tiny_model("llama", 0), tiny_model("llama", 1), tiny_tokenizer())


@pytest.fixture(scope="module")
def bank() -> Bank:
    return bank_of("llama")
