"""Errors of transformers, PEFT and tokenizers as errors about the folder that they were reading."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from molehunt.errors import InvalidInput, printable


@contextmanager
def loading(folder: Path, what: str) -> Generator[None, None, None]:
    """Hide the progress bars of transformers, and turn its errors into InvalidInput."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (
        OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, SafetensorError, StrictDataclassError
    ) as error:  # fmt: skip
        raise InvalidInput(
            f"{printable(folder.name)} cannot be loaded as {what}: {type(error).__name__}: "
            f"{printable(str(error), 400)}\nRun `molehunt files` on it to see what is in the folder."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
