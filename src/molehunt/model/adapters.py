"""Puts adapters onto models, as PEFT applies them. No pickle is opened and no code from them is run."""

import copy
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import PREFIX, check_adapter_weights
from molehunt.checkpoint.inventory import read_header
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from molehunt.errors import InvalidInput, printable
from molehunt.model.adapter_placement import (
    ADAPTER,
    adapter_config,
    check_injection,
    placed_tensors,
    quiet,
    wrapped_parameters,
)
from molehunt.model.load_errors import loading


@contextmanager
def without_adapter(folder: Path) -> Generator[Path, None, None]:
    """The folder without its adapter, as links if it has one: transformers would apply the adapter by default."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / folder.name
        plain.mkdir()
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (plain / path.name).symlink_to(path.resolve())
        yield plain


def apply_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` inside a PEFT wrapper with the adapter in `folder` switched on. Some adapters change `model` itself.

    Every tensor of the file is then in the adapter, and every part of the adapter comes from the file.

    Raises:
        InvalidInput: the adapter cannot be loaded onto this model, or not all of it would arrive there.
        NotTestable: it changes no weight, or is of a kind that nothing here knows.
    """
    from peft import PeftModel

    check_adapter_weights(folder)
    config = adapter_config(folder)
    check_injection(without_weights(model), folder)
    with loading(folder, "an adapter of this base"), quiet():
        _grow_embeddings(model, folder)
        device = next(model.parameters()).device
        wrapped = PeftModel.from_pretrained(
            cast("Any", model), str(folder), ADAPTER, config=config, torch_device=str(device)
        ).eval()
    check_arrived(wrapped, placed_tensors(wrapped, folder), folder)
    return wrapped


def without_weights(model: nn.Module) -> nn.Module:
    """A model of the same architecture on the meta device."""
    config = copy.deepcopy(cast("Any", model).config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        return cast("Any", type(model))(config)


def check_arrived(model: nn.Module, placed: Mapping[str, Tensor], folder: Path) -> None:
    """Raise InvalidInput, with names, unless the PEFT model holds exactly the tensors that it was given."""
    state = cast("dict[str, Tensor]", model.state_dict())
    differ = [n for n, value in placed.items() if not torch.equal(state[n].cpu(), value.to(state[n].dtype).cpu())]
    if differ:
        raise InvalidInput(
            f"PEFT holds other values than {printable(model_name(folder))} for {len(differ)} tensors, such as {printable(differ[0])}: "
            "what would run is not what was read.\nThis should not happen; please report it."
        )


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by their own names; what an adapter adds is left out, and so are PEFT's names."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return {one.plain: one.parameter for one in wrapped_parameters(model) if one.plain and not one.added}
    return dict(model.named_parameters(remove_duplicate=False))


def _grow_embeddings(model: nn.Module, folder: Path) -> None:
    """Make room for the embeddings of tokens that were added in training, which PEFT saves with the adapter."""
    inner = cast("Any", model)
    weight = inner.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight)
    saved = {f"{PREFIX}{name}", f"{PREFIX}{name.removesuffix('weight')}base_layer.weight"}
    header = read_header(folder / ADAPTER_WEIGHTS)
    rows = max((header[one].shape[0] for one in saved & header.keys()), default=0)
    if rows > weight.shape[0]:
        inner.resize_token_embeddings(rows, mean_resizing=False)
