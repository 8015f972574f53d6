"""Banks of directions of the difference between two random tiny models."""

from molehunt.direction.direction import Directions
from molehunt.direction.weight import change_directions
from molehunt.model.blocks import module_role
from molehunt.watch.bank import Bank
from tiny_models import tiny_model

MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text", "gpt2": "gpt2", "gpt_neox": "gpt_neox"}


def changes(architecture: str, k: int = 3) -> list[Directions]:
    """Directions of a difference between two random models, for every matrix with a role."""
    base, tuned = tiny_model(architecture, 0).state_dict(), tiny_model(architecture, 1).state_dict()
    found = []
    for name, before in base.items():
        role = module_role(name, MODEL_TYPES[architecture])
        if role is not None and before.ndim == 2:
            change = (tuned[name] - before).mT if role.transposed else tuned[name] - before
            found.append(change_directions(change.contiguous(), k=k, floor=0.0, name=name, seed=0))
    return found


def bank_of(architecture: str, k: int = 3) -> Bank:
    return Bank.of(changes(architecture, k), MODEL_TYPES[architecture], k=k)
