import json
from pathlib import Path

import pytest

from molehunt.cli import doctor
from molehunt.cli.main import main
from molehunt.run.commit import commit


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *args])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_doctor_shows_the_same_as_text_and_as_json(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"torch": "99"})
    facts = json.loads(ask(capsys, "--json"))
    shown = ask(capsys)
    assert facts.pop(doctor.NEWER) == {} and doctor.NEWER not in shown
    for name, value in facts.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        first = next(iter(value), None) if isinstance(value, list | dict) else value
        assert str(first) in line
    assert facts["libraries"]["torch"] in facts["torch build"]
    assert facts["devices"][0] == "cpu" and facts["threads"] >= 1
    assert facts["commit"] == (commit() or "unknown")
    assert 0 < facts["memory"]["total"] < 1e5
    assert "writable" in facts["cache"]


def test_libraries_that_are_newer_than_tested_are_named_in_one_line(capsys, monkeypatch) -> None:
    installed = {"transformers": "5.25.0", "torch": "2.13.0+cpu", "peft": "0.22.0rc1", "numpy": "2.4.6", "rich": "9.1"}
    tested = {"transformers": "5.24.0", "torch": "2.13.0", "peft": "0.21.2", "numpy": "2.4.6", "rich": "10.0"}
    monkeypatch.setattr(doctor, "tested_versions", lambda: tested)
    monkeypatch.setattr(doctor.metadata, "version", installed.__getitem__)
    assert json.loads(ask(capsys, "--json"))["newer than tested"] == {
        "transformers": {"installed": "5.25.0", "tested": "5.24.0"},
        "peft": {"installed": "0.22.0rc1", "tested": "0.21.2"},
    }
    lines = ask(capsys).splitlines()
    assert (
        [line for line in lines if "newer than tested" in line]
        == lines[-1:]
        == [
            "newer than tested: transformers 5.25.0 (tested 5.24.0), peft 0.22.0rc1 (tested 0.21.2); "
            "if something fails: pip install transformers==5.24.0 peft==0.21.2"
        ]
    )


def test_a_missing_extra_comes_with_its_install_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"here": "json", "gone": "no_such"})
    monkeypatch.setattr("molehunt.run.extras.CLONE", tmp_path)
    assert doctor.examine()["extras"] == {"here": "present", "gone": "missing; pip install 'molehunt[gone]'"}
    (tmp_path / "src" / "molehunt").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert doctor.examine()["extras"]["gone"] == "missing; pip install -e '.[gone]'", "what a clone installs from"


def test_every_extra_of_the_project_is_listed() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "deep" / "hub"))
    assert doctor.examine()["cache"] == f"{tmp_path}/deep/hub: writable"
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    cache = str(doctor.examine()["cache"])
    assert "cannot be written (Permission denied); set HF_HOME" in cache
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


def test_real_models_are_shown_where_they_are_or_with_what_fetches_them(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MOLEHUNT_REAL_MODELS", str(tmp_path))
    there = tmp_path / "gemma-3-270m"
    there.mkdir()
    (there / "config.json").write_text("{}")
    assert "make real-models" in json.loads(ask(capsys, "--json"))["real models"]["gemma-3-270m"]  # half a conversion
    (there / "model.safetensors").write_bytes(b"")

    shown = json.loads(ask(capsys, "--json"))["real models"]

    assert shown["gemma-3-270m"] == str(there)
    assert shown["SmolLM2-135M-Instruct"] == f"not in {tmp_path}; `make real-models` in a clone fetches it"
    assert str(there) in ask(capsys)
