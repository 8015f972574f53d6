"""Hub ids: what the real huggingface_hub downloads from a server that plays the hub is read offline, whatever its layout."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from folders import good_folder
from hub_server import HubServer, playing_hub
from molehunt.audit.files import compare_folders
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import cached_repository, fetch_again, leads_out, model_name
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, UsageError
from molehunt.model.pair import ModelPair

NOT_FETCHED = (
    "pytorch_model.bin",
    "modeling_x.py",
    "onnx/model.json",
    "original/params.json",
    "README.md",
    "LICENSE.txt",
)


@dataclass(frozen=True)
class Downloaded:
    """A hub that has been downloaded from, and the cache that this left."""

    hub: HubServer
    cache: Path
    base: Path
    tuned: Path


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloaded]:
    root = tmp_path_factory.mktemp("hub")
    base, tuned = (good_folder(root / name, seed=seed) for seed, name in enumerate(("base", "tuned")))
    good_folder(root / "tuned-v1", seed=2)
    for name in NOT_FETCHED:
        (tuned / name).parent.mkdir(exist_ok=True)
        (tuned / name).write_text("{}")
    for folder in (base, tuned):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages[0].content }}")
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with playing_hub(
        {
            "acme/base": {"main": base},
            "acme/tuned-7B": {"main": tuned, "v1": root / "tuned-v1"},
            "acme/shut": {"main": base},
        }
    ) as hub:
        hub.gated.add("acme/shut")
        with _settings(hub.endpoint, root / "cache", offline=False):
            for name in ("acme/base", "acme/tuned-7B", "acme/tuned-7B@v1"):
                local_folder(name)
            yield Downloaded(hub, root / "cache", base, tuned)


@pytest.fixture
def offline(downloaded: Downloaded) -> Iterator[Downloaded]:
    """No network, and nobody listens where the hub was."""
    with _settings("http://127.0.0.1:1", downloaded.cache, offline=True):
        yield downloaded


@pytest.fixture
def online(downloaded: Downloaded, tmp_path: Path) -> Iterator[Path]:
    """The network is on, and the cache is new."""
    with _settings(downloaded.hub.endpoint, tmp_path / "cache", offline=False):
        yield tmp_path / "cache"


@contextmanager
def _settings(endpoint: str, cache: Path, *, offline: bool) -> Generator[None, None, None]:
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set when huggingface_hub is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield
    close_session()


def _snapshot(downloaded: Downloaded, name: str) -> Path:
    sha = downloaded.hub.sha_of(name, "main")
    return downloaded.cache / f"models--{name.replace('/', '--')}" / "snapshots" / sha


def test_only_files_that_are_needed_are_fetched(downloaded: Downloaded) -> None:
    snapshot = _snapshot(downloaded, "acme/tuned-7B")
    here = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    there = {path.relative_to(downloaded.tuned).as_posix() for path in downloaded.tuned.rglob("*") if path.is_file()}
    assert here == there - set(NOT_FETCHED)
    assert "additional_chat_templates/tool.jinja" in here
    assert set(downloaded.hub.served).isdisjoint(NOT_FETCHED)
    assert all(path.is_symlink() for path in snapshot.glob("*.*")), "this is not the layout that the test is about"


def test_a_snapshot_is_read_as_the_folder_that_was_uploaded(offline: Downloaded) -> None:
    found = compare_folders("acme/base", "acme/tuned-7B")
    for name in NOT_FETCHED:
        (offline.tuned / name).unlink(missing_ok=True)
    plain = compare_folders(offline.base, offline.tuned)
    assert (found.base_sha256, found.tuned_sha256) == (plain.base_sha256, plain.tuned_sha256)
    assert (found.verdict, found.tensors) == (plain.verdict, plain.tensors)
    by_id = compare_weights("acme/base", "acme/tuned-7B", k=2)
    assert by_id.to_json() == compare_weights(offline.base, offline.tuned, k=2).to_json()
    pair = ModelPair.load("acme/base", "acme/tuned-7B")
    assert f"acme/base@{offline.hub.sha_of('acme/base', 'main')[:7]}" in repr(pair)


def test_a_revision_is_a_branch_a_tag_or_a_commit(offline: Downloaded) -> None:
    commit = offline.hub.sha_of("acme/tuned-7B", "v1")
    by_tag, by_commit = local_folder("acme/tuned-7B@v1"), local_folder(f"acme/tuned-7B@{commit}")
    assert by_tag == by_commit != local_folder("acme/tuned-7B")
    assert model_name(by_tag) == f"acme/tuned-7B@{commit[:7]}"
    assert model_name(by_tag / "additional_chat_templates") == f"acme/tuned-7B@{commit[:7]}/additional_chat_templates"
    assert model_name(offline.base) == "base"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "acme/none",
            r"the hub's cache has no model acme/none, and the network is switched off .*hf download acme/none",
        ),
        ("acme/base@v9", r"has no model acme/base at the revision v9, .*hf download acme/base --revision v9"),
        ("none", r"^There is no folder none\. Hub names have the form org/name\.\Z"),
        ("a/b/c", "no model on the hub has such a name"),
        ("acme/base@../../x", "no model on the hub has such a name"),
        ("acme/x\x1b[2J", r"There is no folder acme/x\\x1b\[2J, and no model on the hub has such a name"),
        ("./acme/base", r"There is no folder \./acme/base\.\Z"),
    ],
)
def test_what_the_cache_does_not_hold_is_told_offline(offline: Downloaded, name: str, says: str) -> None:
    assert offline.cache
    with pytest.raises(UsageError, match=f"(?s){says}"):
        local_folder(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acme/none", "the hub has no model acme/none that you may see"),
        ("acme/shut", "acme/shut is gated: accept its terms"),
        ("acme/base@v9", "the hub's model acme/base has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(online: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        local_folder(name)
    assert online


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(UsageError, match="is a file; give the folder"):
        local_folder(tmp_path / "model.bin")


def test_a_copy_that_lacks_files_is_told_offline(offline: Downloaded, tmp_path: Path) -> None:
    shutil.copytree(offline.cache, tmp_path / "cache", symlinks=True)
    with _settings("http://127.0.0.1:1", tmp_path / "cache", offline=True):
        (local_folder("acme/base") / "model.safetensors").unlink()
        with pytest.raises(UsageError, match=r"lacks files\. With a network, complete it: hf download acme/base"):
            local_folder("acme/base")


def test_a_cache_without_links_is_read(online: Path, downloaded: Downloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)  # as on Windows
    folder = local_folder("acme/base")
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert Checkpoint.open(folder).content_hash() == Checkpoint.open(downloaded.base).content_hash()
    assert online in folder.parents


def test_a_download_to_a_folder_is_read(online: Path, downloaded: Downloaded, tmp_path: Path) -> None:
    folder = Path(snapshot_download("acme/base", local_dir=tmp_path / "here"))
    assert list((folder / ".cache").rglob("*.json")), "huggingface_hub left no notes of its own"
    assert Checkpoint.open(folder).content_hash() == Checkpoint.open(downloaded.base).content_hash()
    assert online


def test_blobs_that_repositories_share_are_followed(downloaded: Downloaded, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(downloaded.cache, cache, symlinks=True)
    snapshot = cache / _snapshot(downloaded, "acme/base").relative_to(downloaded.cache)
    blob = (snapshot / "model.safetensors").resolve()
    assert publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="a" * 64, cache_dir=str(cache), expected_size=blob.stat().st_size
    )
    assert blob.is_symlink(), "huggingface_hub did not move the blob to the store"
    assert Checkpoint.open(snapshot).content_hash() == Checkpoint.open(downloaded.base).content_hash()


def _to(target: str) -> Callable[[Path], None]:
    def change(snapshot: Path) -> None:
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target.format(snapshot=snapshot.name))

    return change


def _blobs_elsewhere(snapshot: Path) -> None:
    repository = snapshot.parent.parent
    (repository / "blobs").rename(repository.parent / "kept")
    (repository / "blobs").symlink_to("../kept")


def _settings_elsewhere(snapshot: Path) -> None:
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../secret.json")


def _templates_elsewhere(snapshot: Path) -> None:
    shutil.rmtree(snapshot / "additional_chat_templates")
    (snapshot / "additional_chat_templates").symlink_to("../../../templates")


def _index_to_blobs(snapshot: Path) -> None:
    blob = os.readlink(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").unlink(missing_ok=True)
    (snapshot / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"x": "{blob}"}}}}')


DISHONEST = {
    "another repository's blob": _to("../../../models--acme--tuned-7B/blobs/stolen"),
    "another repository's snapshot": _to("../../../models--acme--tuned-7B/snapshots/x/model.safetensors"),
    "a file of the system": _to("/etc/hostname"),
    "a file above the cache": _to("../../../../secret.json"),
    "beside the blobs": _to("../../blobs/../refs/main"),
    "blobs that are a link": _blobs_elsewhere,
    "settings": _settings_elsewhere,
    "a folder of templates": _templates_elsewhere,
    "an index that names a blob": _index_to_blobs,
}


@pytest.mark.parametrize("kind", DISHONEST)
def test_any_other_link_is_refused(downloaded: Downloaded, tmp_path: Path, kind: str) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(downloaded.cache, cache, symlinks=True)
    (cache / "secret.json").write_text("{}")
    (cache / "templates").mkdir()
    (cache / "models--acme--tuned-7B" / "blobs" / "stolen").write_text("{}")
    snapshot = cache / _snapshot(downloaded, "acme/base").relative_to(downloaded.cache)
    Checkpoint.open(snapshot)
    DISHONEST[kind](snapshot)
    with pytest.raises(InvalidInput, match="outside"):
        Checkpoint.open(snapshot)


def test_a_folder_that_only_looks_like_a_cache_may_hold_no_links_out(tmp_path: Path) -> None:
    good_folder(tmp_path / "blobs" / "kept")
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for path in (tmp_path / "blobs" / "kept").iterdir():
        (folder / path.name).symlink_to(path)
    assert cached_repository(folder) is None
    assert leads_out(folder, folder / "config.json")
    with pytest.raises(InvalidInput, match=r"is a link to a file outside abc.*\n.*cp -rL"):
        Checkpoint.open(folder)


def test_a_link_within_a_folder_and_a_link_to_a_folder_are_followed(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "kept")
    (folder / "model.safetensors").rename(folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    (tmp_path / "link").symlink_to("kept")
    assert Checkpoint.open(tmp_path / "link").content_hash() == Checkpoint.open(folder).content_hash()
    assert model_name(tmp_path / "link") == "link"


@pytest.mark.parametrize("lost", ["*.safetensors", "*"])
def test_an_incomplete_download_is_completed_by_its_name(offline: Downloaded, tmp_path: Path, lost: str) -> None:
    snapshot = tmp_path / "models--acme--half" / "snapshots" / ("0" * 40)
    shutil.copytree(offline.base, snapshot)
    for path in snapshot.glob(lost):
        if path.is_file():
            path.unlink()
    with pytest.raises(
        InvalidInput, match=r"^acme/half@0000000 .*\nThe download is incomplete: hf download acme/half\Z"
    ):
        Checkpoint.open(snapshot)
    assert not fetch_again(offline.base)
