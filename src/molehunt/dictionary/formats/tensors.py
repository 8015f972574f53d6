"""Tensors of a file, executing nothing: safetensors, npz without objects, torch archives of plain tensors alone."""

import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from molehunt.checkpoint.inventory import read_header
from molehunt.dictionary.formats.fields import inside
from molehunt.errors import InvalidInput, printable

MAX_RATIO = 200
"""Bytes unpacked for one byte of an archive. Trained weights hardly compress."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of one file. Every getter raises InvalidInput naming the file and the tensor."""

    file: str
    values: dict[str, Tensor]
    taken: set[str] = field(default_factory=set[str])

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def wrong(self, name: str, why: str) -> InvalidInput:
        return InvalidInput(f"{self.file}: {printable(name)} {why}.")

    def _got(self, name: str) -> Tensor:
        if name not in self.values:
            raise self.wrong(name, "is missing")
        self.taken.add(name)
        return self.values[name]

    def shape(self, name: str, dimensions: int = 2) -> tuple[int, ...]:
        """Raises InvalidInput also for another number of dimensions or an empty tensor."""
        shape = tuple(self._got(name).shape)
        if len(shape) != dimensions or 0 in shape:
            raise self.wrong(name, f"is {list(shape)} and should have {dimensions} dimensions")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape in fp32."""
        value = self._got(name)
        if tuple(value.shape) != shape:
            raise self.wrong(name, f"is {list(value.shape)} and should be {list(shape)}")
        if value.dtype not in FLOATS:
            raise self.wrong(name, f"holds {value.dtype} and should hold floating-point numbers")
        value = value.float().contiguous()
        if not bool(value.isfinite().all()):
            raise self.wrong(name, "holds NaN or infinity")
        return value

    def spread(self, name: str, size: int) -> Tensor:
        """A vector of that size, which may be stored as one number for all."""
        if self._got(name).numel() == 1:
            shape = self.values[name].shape
            return self.take(name, *shape).reshape(1).expand(size).clone()
        return self.take(name, size)

    def whole(self, name: str, *shape: int) -> Tensor:
        """Natural numbers above 0."""
        value = self._got(name)
        if value.dtype not in WHOLE or tuple(value.shape) != shape or not bool((value > 0).all()):
            raise self.wrong(name, f"should hold whole numbers above 0, in the shape {list(shape)}")
        return value.long()

    def exp(self, name: str, value: Tensor) -> Tensor:
        """The exponential of what `take` or `spread` gave; raises where fp32 cannot hold it."""
        if not bool(value.exp().isfinite().all()):
            raise self.wrong(name, "is a logarithm of more than a number can hold")
        return value.exp()

    def threshold(self, size: int, name: str = "threshold") -> Tensor:
        """Thresholds stored for each latent, for all at once or as logarithms under `log_NAME`."""
        if name not in self and f"log_{name}" in self:
            return self.exp(f"log_{name}", self.spread(f"log_{name}", size))
        return self.spread(name, size)

    def unscaled(self) -> None:
        """Raises InvalidInput for a finetuning scale other than 1."""
        for name in ("scaling_factor", "finetuning_scaling_factor"):
            if name in self and not bool((self._got(name) == 1).all()):
                raise self.wrong(name, "is not 1, and dictionaries scaled after training are not read")

    def done(self) -> None:
        """Raises InvalidInput for a tensor that was not read: its meaning would be lost."""
        for name in self.values:
            if name not in self.taken:
                raise self.wrong(name, "is a tensor that this kind of dictionary does not have")


def read_safetensors(folder: Path, name: str) -> Tensors:
    path = inside(folder, name)
    read_header(path)
    try:
        with safe_open(str(path), framework="pt") as opened:  # pyright: ignore[reportUnknownArgumentType]
            return Tensors(name, {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    except Exception as error:  # the library's own errors, and torch's for types it lacks
        raise _broken(name, "a safetensors file that can be read", error) from None


def read_npz(folder: Path, name: str) -> Tensors:
    path = inside(folder, name)
    _check_archive(path, name)
    values: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as opened:
            for info in archive.infolist():
                with archive.open(info) as member:
                    _check_header(member, info.file_size)
            for key in opened.files:
                array = np.asarray(opened[key])
                if array.dtype.kind != "f" or array.dtype.itemsize > 8:
                    raise InvalidInput(f"{name}: {printable(key)} holds {array.dtype} and should hold numbers.")
                values[key] = torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="), order="C")))
    except InvalidInput:
        raise
    except Exception as error:  # whatever numpy and zipfile raise for broken bytes
        raise _broken(name, "an npz archive of arrays of numbers", error) from None
    return Tensors(name, values)


def _check_header(member: object, size: int) -> None:
    """An array that claims more than its bytes would be allocated before it is read."""
    form = np.lib.format
    version = form.read_magic(member)  # pyright: ignore[reportArgumentType]
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, _, dtype = read(member)  # pyright: ignore[reportArgumentType]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > size:
        raise ValueError("an array of objects, or of more bytes than there are")


def read_torch(folder: Path, name: str) -> Tensors:
    """A state dict saved by torch 1.6 or later. Pickles that need more than tensors are refused unopened."""
    path = inside(folder, name)
    _check_archive(path, name)
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the archive's own errors, and those of the restricted unpickler
        raise _broken(name, "a torch archive of plain tensors", error) from None
    if not isinstance(loaded, dict) or not loaded:
        raise InvalidInput(f"{name}: it should hold tensors by name and does not.")
    values: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _plain(value):
            raise InvalidInput(f"{name}: {printable(str(key))} is no plain tensor.")
        values[key] = value.detach()
    return Tensors(name, values)


def _plain(value: Tensor) -> bool:
    """Dense, and no larger than its bytes: a view can repeat one number a billion times."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _check_archive(path: Path, name: str) -> None:
    """Both formats are zip files. Older torch pickles are not, and are never opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except Exception as error:
        raise _broken(name, "a zip archive", error) from None
    if unpacked > MAX_RATIO * path.stat().st_size:
        raise InvalidInput(f"{name} unpacks to {unpacked} bytes, which no trained dictionary does.")


def _broken(name: str, what: str, error: Exception) -> InvalidInput:
    why = printable((str(error).splitlines() or [""])[0], 100)
    return InvalidInput(
        f"{name} is not {what}, or is cut off ({type(error).__name__}: {why}).\nFetch the file again; pickles that hold "
        "more than tensors are never opened."
    )
