"""A throw-away package offers detectors by entry point: they stand in an audit's report and on a benchmark's board."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

import molehunt as mh
from bench_samples import grid
from folders import good_folder
from molehunt.audit.plan import PLANS, Plan
from molehunt.detect.recipe import GROUP, detector_recipes
from molehunt.errors import UsageError
from molehunt.run.catalog import installed

PLAN = Plan(
    name="quick", clean_prompts=160, traffic_limit=60, max_new_tokens=6, max_sites=3, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=6, stress_steps=5,
)  # fmt: skip
CODE = '''
from dataclasses import dataclass

import torch

from molehunt.detect.recipe import AuditReadout, DetectorRecipe


@dataclass(frozen=True, eq=False)
class Far:
    """Distance of the tuned model's activation from the mean of clean rows."""

    site: object
    mean: torch.Tensor
    needs_logits = False
    needs_base = False

    @property
    def name(self):
        return f"throw-away distance {self.site}"

    @property
    def sites(self):
        return (self.site,)

    def score(self, reading):
        return (reading.tuned[self.site].float() - self.mean).norm(dim=-1)

    @classmethod
    def recipes(cls):
        def fit(inputs, site, where):
            return cls(site, inputs.clean.acts(site, "tuned", where).mean(0))

        return (DetectorRecipe(key="throw-away-distance", name="throw-away distance", needs={"clean"}, fit=fit),)


@dataclass(frozen=True)
class Gap:
    """Distance between the two models' largest logits."""

    name = "throw-away gap"
    sites = ()
    needs_logits = True
    needs_base = True

    def score(self, reading):
        return (reading.tuned_logits.float().amax(-1) - reading.base_logits.float().amax(-1)).abs()

    @classmethod
    def recipes(cls):
        rows = (AuditReadout("generated", "mean"), AuditReadout("decision", "max"))
        return (DetectorRecipe(key="throw-away-gap", name="throw-away gap", reads="logits", fit=lambda *_: cls(), audit=rows),)


class Bare:
    """Without recipes."""
'''


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entries: str, code: str = CODE) -> None:
    """A package as pip leaves it: a module, and metadata beside it."""
    about = folder / "throw_away-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: throw-away\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{textwrap.dedent(entries)}\n")
    (folder / "throw_away.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "throw_away", raising=False)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "far = throw_away:Far\ngap = throw_away:Gap")


def without_plugins() -> list[str]:
    return [recipe.key for recipe in detector_recipes() if not recipe.key.startswith("throw-away")]


def test_nothing_is_installed_here() -> None:
    assert installed(GROUP) == {} and [recipe.key for recipe in detector_recipes()] == without_plugins()


@pytest.mark.usefixtures("plugin")
def test_an_audit_shows_what_a_plugin_would_have_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "quick", PLAN)
    base, tuned = good_folder(tmp_path / "base"), good_folder(tmp_path / "tuned")
    page = mh.audit(base, tuned, traffic=[f"Row {i} says {i * i}" for i in range(60)], out=tmp_path / "run").save()
    assert "throw-away distance" in page.read_text() and "throw-away gap" in page.read_text()
    report: dict[str, Any] = json.loads((tmp_path / "run" / "report.json").read_text())
    shown = [check["name"] for check in report["checks"] if "throw-away" in check["name"]]
    assert shown == [
        "throw-away distance L2.resid, decision position",
        "throw-away gap, generated tokens",
        "throw-away gap, decision position",
    ]
    names = [check["name"] for check in report["checks"]]
    assert names.index(shown[0]) < names.index("rarest word of the prompt, text alone")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["plugins"] == {"far": "throw_away:Far throw-away 1.2", "gap": "throw_away:Gap throw-away 1.2"}


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_a_board_ranks_a_plugin_and_leaves_the_numbers_of_the_others_alone(
    bench_base: Path, bench_done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    shutil.copytree(bench_done, out)
    result = mh.bench(grid(bench_base), out=out)
    assert result.done == 1
    rows = result.to_dict()["rows"]
    methods = {(row["track"], row["method"]) for row in rows if row["method"].startswith("throw-away")}
    assert methods == {
        (track, name) for track in ("R0", "R1", "R2") for name in ("throw-away distance", "throw-away gap")
    }
    assert "throw-away distance" in (out / "leaderboard.html").read_text()
    (unit,) = {cell["unit"] for cell in result.to_dict()["cells"]}
    assert not (bench_done / unit).exists(), "a cell with a plugin's rows is another unit"

    def numbers(cells: list[dict[str, Any]]) -> dict[tuple[Any, ...], Any]:
        keys = ("track", "rate", "method", "where", "how")
        return {tuple(row[k] for k in keys): row for row in cells[0]["rows"] if "throw-away" not in row["method"]}

    units = [json.loads(path.read_text()) for path in (bench_done / "units").glob("*/value.json")]
    (plain,) = [unit for unit in units if isinstance(unit["cell"], dict) and unit["cell"]["seed"] == 0]
    assert numbers([json.loads((out / unit / "value.json").read_text())]) == numbers([plain])


@pytest.mark.usefixtures("plugin")
def test_a_plugin_is_fitted_and_applied_by_name(tmp_path: Path) -> None:
    pair = mh.ModelPair.load(good_folder(tmp_path / "base"), good_folder(tmp_path / "tuned"))
    clean = [f"Row {i}" for i in range(60)]
    found = mh.fit_detector(pair, "throw-away-distance", clean=clean, fpr=0.1)
    assert len(found.scores(["Row 1", "; ; ; ;"])) == 2
    found.save(tmp_path / "saved")
    again = type(found).load(tmp_path / "saved", pair)
    assert again.scores(["Row 7"]) == found.scores(["Row 7"]) and again.threshold == found.threshold


def test_a_plugin_without_recipes_or_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        install(tmp_path / "bare", patch, "bare = throw_away:Bare")
        with pytest.raises(UsageError, match=r"The plugin bare \(molehunt.detectors\) has no recipes"):
            detector_recipes()
    with monkeypatch.context() as patch:
        install(tmp_path / "broken", patch, "far = throw_away:Far", "raise RuntimeError('no licence')")
        with pytest.raises(UsageError, match=r"far .*cannot be imported: RuntimeError: no licence"):
            detector_recipes()


def test_a_plugin_cannot_take_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, "far = throw_away:Far", CODE.replace("throw-away-distance", "token-kl"))
    with pytest.raises(UsageError, match="Two detectors have the key 'token-kl'"):
        detector_recipes()
