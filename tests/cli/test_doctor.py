import json
from pathlib import Path

import pytest

from molehunt.cli import doctor
from molehunt.cli.main import main


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *args])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_doctor_tells_the_same_in_words_and_as_json(capsys) -> None:
    told = json.loads(ask(capsys, "--json"))
    shown = ask(capsys)
    for name, value in told.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        first = next(iter(value), None) if isinstance(value, list | dict) else value
        assert str(first) in line
    assert told["libraries"]["torch"] in told["torch build"]
    assert told["devices"][0] == "cpu" and told["threads"] >= 1
    assert 0 < told["memory"]["total"] < 1e5
    assert "writable" in told["cache"]


def test_a_missing_extra_comes_with_its_install_line(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"here": ("json", "pip install x"), "gone": ("no_such", "pip install 'y'")})
    assert doctor.examine()["extras"] == {"here": "present", "gone": "missing; pip install 'y'"}


def test_every_extra_of_the_project_is_listed() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])
    assert all(f"'molehunt[{name}]'" in install for name, (_, install) in doctor.EXTRAS.items())
    required = " ".join(project["dependencies"])
    assert all(f"{name}>=" in required for name in doctor.CORE)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "deep" / "hub"))
    assert doctor.examine()["cache"] == f"{tmp_path}/deep/hub: writable"
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    told = str(doctor.examine()["cache"])
    assert "cannot be written (Permission denied); set HF_HOME" in told
    assert not (tmp_path / "deep").exists(), "looking makes nothing"


@pytest.mark.parametrize(
    ("flags", "support"),
    [("avx2", "emulated"), ("avx512_bf16", "AVX-512 BF16"), ("avx512_bf16 amx_bf16", "AMX tiles")],
)
def test_bf16_support_is_read_from_the_processor(flags: str, support: str, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_processor_flags", lambda: flags)
    assert str(doctor.examine()["bf16"]).startswith(support)


def test_accelerators_are_listed(monkeypatch) -> None:
    from types import SimpleNamespace

    import torch

    about = SimpleNamespace(name="H200", total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor.examine()["devices"] == ["cpu", "cuda:0 H200, 139 GiB", "mps"]


def test_the_containers_memory_limit_is_shown(monkeypatch, tmp_path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "CONTAINER_LIMIT", limit)
    assert "container limit" not in doctor.examine()["memory"]
    limit.write_text("max\n")
    assert "container limit" not in doctor.examine()["memory"]
    limit.write_text(f"{3 * 2**30}\n")
    assert doctor.examine()["memory"]["container limit"] == 3.0
