"""Dictionaries of every family with random weights, for activations of the tiny models."""

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.dictionary import Dictionary, InputNorm
from molehunt.dictionary.nonlinearity import GroupMaxActivation, JumpReLUActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import InputScale
from molehunt.run.catalog import load
from tiny_models import D_MODEL as D

F = 24
SETTINGS = {"batch-topk": {"k": 5}, "jumprelu": {"target_l0": 5.0}, "matryoshka": {"k": 5}, "topk": {"k": 5}}
INPUT_NORMS: tuple[InputNorm, ...] = get_args(InputNorm)
FAMILIES = (*sorted(CATALOG), "group-max")


def some_acts(dtype: torch.dtype = torch.float32, seed: int = 4) -> Tensor:
    return (2 * torch.randn(3, 7, D, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def dictionary_of(family: str) -> Dictionary:
    """As a training leaves one of this family behind, with random weights; latents fire on part of the tokens."""
    rng = torch.Generator().manual_seed(3)
    if family == "group-max":
        return replace(dictionary_of("relu"), nonlinearity=GroupMaxActivation(6))
    trainee = load(CATALOG, family, "molehunt.dictionaries")(
        D, F, pairing=Pairing(), seed=0, **SETTINGS.get(family, {})
    )
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    made = trainee.finished(InputScale.of(some_acts(seed=9).reshape(-1, D), 1))
    if isinstance(made.nonlinearity, JumpReLUActivation):
        made = replace(made, nonlinearity=JumpReLUActivation(torch.full((F,), 0.1)))
    return made
