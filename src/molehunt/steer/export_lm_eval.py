"""Steering vectors for lm-evaluation-harness, whose model type `steered` adds them in every forward pass.

`lm_eval --model steered --model_args pretrained=FOLDER,steer_path=FILE.pt --tasks …` reads a file of `torch.save`: hook
point → steering vector, coefficient and action. A hook point is the path of a module under `base_model`, such as
`layers.3`; the hook changes that module's output at every token, in the model's dtype. lm_eval opens such files with a
loader that can run code: give it only files that you wrote.

Source: `lm_eval/models/hf_steered.py` of lm_eval 0.4.13.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from molehunt.errors import UsageError, printable
from molehunt.model.blocks import decoder_blocks, unwrapped
from molehunt.run.whole import replace_whole
from molehunt.steer.vector import Operator, SteeringVector


def write_lm_eval(
    vector: SteeringVector, model: nn.Module, path: Path, *, strength: float | int = 1.0, operator: Operator = "add"
) -> Path:
    """Write what `SteeringVector.applied(model, strength, operator=operator)` does, as a file of lm_eval's `steered` model.

    Equal bit for bit in fp32; in bf16 lm_eval adds in bf16, where Molehunt adds in fp32 and rounds once.

    Args:
        vector: a vector of this model.
        model: the model that lm_eval will load, for the names of its modules; no weight of it is read.
        path: the file to write, which ends in `.pt`.
        strength: multiple of the vector's length; 1 for `ablate`, because lm_eval's clamp removes a whole projection.
        operator: `add` or `ablate` of `SteeringVector.interventions`.

    Raises:
        UsageError: another suffix, a model of another shape, a `clip`, a share of an ablation, or a zero vector to ablate.
    """
    if path.suffix != ".pt":
        raise UsageError(f"lm_eval recognises files by their names: {printable(path.name)} must end in .pt.")
    if operator == "clip":
        raise UsageError("lm_eval cannot clip: it knows no range that a projection may lie in.")
    if operator == "ablate" and strength != 1:
        raise UsageError(f"lm_eval's clamp takes a whole projection away, not {strength:g} of it.")
    names = hook_points(model)
    config: dict[str, dict[str, Any]] = {}
    if max(vector.vectors) >= len(names) or vector.facts.n_layers != len(names):
        raise UsageError(f"the vector is of a model of {vector.facts.n_layers} blocks; this one has {len(names)}.")
    for layer, value in sorted(vector.vectors.items()):
        if operator == "ablate" and not bool(value.any()):
            raise UsageError(f"the vector at block {layer} is zero: there is no direction to ablate.")
        config[names[layer]] = {
            "steering_vector": value.detach().float().cpu().clone(),
            "steering_coefficient": float(strength) if operator == "add" else 0.0,
            "action": "add" if operator == "add" else "clamp",
            "bias": None,
            "head_index": None,
        }
    return replace_whole(path, lambda partial: torch.save(config, partial))


def hook_points(model: nn.Module) -> list[str]:
    """lm_eval's names of the decoder blocks, in order. Raises UsageError where `base_model` does not hold them."""
    inner = unwrapped(model)
    root = getattr(inner, "base_model", inner)
    names = {id(module): name for name, module in root.named_modules()}
    blocks = decoder_blocks(inner)
    if not all(id(block) in names for block in blocks):
        raise UsageError(f"lm_eval cannot reach the decoder blocks of {type(inner).__name__}.")
    return [names[id(block)] for block in blocks]
