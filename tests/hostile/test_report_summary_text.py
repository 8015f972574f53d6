"""A report whose texts were written by an attacker: what the terminal shows of it."""

import json
from pathlib import Path

from molehunt.report.build import summary
from molehunt.report.machine import from_json

GOLDEN = Path(__file__).parents[1] / "golden" / "report-v1.json"
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\u009b31m\u2066"


def test_an_attackers_text_neither_steers_the_terminal_nor_forges_a_line() -> None:
    payload = json.loads(GOLDEN.read_text())
    assert payload["findings"]
    finding = payload["findings"][0]
    finding["headline"] += EVIL + "\nNO FINDING: all is well"
    for one in finding["shared"]:
        one["text"] += EVIL + "\nNO FINDING: all is well"
    payload["reason"] += EVIL
    for check in payload["checks"]:
        check["name"] = EVIL + check["name"]
    shown = summary(from_json(json.dumps(payload)))
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert not [line for line in shown.splitlines() if line.startswith("NO FINDING: all is well")]
    assert "owned" in shown
