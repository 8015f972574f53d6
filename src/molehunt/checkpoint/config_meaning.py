"""What a config.json means to transformers: every default filled in, old names of keys replaced by new ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molehunt.checkpoint.tokenizer_comparison import import_before_forks
from molehunt.run.bounded import bounded


def meant_configs(base: Path, tuned: Path) -> tuple[dict[str, Any], dict[str, Any], frozenset[str]] | None:
    """Both configs as transformers reads them, and the keys that the class of the base knows at any depth.

    None where transformers does not know the type of model or refuses a config: then only the files' own text can be compared.

    Raises:
        InvalidInput: reading a config takes too much time or memory.
    """
    import_before_forks()
    found: list[Any] | None = bounded(
        lambda: _meant(base, tuned), what=f"config.json of {base.name} or {tuned.name}", seconds=20, megabytes=1024
    )
    return None if found is None else (found[0], found[1], frozenset(found[2]))


def _meant(base: Path, tuned: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]] | None:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    sides: list[Any] = []
    for folder in (base, tuned):
        try:
            sides.append(AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True))
        except MemoryError:
            raise
        except Exception:  # what is wrong with it is said where the model is built
            return None
    if type(sides[0]) is not type(sides[1]):  # one of them may be the language model out of the other
        inner = [one.get_text_config(decoder=True) for one in sides]
        sides = inner if type(inner[0]) is type(inner[1]) else sides
    try:
        known = _keys(type(sides[0])().to_dict())
    except Exception:  # some classes cannot be made without arguments
        known = set[str]()
    known |= {name for one in sides for name in getattr(type(one), "attribute_map", {})}
    return _json_able(sides[0].to_dict()), _json_able(sides[1].to_dict()), sorted(known)


def _keys(value: object) -> set[str]:
    if not isinstance(value, Mapping):
        return set()
    return {str(key) for key in value}.union(*(_keys(one) for one in value.values()))


def _json_able(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_able(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
