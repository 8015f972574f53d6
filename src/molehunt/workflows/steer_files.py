"""What a fix is written down as for others: a model with the fix in its weights, and vectors for other programs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import UsageError, terminal_text
from molehunt.model.blocks import unwrapped
from molehunt.model.pair import ModelPair
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.steer.export_gguf import write_gguf
from molehunt.steer.export_lm_eval import write_lm_eval
from molehunt.steer.saved_model import SavedModel, write_adapter, write_model
from molehunt.steer.vector import SteeringVector
from molehunt.steer.weight_edit import orthogonalisation, subtraction
from molehunt.workflows.models import Models, adapter_choice, open_models, open_pair


@checked
def save_fixed(
    base: Models,
    tuned: str | Path | None = None,
    *,
    into: str | Path,
    remove: int | None = None,
    orthogonal_to: SteeringVector | str | Path | None = None,
    as_adapter: bool = False,
    adapter: bool | None = None,
    seed: int = 0,
    track: Track = silent,
) -> SavedModel:
    """Write a fix into the weights: a model folder, or an adapter on the fine-tune. Measure it like any other model.

    Args:
        base: the base's folder or hub id, or a pair that was loaded from folders.
        tuned: the folder or hub id of the fine-tune; left out with a loaded pair.
        into: new folder for the fixed model or the adapter.
        remove: number of the strongest weight directions of every changed matrix that are subtracted.
        orthogonal_to: a vector, or its file, whose direction no matrix may write any more; instead of `remove`.
        as_adapter: write a LoRA adapter on the fine-tune instead of a model.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        seed: seed of the randomised decomposition.
        track: shows progress.

    Raises:
        UsageError: not one of `remove` and `orthogonal_to` was given, the folder is there already, or the vector is for
            another checkpoint.
        NotTestable: the weights are an adapter or quantised.

    Example:
        >>> from molehunt.workflows.steer_files import save_fixed
        >>> save_fixed("BASE", "TUNED", remove=2, into="fixed")  # doctest: +SKIP
    """
    if (remove is None) == (orthogonal_to is None):
        raise UsageError("Give --remove K or --orthogonal-to VECTOR, one of the two.")
    before, model = _checkpoints(base, tuned, adapter)
    if orthogonal_to is not None:
        vector = _loaded(orthogonal_to, model.content_hash())
        layers = sorted(vector.vectors)
        edits = orthogonalisation(model, torch.stack([vector.vectors[layer] for layer in layers]))
    else:
        found = compare_weights(before, model, k=remove or 1, seed=seed, track=track)
        edits = subtraction(model, [one.directions for one in found.matrices if one.directions is not None])
    return (write_adapter if as_adapter else write_model)(model, edits, Path(into), track=track)


@dataclass(frozen=True, kw_only=True)
class ExportedVector:
    """A vector written for another program."""

    file: Path
    left_out: tuple[int, ...] = ()
    """Blocks that the other program cannot steer."""

    def summary(self) -> str:
        """What was written, and what was left out."""
        lines = [f"block {block} is left out: llama.cpp cannot steer it" for block in self.left_out]
        return terminal_text("\n".join([*lines, f"written: {self.file}"]))

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {**asdict(self), "file": str(self.file)}


@checked
def export_vector(
    base: Models,
    tuned: str | Path | None = None,
    *,
    vector: SteeringVector | str | Path,
    to: Literal["gguf", "lm-eval"],
    out: str | Path,
    strength: float | int = 1.0,
    track: Track = silent,
) -> ExportedVector:
    """Write a vector for another program.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        vector: the vector or its file.
        to: `gguf` is llama.cpp's control vector, in which block i is direction i and block 0 is left out; `lm-eval` is
            the file of its model type `steered`.
        out: file to write.
        strength: factor that the vector is multiplied by.
        track: shows progress.

    Raises:
        UsageError: the vector is for another model, or the other program cannot hold it.

    Example:
        >>> from molehunt.workflows.steer_files import export_vector
        >>> export_vector(pair, vector="vector.safetensors", to="gguf", out="vector.gguf")  # doctest: +SKIP
    """
    if isinstance(vector, str | Path):
        vector = SteeringVector.load(Path(vector))
    pair, model_hash = open_pair(base, tuned, track=track)
    vector.refuse(pair.n_layers, pair.d_model, model_hash)
    scaled, left_out = strength * vector, tuple[int, ...]()
    with pair.tuned_model() as model:
        if to == "gguf":
            config: Any = unwrapped(model).config
            left_out = write_gguf(scaled, Path(out), model_hint=str(config.model_type)).left_out
        else:
            write_lm_eval(scaled, model, Path(out))
    return ExportedVector(file=Path(out), left_out=left_out)


def _checkpoints(base: Models, tuned: str | Path | None, adapter: bool | None) -> tuple[Checkpoint, Checkpoint]:
    """The files of both models; nothing is loaded."""
    if isinstance(base, ModelPair):
        return open_models(base, tuned, adapter=adapter).checkpoints
    if tuned is None:
        raise UsageError("give the base and its fine-tune, or one loaded ModelPair.")
    model = Checkpoint.open(local_folder(tuned), adapter=adapter_choice(adapter))
    return Checkpoint.open(local_folder(base)), model


def _loaded(vector: SteeringVector | str | Path, model_hash: str) -> SteeringVector:
    if isinstance(vector, str | Path):
        return SteeringVector.load(Path(vector), model=model_hash)
    vector.refuse_checkpoint(model_hash)
    return vector
