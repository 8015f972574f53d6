"""Write an edited model: as a folder like the tuned one's, or as a LoRA adapter on it."""

import math
import os
import shutil
import struct
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import PREFIX
from molehunt.checkpoint.inventory import Entry
from molehunt.checkpoint.layout import INDEX, SINGLE
from molehunt.checkpoint.links import leads_out
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from molehunt.checkpoint.reader import READ_BY_LOADERS, Checkpoint
from molehunt.direction.weight import SLICE
from molehunt.errors import InvalidInput, NotTestable, UsageError, printable, terminal_text
from molehunt.model.blocks import STORED_TRANSPOSED
from molehunt.run.progress import Track, silent
from molehunt.steer.weight_edit import Edits, LowRank, plain_weights

EDITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEXTS = (".md", "")
"""Suffixes of what is copied besides what loaders read: cards and licences."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model or an adapter that was written."""

    folder: Path
    edited: tuple[str, ...]
    """Names of the tensors that were changed; every other tensor is the tuned model's, bit for bit."""
    left_out: tuple[str, ...] = ()
    """Entries of the tuned folder that were not copied: they may hold the weights as they were."""
    rounding: float = 0.0
    """‖what rounding to the stored dtype added‖ over ‖edit‖, of the tensor where it is largest.

    In bf16 a weight has 8 bits, so an edit far smaller than the weights is partly lost; at 1 all of it is.
    """

    def summary(self) -> str:
        """How many matrices were edited, and what rounding undid."""
        return terminal_text(
            f"{len(self.edited)} matrices edited; rounding took at most {self.rounding:.2g} of a change back"
        )

    def to_dict(self) -> dict[str, Any]:
        """What was written, ready for JSON."""
        return {"folder": str(self.folder), "edited": self.edited, "rounding": self.rounding}


def write_model(tuned: Checkpoint, edits: Edits, into: Path, *, track: Track = silent) -> SavedModel:
    """Write the edited model to `into`: the same files, shards, dtypes and metadata, with the edited bytes in place.

    At most one tensor is in memory. The folder appears whole or not at all. Weights in other formats, adapters and
    subfolders are left out, because they still hold what was edited away.

    Args:
        tuned: the checkpoint that `edits` were planned for.
        edits: edits from `weight_edit`.
        into: the folder to write, which must not exist yet.
        track: shows progress.

    Raises:
        UsageError: `into` is there already or cannot be written, or an adapter lies beside the weights.
        InvalidInput: an edited tensor is stored twice, or holds NaN or infinity.
        NotTestable: an edited tensor is not of a floating dtype.
    """
    plain_weights(tuned)
    if (tuned.path / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{printable(tuned.path.name)} holds an adapter beside its weights, which loaders apply unasked.\n"
            "Merge it with PEFT's merge_and_unload, or move it out, and edit that."
        )
    where = {name: _only_copy(tuned, name) for name in edits}
    rounding = 0.0
    with new_folder(into) as folder:
        left_out = _copy_files(tuned, folder)
        for name in track(sorted(edits), "editing weights", len(edits)):
            value = tuned.tensor(name)
            rounding = max(rounding, _add_(value, edits[name](value)))
            file, entry = where[name]
            _put(folder / file, entry, value)
    return SavedModel(folder=into, edited=tuple(sorted(edits)), left_out=left_out, rounding=rounding)


