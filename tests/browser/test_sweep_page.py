"""A layer sweep by position in a real browser, from disk."""

from pathlib import Path

import pytest

from chromium import needs_chromium
from molehunt.measure.interval import proportion
from molehunt.report.sweep_page import render_sweep
from molehunt.site import Site
from molehunt.steer.sweep import Sweep, Swept, SweptRole

pytestmark = needs_chromium
HOSTILE = ' <script>document.title="run"</script> ' + "longword" * 40
ROLES = ("trigger token 2 of 4", "trigger tokens 13-14 of 14", "first token behind", "last prompt token")


def swept(n_layers: int) -> Sweep:
    def block(layer: int, shift: int) -> Swept:
        removed = max(0, 100 - 20 * abs(layer - shift))
        return Swept(
            site=Site(layer),
            removed=proportion(removed, 100),
            by_noise=proportion(removed // 3, 100),
            induced=proportion(100 - removed, 100),
        )

    def blocks(shift: int) -> tuple[Swept, ...]:
        return tuple(block(layer, shift) for layer in range(n_layers))

    return Sweep(
        shown=proportion(100, 100),
        without_trigger=proportion(1, 100),
        blocks=blocks(0),
        roles=tuple(SweptRole(role=role, blocks=blocks(i)) for i, role in enumerate(ROLES)),
    )


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("n_layers", [6, 40])
def test_it_opens_quietly_and_fits(browser, tmp_path: Path, width: int, scheme: str, n_layers: int) -> None:
    file = tmp_path / "sweep.html"
    file.write_text(render_sweep(swept(n_layers), title=HOSTILE, phrases=[HOSTILE], command=HOSTILE))
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert said == [] and requests == [file.as_uri()]
    assert page.title().startswith("Layer sweep:")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [map.bounding_box() for map in page.locator(".maps svg").all()]
    assert len(boxes) == 3 and all(box["width"] > 200 for box in boxes)
    if n_layers == 6:  # nothing has to be scrolled, and at full width two stand side by side
        assert all(box["x"] + box["width"] <= width for box in boxes)
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1100)
    labels = [map.get_attribute("aria-label") for map in page.locator(".maps svg").all()]
    assert (
        labels[0]
        == "removed by the patch, by position and block: at most 1.00, at the trigger token 2 of 4 at L0.resid"
    )
    cells = page.locator(".maps svg").first.locator(".in")
    assert [cell.text_content() for cell in cells.all()[n_layers : n_layers + 3]] == ["80", "100", "80"]
    # every label ends where the cells begin: none is cut off at the left
    assert all(text.evaluate("t => t.getBBox().x") >= 0 for text in page.locator(".maps text[text-anchor=end]").all())
    page.locator("details summary").click()
    assert page.locator("details tbody tr").count() == n_layers * len(ROLES)
    page.close()


def test_without_positions_there_are_no_maps() -> None:
    told = swept(3)
    page = render_sweep(
        Sweep(shown=told.shown, without_trigger=told.without_trigger, blocks=told.blocks),
        title="t",
        phrases=[],
        command="c",
    )
    assert "maps" not in page.split("</style>")[1] and "Which token" not in page
