"""A base and its adapter as one module where switching the adapter off gives the base back, and as two elsewhere."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import has_full_weights
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG
from molehunt.errors import NotTestable, UsageError, printable
from molehunt.model.adapter_placement import quiet
from molehunt.model.adapters import apply_adapter, base_parameters
from molehunt.model.loading import checksum, load_model

PROBE = range(1, 9)
"""Token ids whose logits must be the base's, bit for bit, while the adapter is off."""


def applies_adapter(tuned: Path, adapter: bool | None) -> bool:
    """Whether the fine-tune in `tuned` is made with an adapter.

    Args:
        tuned: a model folder, an adapter folder, or both in one.
        adapter: what the user said of an adapter beside full weights.

    Raises UsageError when `adapter` must be given or cannot be followed.
    """
    has_adapter, has_weights = (tuned / ADAPTER_CONFIG).is_file(), has_full_weights(tuned)
    name = printable(model_name(tuned))
    if adapter and not has_adapter:
        raise UsageError(f"{name} holds no adapter ({ADAPTER_CONFIG}) to apply.")
    if has_adapter and has_weights and adapter is None:
        raise UsageError(
            f"{name} holds full weights and an adapter beside them; loaders apply the adapter by default.\n"
            "Say which of the two is meant: --adapter applies it, --no-adapter leaves it out."
        )
    if has_adapter and not has_weights and adapter is False:
        raise UsageError(f"{name} holds only an adapter; --no-adapter leaves nothing.")
    return has_adapter and adapter is not False


def base_and_adapted(
    base: Path, adapter: Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module]:
    """The base and the base under the adapter: one PEFT model twice, if it is the base while its adapter is off.

    PiSSA, trained biases and added tokens change the base itself, and switching the adapter off does not undo that; then
    the base is loaded a second time. Raises as `load_model` and `apply_adapter`.
    """
    model = load_model(base, device, dtype)
    sums, logits = _checksums(model), _logits(model)
    wrapped = apply_adapter(model, adapter)
    return (wrapped if _gives_back(wrapped, sums, logits) else load_model(base, device, dtype)), wrapped


def _gives_back(wrapped: nn.Module, sums: dict[str, int], logits: Tensor) -> bool:
    """Whether a PEFT model with its adapter off has the parameters and the logits that the base had."""
    if _checksums(wrapped) != sums:
        return False
    with quiet(), cast("Any", wrapped).disable_adapter():
        return torch.equal(_logits(wrapped), logits)


def merged_model(wrapped: nn.Module) -> nn.Module:
    """The model that PEFT makes of a base and its adapter, without PEFT. The wrapped model must not be used afterwards.

    Raises NotTestable when this kind of adapter cannot be merged.
    """
    try:
        return cast("nn.Module", cast("Any", wrapped).merge_and_unload())
    except Exception as error:  # each kind of adapter refuses in its own way
        raise NotTestable(
            f"PEFT cannot merge this adapter into its base: {printable(str(error), 200)}\nUse the pair without `apart`."
        ) from error


def _checksums(model: nn.Module) -> dict[str, int]:
    return {name: checksum(parameter) for name, parameter in base_parameters(model).items()}


@torch.inference_mode()
def _logits(model: nn.Module) -> Tensor:
    vocabulary = int(cast("Any", model).get_input_embeddings().weight.shape[0])
    ids = torch.tensor([[token % vocabulary for token in PROBE]], device=next(model.parameters()).device)
    return cast("Any", model)(input_ids=ids, use_cache=False).logits
