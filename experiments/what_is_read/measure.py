"""Write the folders of one architecture in every way of saving, and run every command on each."""

import functools
import importlib
import shutil
import traceback
import warnings
from pathlib import Path
from typing import Any

from experiments.setting import Setting
from experiments.what_is_read.adapter_savings import ADAPTERS
from experiments.what_is_read.case import Case, Saving, fresh
from experiments.what_is_read.cell import Cell
from experiments.what_is_read.check_folders import check_directions, check_files
from experiments.what_is_read.check_models import check_audit, check_read, check_watch
from experiments.what_is_read.command import hub_cache
from experiments.what_is_read.isolated import isolated
from experiments.what_is_read.quantised_savings import QUANTISED
from experiments.what_is_read.whole_savings import WHOLE
from experiments.what_is_read.zoo import ARCHITECTURES, NO_DECODER

SAVINGS: tuple[Saving, ...] = (*WHOLE, *ADAPTERS, *QUANTISED)
EVERYWHERE = ("single", "in-memory", "lora")
"""Ways of saving that are audited and watched in every architecture."""
DEEP = ("llama",)
"""Architectures that are audited and watched in every way of saving."""
QUICK = {
    "llama": ("single", "compiled", "lora"),
    "qwen3_moe": ("in-memory",),
    "bert": ("single",),
}
SECONDS = 240.0
"""Time after which the work on one way of saving counts as hanging."""


def runs(setting: Setting) -> list[str]:
    return list(QUICK) if setting.quick else list(ARCHITECTURES)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Way of saving → command → cell, for one architecture."""
    found: dict[str, Any] = {}
    for saving in savings_of(name, quick=setting.quick):
        folder = fresh(setting.scratch / name / saving.name)
        deep = not setting.quick and (name in DEEP or saving.name in EVERYWHERE)
        cells = isolated(functools.partial(cells_of, name, saving, folder, deep=deep), seconds=SECONDS)
        if "crashed" in cells:
            cells = {"files": Cell(status="WRONG", why=f"crashed: {cells['crashed'].strip()[-300:]}").to_dict()}
        found[saving.name] = cells
        said = ", ".join(f"{command} {cell['status']}" for command, cell in cells.items())
        print(f"{name}, {saving.name}: {said}", flush=True)
        if not any(cell["status"] == "WRONG" for cell in cells.values()):
            shutil.rmtree(folder)  # what is wrong stays, to be looked at
    return found


def savings_of(name: str, *, quick: bool) -> list[Saving]:
    """The ways of saving in which an architecture is written."""
    chosen = [saving for saving in SAVINGS if saving.applies(name)]
    if quick:
        return [saving for saving in chosen if saving.name in QUICK[name]]
    if name in NO_DECODER:
        return [saving for saving in chosen if saving in WHOLE]
    return chosen


def cells_of(name: str, saving: Saving, folder: Path, *, deep: bool) -> dict[str, Any]:
    """Command → cell, for one way of saving."""
    importlib.import_module("transformers").logging.set_verbosity_error()
    importlib.import_module("transformers").logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = saving.make(name, folder)
        with hub_cache(case.cache):
            return {command: cell.to_dict() for command, cell in checked(name, saving, case, folder, deep=deep).items()}


def checked(name: str, saving: Saving, case: Case, folder: Path, *, deep: bool) -> dict[str, Cell]:
    """Every command on one pair of folders; an exception of a check is a wrong cell."""
    no_decoder = name in NO_DECODER
    checks = {
        "files": lambda: check_files(case, saving, no_decoder=no_decoder),
        "directions": lambda: check_directions(case, saving, no_decoder=no_decoder),
        "read": lambda: check_read(case, saving, no_decoder=no_decoder),
    }
    if deep:
        checks["audit"] = lambda: check_audit(case, saving, folder, no_decoder=no_decoder)
        checks["watch"] = lambda: check_watch(case, saving, folder, no_decoder=no_decoder)
    found: dict[str, Cell] = {}
    for command, check in checks.items():
        try:
            found[command] = check()
        except Exception:
            text = traceback.format_exc()
            found[command] = Cell(status="WRONG", why=text.strip().splitlines()[-1][:300], output=text[-3000:])
    return found
