"""GGUF files as models: converted once into a plain folder, as transformers reads them, and used from there.

The converted folder lies in Molehunt's cache under the hash of the file. Beside the weights it holds `gguf.json`: the
format of each tensor and the size of its rounding, so that a change within the rounding is not taken for one.
"""

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from molehunt.checkpoint.gguf_facts import FACTS, conversions
from molehunt.checkpoint.gguf_header import GgufHeader, read_gguf_header
from molehunt.errors import InvalidInput, NotTestable, UsageError, printable
from molehunt.run.bounded import bounded
from molehunt.run.extras import install_command
from molehunt.run.progress import Track, busy, silent

VERSION = 2
"""Part of each cached folder's name. Raise it when the conversion comes to give other folders."""
SHARD = 2 * 10**9
"""Number of bytes after which another safetensors file is begun."""


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that `path` means: that file, or the only one of a folder without safetensors. None for all else.

    Raises UsageError for a folder that holds several of them and no other weights.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    if len(found) > 1:
        names = ", ".join(printable(file.name, 60) for file in found[:4])
        raise UsageError(f"{printable(path.name)} holds {len(found)} GGUF files ({names} …). Give one of them.")
    return found[0] if found else None


def gguf_folder(file: Path, track: Track = silent) -> Path:
    """The model folder that `file` was converted into, which is done now if it was not done before.

    Raises:
        InvalidInput: the file is broken, or transformers cannot make a model of it.
        NotTestable: no language model of an architecture that transformers reads from GGUF.
        UsageError: the package gguf is missing, or the cache cannot be written.
    """
    header = _checked(file)
    with busy(track, f"hashing {printable(file.name, 60)}"):
        home = conversions() / f"{_sha256(file)}-{VERSION}"
    if home.is_dir() and (done := [one for one in home.iterdir() if (one / FACTS).is_file()]):
        return done[0]
    name = "".join(c if c.isalnum() or c in "-_. " else "_" for c in file.stem).strip(". ")[:80] or "model"
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=home.parent) as making:
            _convert(file, header, Path(making) / name, track, exact=True)
            try:
                os.rename(making, home)
            except OSError:  # another process was first
                return gguf_folder(file, track)
            Path(making).mkdir()  # what the context manager takes away
    except OSError as error:
        raise UsageError(
            f"{printable(file.name)} cannot be converted in {home.parent}: {error.strerror}.\n"
            f"It takes {4 * header.elements / 1e9:.1f} GB there. Set MOLEHUNT_CACHE to another folder."
        ) from error
    return home / name


def convert_gguf(file: Path, folder: Path, track: Track = silent) -> None:
    """Write the model in `file` as a plain folder of safetensors, config, tokenizer and chat template.

    The folder stands for itself: quantised weights are rounded to bf16, and nothing says that they were quantised. Raises
    what `gguf_folder` does.
    """
    _convert(file, _checked(file), folder, track, exact=False)
    (folder / FACTS).unlink()


