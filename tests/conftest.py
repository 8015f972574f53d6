"""Settings of every test: the hypothesis profile, no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "molehunt",
    deadline=None,  # the first torch call of a process takes most of a second
    derandomize=True,  # the same examples every time: a red run can be repeated
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("molehunt")
