"""Compares what a loaded model holds with what was read from its folder: an auditor must see the weights that run.

A loader decides by itself which file it opens, which tensor it takes of several, and what it fills with random numbers.
That is not predicted here. Every parameter of the loaded model is compared with the value that the folder's tensors give.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from molehunt.checkpoint.loaded_view import LoadedView, UnknownArchitecture
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable, printable

SHOWN = 3
"""Number of parameters that a message names."""


def check_loaded(model: nn.Module, folder: Path) -> None:
    """Make sure that each parameter of a loaded model has the value that its folder's weights give.

    One parameter at a time is read again, so the check costs about as much time as loading, and the memory of one parameter.
    Weights that are stored quantised are compared as they are stored where the model keeps them so, and else dequantised.

    Args:
        model: as `from_pretrained` made it, without an adapter.
        folder: the folder that it was loaded from.

    Raises:
        InvalidInput: parameters hold other values than the audited tensors, or come from nowhere; the error names them.
        NotTestable: transformers does not know the architecture.
    """
    checkpoint = Checkpoint.open(folder, adapter="ignore")
    try:
        view = LoadedView.of(checkpoint)
    except UnknownArchitecture as error:
        raise NotTestable(str(error)) from None
    view.must_be_complete()
    known = frozenset(view.names())
    wrong: list[str] = []
    for name, value in cast("dict[str, Tensor]", model.state_dict()).items():
        source = view.tied.get(name, name)
        if source not in known:
            wrong.append(f"{printable(name)} comes from no stored tensor")
        elif not _equal(value, view, source):
            stored = printable(", ".join(view.sources(source)[:2]), 120)
            wrong.append(f"{printable(name)} is not what {stored} holds")
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InvalidInput(
            f"{printable(folder.name)} is loaded with other weights than the ones that its files show: "
            f"{'; '.join(wrong[:SHOWN])}{more}.\nNothing that is measured on such a model belongs to this folder. "
            "Get the model saved by save_pretrained."
        )


def _equal(value: Tensor, view: LoadedView, source: str) -> bool:
    """Whether a loaded parameter has the stored value, cast to the type that it was loaded in."""
    if value.device.type == "meta":
        return False
    stored = view.tensor(source, view.checkpoint.stored) if _as_stored(value, view, source) else view.tensor(source)
    return value.shape == stored.shape and torch.equal(value, stored.to(device=value.device, dtype=value.dtype))


def _as_stored(value: Tensor, view: LoadedView, source: str) -> bool:
    """Whether the model keeps a quantised weight as it is stored."""
    quantised = view.checkpoint.quantisation is not None
    return quantised and not (value.is_floating_point() and value.element_size() > 1)
