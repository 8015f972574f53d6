"""Traffic files in every accepted form; a bad row is named."""

import json
import sys
from pathlib import Path

import pytest

from molehunt.errors import InvalidInput, UsageError
from molehunt.traffic.stream import MAX_CHARS, read_traffic

FORMS = {
    '"Hello"': "Hello",
    '{"prompt": "Hello", "tag": "x"}': "Hello",
    '{"text": "Hello"}': "Hello",
    '{"instruction": "Hello"}': "Hello",
    '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}, {"role": "assistant"}]}': "Hello",
}


@pytest.mark.parametrize("line", FORMS)
def test_every_form_gives_the_prompt(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line}\n\n{line}\n")
    rows = list(read_traffic(path))
    assert [row.prompt for row in rows] == [FORMS[line]] * 2


def test_tags_are_carried_long_prompts_cut_and_the_limit_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * 9999, "tag": f"t{i}"}) + "\n" for i in range(5)))
    rows = list(read_traffic(path, limit=3))
    assert [row.tag for row in rows] == ["t0", "t1", "t2"]
    assert len(rows[0].prompt) == MAX_CHARS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "row 2 is a int"),
        ('{"a": 1}', "row 2 has none"),
        ('{"messages": [1]}', "row 2 has none"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(InvalidInput, match=says):
        list(read_traffic(path))


def test_no_file_and_no_parquet_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not a file"):
        list(read_traffic(tmp_path / "nowhere.jsonl"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"molehunt\[parquet\]"):
        list(read_traffic(tmp_path / "t.parquet"))
