"""Folders that hold an adapter: which they are, what lies beside the adapter, and whether it names this base."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from molehunt.checkpoint.adapter_settings import AdapterSettings
from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Trap, read_json
from molehunt.errors import InvalidInput, printable

PREFIX = "base_model.model."
"""What PEFT puts before the base's own names."""
WEIGHT_FILES = (
    "model*.safetensors", "pytorch_model*.safetensors", "*.safetensors.index.json", "consolidated*.safetensors",
    "consolidated*.pth", "pytorch_model*.bin", "*.bin.index.json", "*.gguf",
)  # fmt: skip
"""Names of files with a whole model's weights; an optimizer's state and training arguments are none."""
ADAPTER_PICKLE = "adapter_model.bin"


def has_full_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model: a config.json and a file of weights that is not the adapter's.

    A Trainer's output folder may hold an adapter with the base's config.json beside it and no weights: that is an
    adapter, for loaders as well.
    """
    if not (folder / "config.json").is_file():
        return False
    named = bool(read_json(folder / "config.json").get("transformers_weights"))
    return named or any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_full_weights(folder)


def check_adapter_weights(folder: Path) -> None:
    """Raise InvalidInput, with what to do, unless the adapter's weights are in the one file that is opened."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    if (folder / ADAPTER_PICKLE).is_file():
        raise InvalidInput(
            f"{printable(model_name(folder))} has no {ADAPTER_WEIGHTS}. Adapters stored as pickles ({ADAPTER_PICKLE}) are never "
            "opened; convert it to safetensors in a sandbox."
        )
    parts = sorted(path.name for path in folder.glob("adapter_model*.safetensors"))
    if parts:
        raise InvalidInput(
            f"{printable(model_name(folder))} holds {printable(parts[0])}, and PEFT loads {ADAPTER_WEIGHTS} alone.\n"
            "Join the parts with safetensors, or save the adapter again."
        )
    raise InvalidInput(
        f"{printable(model_name(folder))} has no {ADAPTER_WEIGHTS}: no adapter to read.\nFetch it again."
    )


def inner_adapters(folder: Path) -> tuple[str, ...]:
    """Names of subfolders with adapters: PEFT saves every adapter but the first in a folder of its own."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}") if path.is_file()))


def adapter_traps(folder: Path) -> tuple[Trap, ...]:
    """What in an adapter folder may be taken for something else."""
    found: list[Trap] = []
    inner = inner_adapters(folder)
    if inner:
        what = f"adapters in subfolders ({', '.join(inner)}) are not loaded; give each as a fine-tune of its own"
        found.append(Trap("several adapters", what, "note"))
    if (folder / ADAPTER_PICKLE).is_file():
        what = f"{ADAPTER_PICKLE} beside {ADAPTER_WEIGHTS}: a loader that prefers pickles may take other weights"
        found.append(Trap("adapter stored twice", what, "finding"))
    if (folder / "config.json").is_file():
        what = "a config.json without weights lies beside the adapter; the base's own is used"
        found.append(Trap("config.json of the base", what, "note"))
    return tuple(found)


def adapter_notes(base: Path, settings: AdapterSettings) -> list[FolderDifference]:
    """What kind of adapter this is, how its change is read, and whether it names another base."""
    read = {
        "factors": "its directions are read from its factors",
        "effect": f"{settings.why}: its directions are read from its effect on the loaded base",
        "none": f"no directions: {settings.why}",
    }[settings.reading]
    rows = [
        FolderDifference(
            file=ADAPTER_CONFIG,
            key="peft_type",
            base="",
            tuned=settings.kind,
            severity="note",
            why=f"an adapter; {read}",
        )
    ]
    if settings.base_model and not _names(base, settings.base_model):
        why = "the adapter names another base; names alone prove nothing, so see whether this is the one"
        rows.append(
            FolderDifference(
                file=ADAPTER_CONFIG,
                key="base_model_name_or_path",
                base=model_name(base),
                tuned=settings.base_model,
                severity="note",
                why=why,
            )
        )
    return rows


def _names(base: Path, name: str) -> bool:
    """Whether a name or path of an author's machine may be this folder: their last parts agree, or the config's do."""
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    ours = {_last(str(base.resolve())), _last(str(config.get("_name_or_path") or ""))} - {""}
    # a folder of the hub's cache is called by its commit: models--OWNER--NAME/snapshots/COMMIT
    ours |= {part.rpartition("--")[2] for part in base.resolve().parts if part.startswith("models--")}
    return _last(name) in ours


def _last(path: str) -> str:
    return PurePosixPath(PureWindowsPath(path).as_posix()).name
