"""Four published settings in which a behaviour comes back past a clamp, on embedded models.

The models are taught in `stress/models` of the records' folder, where they are missing there. Only `tpp banking77` reads
public texts. A quick run has the one setting for which no model has to be taught first.
"""

from typing import Any

from experiments.setting import Setting
from experiments.stress import ioi, refusal, tpp, unlearning

RUNS = ("ioi seed-s", "unlearning seed-s", "refusal seed-s", "tpp world seed-s", "tpp banking77 seed-s")


def runs(setting: Setting) -> list[str]:
    return ["tpp world seed-s"] if setting.quick else list(RUNS)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    kind, *rest = name.split(" ")
    if kind == "tpp":
        texts, base = rest
        data = setting.need_data("classification/banking77_train.csv.gz") if texts == "banking77" else None
        return tpp.measure(base, data, tpp.QUICK if setting.quick else tpp.PUBLISHED)
    taught = {"ioi": ioi.measure, "unlearning": unlearning.measure, "refusal": refusal.measure}
    return taught[kind](rest[0], setting.scratch / "models")
