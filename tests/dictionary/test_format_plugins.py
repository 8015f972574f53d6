"""A throw-away package offers a dictionary format by entry point: its folders are read like any other."""

import json
import sys
from pathlib import Path

import pytest

import molehunt as mh
from molehunt.dictionary.formats.detect import dictionary_formats
from molehunt.errors import InvalidInput, UsageError

CODE = """
import json

import torch

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.nonlinearity import TopKActivation
from molehunt.site import Site


def read(folder, options):
    size = json.loads((folder / "throw_away.json").read_text())
    eye = torch.eye(size)
    return Dictionary(
        W_enc=eye, b_enc=torch.zeros(size), W_dec=eye, b_dec=torch.zeros(size),
        nonlinearity=TopKActivation(options.k or 1), site=Site(2),
    )


FORMAT = DictionaryFormat(
    family="Throw-away", wants=("throw_away.json",), takes_k=True, read=read,
    recognises=lambda folder: (folder / "throw_away.json").is_file(),
)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "site" / "throw_away_format-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: throw-away-format\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[molehunt.dictionary_formats]\nthrow-away = throw_away_format:FORMAT\n")
    (tmp_path / "site" / "throw_away_format.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "throw_away_format", raising=False)


@pytest.mark.usefixtures("plugin")
def test_a_folder_of_the_plugins_family_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    with pytest.raises(InvalidInput, match=r"Throw-away: throw_away\.json"):
        mh.load_dictionary(folder)
    (folder / "throw_away.json").write_text(json.dumps(8))
    found = mh.load_dictionary(folder, d_model=8, k=3)
    assert (found.d_in, found.d_dict, str(found.site)) == (8, 8, "L2.resid")
    assert dictionary_formats()[-1].family == "Throw-away"
    with pytest.raises(UsageError, match="reads 8 values a token"):
        mh.load_dictionary(folder, d_model=9)


@pytest.mark.usefixtures("plugin")
def test_a_plugin_that_is_no_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "site" / "throw_away_format.py").write_text("FORMAT = 7\n")
    with pytest.raises(UsageError, match=r"throw-away \(molehunt.dictionary_formats\) is no DictionaryFormat"):
        mh.load_dictionary(tmp_path)
