"""`molehunt doctor`: what this installation can do."""

import importlib.util
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import cast

from molehunt import __version__
from molehunt.cli.options import AsJson
from molehunt.cli.output import show, show_json
from molehunt.run.cache_folders import REAL_MODEL_NAMES, real_model, real_models_folder
from molehunt.run.commit import commit
from molehunt.run.extras import install_command

EXTRAS = {
    "parquet": "pyarrow",
    "zst": "zstandard",
    "ray": "ray",
    "serve": "fastapi",
    "exports": "lm_eval",
    "gguf": "gguf",
    "postgres": "psycopg",
    "peers": "sae_lens",
    "dev": "pytest",
}
"""Extra → the module whose presence shows that the extra is installed."""
TESTED = Path(__file__).with_name("tested_versions.json")
"""JSON file of required libraries with the version that the tests ran on; `make lock` writes it."""
NEWER = "newer than tested"
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def doctor(as_json: AsJson = False) -> None:
    """Show what this installation can do: torch build, devices, memory, extras, cache, real models."""
    facts = examine()
    if as_json:
        show_json(facts)
    else:
        show(_to_text(facts))


def examine() -> dict[str, object]:
    """Everything that `doctor` prints, as JSON values. Sizes are in GiB."""
    import torch

    tested = tested_versions()
    return {
        "molehunt": __version__,
        "commit": commit() or "unknown",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch build": str(torch.__version__)
        + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU only"),
        "devices": ["cpu", *_accelerators()],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory": _memory(),
        "bf16": _bf16(),
        "cache": _cache(),
        "libraries": {name: metadata.version(name) for name in tested},
        "extras": {name: _extra(name, module) for name, module in EXTRAS.items()},
        "real models": {name: _real_model(name) for name in REAL_MODEL_NAMES},
        NEWER: _newer(tested),
    }


def tested_versions() -> dict[str, str]:
    """Version of each library that the tests ran on, as `TESTED` lists them."""
    return json.loads(TESTED.read_text(encoding="utf-8"))


def _newer(tested: dict[str, str]) -> dict[str, dict[str, str]]:
    """The installed libraries that are newer than the one in `tested`, each with both versions."""
    from packaging.version import Version

    found: dict[str, dict[str, str]] = {}
    for name, version in tested.items():
        installed = metadata.version(name)
        if Version(Version(installed).public) > Version(version):  # public: 2.13.0+cpu is 2.13.0
            found[name] = {"installed": installed, "tested": version}
    return found


def _accelerators() -> list[str]:
    import torch

    found: list[str] = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {about.name}, {about.total_memory / 2**30:.0f} GiB")
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _memory() -> dict[str, float]:
    """Total and free memory of the machine, and the container's limit where there is one."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    sizes = {"total": os.sysconf("SC_PHYS_PAGES") * page}
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        sizes["free"] = os.sysconf("SC_AVPHYS_PAGES") * page
    if CONTAINER_LIMIT.is_file() and (limit := CONTAINER_LIMIT.read_text().strip()).isdigit():
        sizes["container limit"] = int(limit) / 2**30
    return {name: round(size, 1) for name, size in sizes.items()}


def _bf16() -> str:
    """How this CPU multiplies bf16 matrices. Without support, every product is computed in fp32."""
    import torch

    get = torch.backends.cpu.get_cpu_capability
    flags = _processor_flags()
    if "amx_bf16" in flags:
        return f"AMX tiles ({get()})"
    return f"AVX-512 BF16 ({get()})" if "avx512_bf16" in flags else f"emulated ({get()})"


def _processor_flags() -> str:
    flags = Path("/proc/cpuinfo")
    return flags.read_text() if flags.is_file() else ""  # Linux alone


def _cache() -> str:
    """The folder where hub models are stored, and whether it can be written to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return f"{folder}: writable"
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror}); set HF_HOME to a folder of yours"


def _extra(name: str, module: str) -> str:
    return "present" if importlib.util.find_spec(module) else f"missing; {install_command(name)}"


def _real_model(name: str) -> str:
    """Where a real model lies that development tests run on."""
    folder = real_model(name)
    return str(folder) if folder else f"not in {real_models_folder()}; `make real-models` in a clone fetches it"


def _to_text(facts: dict[str, object]) -> str:
    lines: list[str] = []
    for name, value in facts.items():
        if name == NEWER:
            continue  # the last line below, only if a library is newer
        if isinstance(value, dict):
            shown = [f"{k} {v} GiB" if name == "memory" else f"{k} {v}" for k, v in value.items()]
        else:
            shown = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        lines += [f"{name if i == 0 else '':<12} {text}" for i, text in enumerate(shown)]
    newer = cast("dict[str, dict[str, str]]", facts[NEWER])
    return "\n".join([*lines, _newer_line(newer)] if newer else lines)


def _newer_line(newer: dict[str, dict[str, str]]) -> str:
    """All libraries that are newer than tested in one line, with the command that goes back."""
    named = ", ".join(f"{name} {row['installed']} (tested {row['tested']})" for name, row in newer.items())
    pins = " ".join(f"{name}=={row['tested']}" for name, row in newer.items())
    return f"{NEWER}: {named}; if something fails: pip install {pins}"
