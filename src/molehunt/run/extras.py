"""The command that installs an optional part of this package, for messages."""

from molehunt.run.commit import CLONE


def install_command(extra: str) -> str:
    """The command that installs an extra: in a clone from its folder, and elsewhere from the package index."""
    in_clone = (CLONE / "pyproject.toml").is_file() and (CLONE / "src" / "molehunt").is_dir()
    return f"pip install -e '.[{extra}]'" if in_clone else f"pip install 'molehunt[{extra}]'"