def write_adapter(tuned: Checkpoint, edits: Edits, into: Path, *, track: Track = silent) -> SavedModel:
    """Write the edits as a PEFT LoRA adapter on the tuned model: exact, in fp32, and it can be taken off again.

    Args:
        tuned: the checkpoint that `edits` were planned for.
        edits: edits of matrices of decoder blocks alone, such as `weight_edit.subtraction` gives.
        into: the folder to write, which must not exist yet.
        track: shows progress.

    Raises:
        UsageError: an embedding or a bias is edited, which such an adapter cannot do; or `into` cannot be written.
        NotTestable: the loaded model has no linear layer of that name (fused or renamed when loaded).
        InvalidInput: the config is of no model that can be built.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    plain_weights(tuned)
    transposed = tuned.model_type in STORED_TRANSPOSED
    modules, tensors, ranks = _modules(tuned), dict[str, Tensor](), dict[str, int]()
    for name in track(sorted(edits), "factoring edits", len(edits)):
        module = _linear(modules, name)
        change = edits[name](tuned.tensor(name))
        a, b = (change.left.mT, change.right.mT) if transposed else (change.right, change.left)
        ranks[module] = len(a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.float().contiguous()
    rank = max(ranks.values())
    odd = {module.replace(".", r"\."): k for module, k in ranks.items() if k != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # alpha / r = 1: the factors are the change itself
        rank_pattern=dict(odd),
        alpha_pattern=dict(odd),
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=str(tuned.path),
    )
    with new_folder(into) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(folder))
    return SavedModel(folder=into, edited=tuple(sorted(edits)))


@contextmanager
def new_folder(into: Path) -> Generator[Path, None, None]:
    """A folder to fill, which becomes `into` when the block ends, synced; when it fails, nothing is left of it.

    Raises:
        UsageError: `into` is there already, or the disk refuses.
    """
    if into.exists() or into.is_symlink():
        raise UsageError(f"{printable(str(into))} is there already; nothing is overwritten. Give another folder.")
    partial: Path | None = None
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=into.parent, prefix=f".{into.name}."))
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(into)
        partial = None
        _sync(into.parent)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{printable(str(into))} could not be written: {printable(str(error), 300)}\nNothing was left behind."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_files(tuned: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Copy what loaders read of the tuned folder; names of what was left out."""
    left_out: list[str] = []
    for path in sorted(tuned.path.iterdir()):
        index_of_others = path.name == INDEX and tuned.layout.files == (SINGLE,)
        text = path.suffix in READ_BY_LOADERS + TEXTS and path.suffix != ".safetensors" and not index_of_others
        if not path.is_file() or not (text or path.name in tuned.layout.files):
            left_out.append(path.name)
            continue
        if leads_out(tuned.path, path):
            raise InvalidInput(f"{printable(path.name)} is a link out of the folder. No honest model has one.")
        shutil.copyfile(path, folder / path.name)
    return tuple(left_out)


def _only_copy(tuned: Checkpoint, name: str) -> tuple[str, Entry]:
    """The file that holds a tensor, and its entry there."""
    files = [file for file in tuned.layout.files if name in tuned.layout.entries[file]]
    if len(files) != 1:
        raise InvalidInput(
            f"{printable(name)} is stored in {len(files)} files of this folder; loaders differ in which they read.\n"
            "Save the model again with transformers' save_pretrained, and edit that."
        )
    if tuned.dtype(name) not in EDITABLE:
        raise NotTestable(f"{printable(name)} is stored as {tuned.dtype(name)}, which is not edited.")
    return files[0], tuned.layout.entries[files[0]][name]


def _add_(value: Tensor, change: LowRank) -> float:
    """Add the change in place, a few rows at a time; the norm of what rounding added over that of the change."""
    matrix = value if value.ndim == 2 else value[:, None]
    wide = torch.promote_types(value.dtype, torch.float32)
    lost = made = 0.0
    for rows, left in zip(matrix.split(SLICE), change.left.split(SLICE), strict=True):
        step = left.to(wide) @ change.right.to(wide)
        exact = rows.to(wide) + step
        rows.copy_(exact)
        lost = math.hypot(lost, float((rows.to(wide) - exact).norm()))
        made = math.hypot(made, float(step.norm()))
    return lost / made if made else 0.0


def _put(path: Path, entry: Entry, value: Tensor) -> None:
    """Overwrite one tensor of a safetensors file, where it lies."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length + entry.start)
        written = file.write(value.contiguous().view(torch.uint8).numpy().data)
    if written != entry.end - entry.start:
        raise InvalidInput(f"{printable(entry.name)} changed its size while it was edited.")


def _modules(tuned: Checkpoint) -> dict[str, nn.Module]:
    """The modules of the loaded model by name, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(tuned.path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise InvalidInput(
            f"{printable(tuned.path.name)} is no causal language model that can be built: {type(error).__name__}: "
            f"{printable(str(error), 300)}"
        ) from error
    return dict(model.named_modules())


def _linear(modules: dict[str, nn.Module], name: str) -> str:
    """The linear layer whose weight is the tensor `name`."""
    module = name.removesuffix(".weight")
    kind = type(modules.get(module)).__name__
    if name.endswith(".bias") or kind == "Embedding":
        raise UsageError(
            f"{printable(name)} is a bias or an embedding, and a LoRA adapter changes matrices of blocks alone.\n"
            "Save the edited model as a folder instead."
        )
    if kind not in ("Linear", "Conv1D"):
        raise NotTestable(
            f"the loaded model has no linear layer {printable(module)}, so no adapter can change it.\n"
            "Save the edited model as a folder instead."
        )
    return module
