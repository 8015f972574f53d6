"""Options that had another name in an earlier version, and what the error about the old name says."""

RENAMED = {
    "--lacks": "--exclude",
    "--most": "--max-norm",
    "--shows": "--match",
}
"""Old name → new name. A command that knows an option of the old name never consults this table."""


def renaming(option: str) -> str | None:
    """A sentence that names the new option; None for an option that never had another name."""
    new = RENAMED.get(option)
    return None if new is None else f"{option} is now called {new}."
