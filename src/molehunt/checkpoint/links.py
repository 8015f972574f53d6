"""Links in a model folder: the ones that the hub's cache is made of are followed, and all others that lead out are not.

The same layout tells what people call a model.
"""

from pathlib import Path

from molehunt.errors import InvalidInput, printable

READ_BY_LOADERS = (".json", ".jinja", ".model", ".txt", ".safetensors", ".py", ".tiktoken", ".gguf")
"""Endings of the files that a loader may open."""
SNAPSHOTS, BLOBS = "snapshots", "blobs"
REPOSITORY = "models--"
"""How the folder of a model's repository in the hub's cache begins."""


def cached_repository(folder: Path) -> Path | None:
    """The repository's folder in the hub's cache that `folder` is a snapshot of; None if it is none.

    Its name is `models--org--name`. A folder below a snapshot counts as well.
    """
    resolved = folder.resolve()
    for snapshot in (resolved, *resolved.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == SNAPSHOTS and repository.name.startswith(REPOSITORY):
            return repository
    return None


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path` in `folder` is a link, or lies behind one, to a file that is no part of the model.

    A snapshot of the hub's cache is made of links to `blobs/` of its repository. The cache itself may have a store that
    repositories share, and those blobs are links in turn. Another repository's blobs belong to another model.
    """
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return False
    repository = cached_repository(folder)
    if repository is None:
        return True
    return not any(target.is_relative_to(store) for store in (repository / BLOBS, repository.parent / BLOBS))


def refuse_links(folder: Path) -> None:
    """Raise InvalidInput, which names the file, if a loader would follow a link out of `folder`."""
    for path in sorted(folder.iterdir()):
        below = sorted(path.iterdir()) if path.is_dir() and not path.name.startswith(".") else []
        for one in (path, *below):
            if (one.suffix in READ_BY_LOADERS or one.is_dir()) and leads_out(folder, one):
                raise InvalidInput(
                    f"{printable(one.relative_to(folder).as_posix())} is a link to a file outside {printable(model_name(folder))}, "
                    "which a loader would follow.\nIf the link is yours, copy the folder with its links followed "
                    "(cp -rL); if the folder came with it, do not load it."
                )


def fetch_again(folder: Path) -> str:
    """What to do about a folder that lacks files: a snapshot of the hub's cache is completed by its repository's name."""
    repository = cached_repository(folder)
    if repository is None:
        return ""
    name = repository.name.removeprefix(REPOSITORY).replace("--", "/")
    return f"\nThe download is incomplete: hf download {printable(name)}"


def model_name(folder: Path) -> str:
    """What people call the model in `folder`: `org/name@abc1234` in the hub's cache, elsewhere the folder's own name."""
    repository = cached_repository(folder)
    if repository is None:
        return folder.name or folder.resolve().name
    below = folder.resolve().relative_to(repository)
    named = repository.name.removeprefix(REPOSITORY).replace("--", "/") + f"@{below.parts[1][:7]}"
    return "/".join((named, *below.parts[2:]))
