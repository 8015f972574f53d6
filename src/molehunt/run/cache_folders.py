"""Folders outside of any repository where downloads and converted models are kept between runs."""

import os
from pathlib import Path

CACHE = "MOLEHUNT_CACHE"
"""Environment variable that names another folder than `~/.cache/molehunt`."""
REAL_MODELS = "MOLEHUNT_REAL_MODELS"
"""Environment variable that names another folder for what `make real-models` fetches."""
SMOLLM2, GEMMA, MINILM = "SmolLM2-135M-Instruct", "gemma-3-270m", "all-MiniLM-L6-v2"
REAL_MODEL_NAMES = (SMOLLM2, GEMMA, MINILM)
"""Folders that `make real-models` makes: two language models, and a sentence encoder."""


def cache_folder() -> Path:
    """The folder of everything that can be made again: $MOLEHUNT_CACHE, or `molehunt` in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(general) if os.path.isabs(general) else Path.home() / ".cache") / "molehunt"


def real_models_folder() -> Path:
    """The folder of real models that `make real-models` fetched: $MOLEHUNT_REAL_MODELS, or one in `cache_folder()`."""
    named = os.environ.get(REAL_MODELS)
    return Path(named).expanduser().absolute() if named else cache_folder() / "real-models"


def real_model(name: str) -> Path | None:
    """The folder of one of `REAL_MODEL_NAMES`; None where it was not fetched or its conversion did not end."""
    folder = real_models_folder() / name
    complete = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    return folder if complete else None
