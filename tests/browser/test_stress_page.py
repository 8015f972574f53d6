"""A stress test's page in a real browser, from disk."""

from pathlib import Path

import pytest
import torch

from chromium import needs_chromium
from molehunt.measure.interval import proportion
from molehunt.report.stress_page import render_stress
from molehunt.steer.budget import Disturbance
from molehunt.stress.certificate import certificate
from molehunt.stress.evaluation.arms import Arm, Control, InputArm
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.evaluation.drift import WatchedDrift
from molehunt.stress.evaluation.norms import times_longer
from molehunt.stress.evaluation.valid_set import ValidSet
from molehunt.stress.study import Study

pytestmark = needs_chromium
HOSTILE = ' <script>document.title="run"</script> ' + "longword" * 40
N = 12


def study() -> Study:
    zeros = torch.zeros(N)
    drift = WatchedDrift(
        pre=zeros, largest=zeros, codes=zeros, floor=zeros, reactivated=torch.full((N,), torch.nan), silent=zeros == 0
    )
    length = torch.linspace(0.2, 3.0, N)
    arms = tuple(
        Arm(name=name, recovered_rows=(True,) * (N - i) + (False,) * i, length=length, drift=drift)
        for i, name in enumerate(("free", "paper", "exact"))
    )
    random = torch.full((N,), torch.inf)
    controls = {
        "random target": Control(name="random target", recovered_rows=(False,) * N, lengths=random),
        "undefended": Control(name="undefended", recovered_rows=(True,) * N, lengths=length / 2),
        "random perturbation": Control(name="random perturbation", recovered_rows=(False,) * N),
        "universal perturbation": Control(name="universal perturbation", recovered_rows=(True,) * N),
    }
    valid = ValidSet(
        prompts=tuple([i] for i in range(N)),
        before=tuple([1] for _ in range(N)),
        defended=tuple([2] for _ in range(N)),
        shown=(True,) * N,
        still_shown=(False,) * N,
        broken=(False,) * N,
    )
    return Study(
        valid=valid,
        rows=tuple(range(N)),
        unit=11.3,
        zero_perturbation=proportion(0, N),
        arms=arms,
        controls=controls,
        specificity_gap=times_longer(random.clamp_max(8), arms[-1].lengths),
        lower_radii=zeros,
        largest_provable=0.08,
        cost=Disturbance(kl=0.01, loss=0.002, tokens=90),
        clean_changed=proportion(1, 40),
        inputs=(
            InputArm(name="soft suffix", recovered_rows=(True,) * N, random_target_rows=(True,) * N, drift=drift),
            InputArm(name="discrete suffix", recovered_rows=(False,) * N, random_target_rows=(True,) * N, drift=drift),
        ),
        example_answers=((HOSTILE, "four", HOSTILE),),
    )


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_fits(browser, tmp_path: Path, width: int, scheme: str) -> None:
    found = study()
    about = {"match": [HOSTILE], "exclude": [], "site": "L3.resid", "command": HOSTILE, "fix": "set 0 of 2 latents"}
    payload = certificate(found, StressConfig(), about)
    file = tmp_path / "stress.html"
    file.write_text(render_stress(found, payload, title=HOSTILE))
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert said == [] and requests == [file.as_uri()]
    assert page.title().startswith("Stress:")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("polyline.curve").count() == 5
    through = page.locator("table", has=page.locator("caption", has_text="through the prompt"))
    assert through.locator("tbody tr").count() == 2
    assert page.locator(".lead b").first.inner_text() == "RECOVERABLE"
    texts = page.locator("svg text").all()
    drawn = page.locator("svg").first.bounding_box()
    assert all(
        text.bounding_box()["x"] + text.bounding_box()["width"] <= drawn["x"] + drawn["width"] + 1 for text in texts
    )
    page.close()
