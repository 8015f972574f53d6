"""Which weight files of a folder a loader reads, and what each holds."""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.checkpoint.inventory import Entry, read_header
from molehunt.checkpoint.links import fetch_again, model_name
from molehunt.checkpoint.loader_traps import Trap, inside, read_json
from molehunt.errors import InvalidInput, printable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRAINING_STATE = frozenset(
    {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"}
)
"""Files that a Trainer leaves beside the weights, and that no model loader opens."""
WEIGHTS_KEY = "transformers_weights"
"""Key of config.json under which transformers finds which weight file to load, whatever else is there."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files a loader reads, and what each holds."""

    files: tuple[str, ...]
    """Files in reading order: a tensor of a later file overwrites one of the same name in an earlier file."""
    entries: Mapping[str, Mapping[str, Entry]]
    """Entries by file and tensor name."""
    unread: Mapping[str, Mapping[str, Entry]]
    """The same for safetensors files that transformers does not read."""
    traps: tuple[Trap, ...]
    unheld: tuple[str, ...] = ()
    """Tensors that the index lists and no file holds. Whether the model needs them, its architecture says."""

    def refuse_unheld(self) -> None:
        """Raise InvalidInput where the index lists tensors that no file holds, for an architecture that says nothing of them."""
        if self.unheld:
            raise InvalidInput(
                f"the index lists {printable(self.unheld[0])}, which no shard holds: loaders would fill it with random numbers.\n"
                "Fetch the folder again."
            )


def lay_out(folder: Path, config: Mapping[str, Any]) -> Layout:
    """The weight files of a model folder that are loaded, from their headers and never from the index alone.

    transformers takes the file that config.json names, if it names one; else `model.safetensors` if it exists; else every
    tensor of every shard that the index names. Of two tensors with one name, the last one is loaded.

    Raises:
        InvalidInput: no safetensors weights, a broken file, or an index or a config that leads out of the folder.
    """
    present = sorted(
        p.name for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("adapter_")
    )
    chosen, traps = _chosen(folder, config)
    index = chosen if chosen.endswith(".json") else INDEX if not chosen and (folder / INDEX).is_file() else ""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name not in TRAINING_STATE)
    if not present and not index and not chosen:
        _refuse_no_weights(folder, pickles)
    traps += [
        Trap(
            "pickle beside the weights",
            f"{printable(name)} is ignored here and by loaders that prefer safetensors",
            "note",
            name,
        )
        for name in pickles
    ]
    weight_map = _weight_map(folder, index) if index else {}
    for name in present:
        inside(folder, name)  # a shard may be a link out of the folder, too
    if chosen and not index:
        files = (chosen,)
    elif SINGLE in present and not chosen:
        files = (SINGLE,)
        if index:
            traps.append(
                Trap(
                    "single file and index",
                    f"{SINGLE} stands beside {INDEX}; transformers reads the single file",
                    "finding",
                    INDEX,
                )
            )
            weight_map = {}
    elif index:
        order = [posixpath.normpath(name) for name in sorted(set(weight_map.values()))]
        files = tuple(dict.fromkeys(reversed(order)))[::-1]
        weight_map = {name: posixpath.normpath(file) for name, file in weight_map.items()}
    else:
        raise InvalidInput(
            f"{printable(model_name(folder))} holds {printable(', '.join(present[:3]), 120)} and neither {SINGLE} nor {INDEX}: "
            f"transformers would not find the weights.\nFetch the index, or rename a single file to {SINGLE}."
        )
    headers = {name: read_header(folder / name) for name in dict.fromkeys((*files, *present))}
    entries = {name: headers[name] for name in files}
    unread = {name: header for name, header in headers.items() if name not in entries}
    traps += _header_traps(entries, unread, weight_map)
    held = {name for header in entries.values() for name in header}
    unheld = tuple(sorted(name for name in weight_map if name not in held))
    return Layout(files=files, entries=entries, unread=unread, traps=tuple(traps), unheld=unheld)


def _chosen(folder: Path, config: Mapping[str, Any]) -> tuple[str, list[Trap]]:
    """The weight file or index that config.json names, and the finding on it; an empty text if it names none."""
    name = config.get(WEIGHTS_KEY)
    if name is None:
        return "", []
    inside(folder, name)
    if not str(name).endswith((".safetensors", ".safetensors.index.json")):
        raise InvalidInput(
            f"config.json names {printable(repr(name), 80)} as {WEIGHTS_KEY}, which is no safetensors file.\n"
            "Pickles are never opened; get the weights as safetensors."
        )
    name = posixpath.normpath(str(name))
    what = f"config.json makes transformers load {printable(name, 80)}; other loaders take {SINGLE} or {INDEX}"
    return name, [Trap(WEIGHTS_KEY, what, "finding", name)]


def _refuse_no_weights(folder: Path, pickles: list[str]) -> None:
    if pickles:
        raise InvalidInput(
            f"the weights are pickles ({printable(', '.join(pickles), 80)}), which can run code when opened; they "
            "are never opened here.\nConvert them to safetensors in a sandbox without network or secrets."
        )
    raise InvalidInput(
        f"{printable(model_name(folder))} holds no safetensors file, so there are no weights to read.{fetch_again(folder)}"
    )


def _weight_map(folder: Path, index: str) -> dict[str, Any]:
    listed = read_json(folder / index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InvalidInput(f"{printable(index)} has no weight_map. Fetch the file again.")
    for name in sorted({str(v) if isinstance(v, str) else repr(v) for v in listed.values()}):
        inside(folder, name)
    return listed


def _header_traps(
    entries: Mapping[str, Mapping[str, Entry]], unread: Mapping[str, Mapping[str, Entry]], weight_map: Mapping[str, Any]
) -> list[Trap]:
    traps: list[Trap] = []
    where: dict[str, list[str]] = {}
    for file, header in entries.items():
        for name in header:
            where.setdefault(name, []).append(file)
    for name, files in where.items():
        if len(files) > 1:
            shown = printable(", ".join(files), 100)
            traps.append(
                Trap(
                    "tensor stored twice",
                    f"{printable(name)} is in {shown}; the last one wins in transformers",
                    "finding",
                )
            )
        if weight_map and name not in weight_map:
            traps.append(
                Trap(
                    "tensor not in the index",
                    f"{printable(name)} is in {printable(files[-1])} and loaded all the same",
                    "finding",
                )
            )
        elif weight_map and weight_map[name] != files[-1]:
            traps.append(
                Trap(
                    "index points elsewhere",
                    f"{printable(name)} is read from {printable(files[-1])}; the index says {printable(str(weight_map[name]))}",
                    "finding",
                )
            )
    unheld = sorted(name for name in weight_map if name not in where)
    if unheld:
        more = f" and {len(unheld) - 1} more" if len(unheld) > 1 else ""
        what = f"the index lists {printable(unheld[0], 80)}{more}, which no shard holds and no loader misses"
        traps.append(Trap("tensor without a shard", what, "note"))
    for file, header in unread.items():
        shown = printable(next(iter(header)), 60)
        traps.append(
            Trap(
                "unlisted file",
                f"{printable(file)} ({len(header)} tensors, such as {shown}) is not read by transformers; other loaders "
                "may read it",
                "finding",
                file,
            )
        )
    return traps