def _checked(file: Path) -> GgufHeader:
    try:
        import gguf as _gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UsageError(
            f"{printable(file.name)} is a GGUF file; reading it needs an extra: {install_command('gguf')}"
        ) from None
    found: GgufHeader = _header_in_child(file)
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {str(name).replace("_", "").replace("-", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if found.architecture.replace("_", "").replace("-", "") not in known:
        raise NotTestable(
            f"{printable(file.name)} holds a model of the architecture {printable(repr(found.architecture), 60)}, which this "
            "transformers does not read from GGUF.\nGive the folder of safetensors that the file was made of."
        )
    return found


def _header_in_child(file: Path) -> GgufHeader:
    """The header; long lists of an attacker's are walked in a child with a limit of time."""
    bounded(lambda: bool(read_gguf_header(file)), what=file.name, seconds=20, megabytes=512)
    return read_gguf_header(file)


def _convert(file: Path, header: GgufHeader, folder: Path, track: Track, *, exact: bool) -> None:
    seconds = 120 + header.elements / 10**6
    most = max(tensor.elements for tensor in header.tensors)
    needed = file.stat().st_size + 4 * header.elements + 16 * most
    folder.mkdir(parents=True, exist_ok=True)
    with busy(track, f"converting {printable(file.name, 60)} ({header.elements / 1e6:.0f}M weights, once)"):
        bounded(
            lambda: _write_folder(file, header, folder, exact),
            what=file.name,
            seconds=seconds,
            megabytes=2048 + needed // 2**20,
        )


def _write_folder(file: Path, header: GgufHeader, folder: Path, exact: bool) -> None:
    """Convert with transformers' own functions. Runs in a child, which alone sees the cached reader."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read_anew = gguf.GGUFReader
    gguf.GGUFReader = cache(read_anew)  # it is opened four times, and takes 10 s for a vocabulary of 262,144
    dtype = _stored_type(header, exact)
    try:
        with tempfile.TemporaryDirectory() as alone:  # so that no other file of the folder is read with it
            link = Path(alone) / "model.gguf"
            link.symlink_to(file.resolve())
            config: Any = AutoConfig.from_pretrained(alone, gguf_file=link.name, trust_remote_code=False)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            parsed: Any = load_gguf_checkpoint(str(link), return_tensors=True, model_to_load=model, torch_dtype=dtype)
            tensors: dict[str, Any] = {name: value.to(dtype) for name, value in parsed["tensors"].items()}
            _check_complete(file, model, tensors)
            _write_weights(tensors, folder)
            facts = _facts(file, header, model, gguf.GGUFReader(str(link)))
            if header.arrays.get("tokenizer.ggml.tokens"):
                tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file=link.name, trust_remote_code=False)
                tokenizer.save_pretrained(folder)
    finally:
        gguf.GGUFReader = read_anew
    _write_config(config, model, dtype, folder)
    for name, text in header.templates().items():
        beside = folder / "additional_chat_templates"
        beside.mkdir(exist_ok=True)
        (beside / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)[:80]}.jinja").write_text(text)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")


def _stored_type(header: GgufHeader, exact: bool) -> Any:
    """The type in which weights are stored: one that holds all of the file's values exactly, or else at most 16 bits."""
    import torch

    types = {tensor.type for tensor in header.tensors}
    if types <= {"BF16"}:
        return torch.bfloat16
    if types <= {"F16"}:
        return torch.float16
    return torch.float32 if exact or types <= {"F32", "F64"} else torch.bfloat16


def _check_complete(file: Path, model: Any, tensors: dict[str, Any]) -> None:
    """Refuse a file that lacks weights of its architecture, or whose weights have other shapes."""
    expected: dict[str, Any] = model.state_dict()
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set[str]()
    missing = sorted(set(expected) - set(tensors) - tied)
    if missing:
        raise InvalidInput(
            f"{printable(file.name)} has no {printable(missing[0])}"
            + (f" and lacks {len(missing) - 1} tensors more" if len(missing) > 1 else "")
            + ", as transformers reads it.\nGive the folder of safetensors that it was made of."
        )
    for name, value in tensors.items():
        if name not in expected or tuple(value.shape) != tuple(expected[name].shape):
            wanted = list(expected[name].shape) if name in expected else "nothing"
            raise InvalidInput(
                f"{printable(file.name)}: {printable(name)} has the shape {list(value.shape)}, and its config asks for {wanted}."
            )


def _write_weights(tensors: dict[str, Any], folder: Path) -> None:
    """Write safetensors, in several files with an index where one would be long."""
    from safetensors.torch import save_file

    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name in sorted(tensors):
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name].contiguous()
        size += tensors[name].nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_config(config: Any, model: Any, dtype: Any, folder: Path) -> None:
    """Write config.json and generation_config.json. GGUF holds numbers in fp32: 1e-05 is 9.999999747378752e-06 there."""
    for key, value in list(vars(config).items()):
        if isinstance(value, float | dict):
            setattr(config, key, _shortest(value))
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # the file's title, not a setting
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _shortest(value: Any) -> Any:
    """The shortest number that fp32 cannot tell from `value`, where that one came from fp32."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _shortest(inner) for key, inner in value.items()}
    if isinstance(value, float) and np.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _facts(file: Path, header: GgufHeader, model: Any, reader: Any) -> dict[str, Any]:
    """Content of `gguf.json`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    from molehunt.checkpoint.gguf_steps import rounding_norm

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    types: dict[str, str] = {}
    norms: dict[str, float] = {}
    unread: list[str] = []
    for tensor in reader.tensors:
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            unread.append(tensor.name)
            continue
        types[name] = tensor.tensor_type.name
        norms[name] = max(norms.get(name, 0.0), rounding_norm(tensor.data, tensor.tensor_type))
    return {
        "schema_version": 1,
        "file": file.name,
        "architecture": header.architecture,
        "types": types,
        "rounding_norms": {name: norm for name, norm in norms.items() if norm},
        "unread": unread,
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
