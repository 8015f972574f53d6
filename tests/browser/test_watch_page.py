"""A watch's page in a real browser, from disk."""

from dataclasses import replace
from pathlib import Path

import pytest

from chromium import needs_chromium
from molehunt.report.watch_page import render_watch
from watch_samples import HOSTILE, published, sample

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("watch")
    pages = {
        "hostile.html": sample(HOSTILE),
        "published.html": published(HOSTILE),
        "quiet.html": replace(sample(), rows=0, flagged=0, share_flagged=None, alerts=(), shown=()),
    }
    for name, report in pages.items():
        (made / name).write_text(render_watch(report), encoding="utf-8")
    return made


@pytest.mark.parametrize("name", ["hostile.html", "published.html", "quiet.html"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_fits(browser, folder: Path, name: str, width: int, scheme: str) -> None:
    address = (folder / name).as_uri()
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == [] and requests == [address]
    sections = page.eval_on_selector_all("section", "all => all.map(s => s.id)")
    assert sections == ["verdict", "scores", "alerts", "directions", "end-words", "drift", "limits"]
    assert page.locator("svg.figure").bounding_box()["width"] > 250
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 22, 24)"
    assert dark == (scheme == "dark")
    page.close()


def test_hostile_text_is_shown_and_not_run(browser, folder: Path) -> None:
    page = browser.new_page()
    page.goto((folder / "hostile.html").as_uri())
    assert page.title().startswith("FLAGGED: watch of organism<img src=x")
    assert page.locator("img, script").count() == 0
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    for place in ("#verdict h1", "#alerts tbody", "#directions .rows", "#end-words tbody"):
        text = page.locator(place).first.inner_text()
        assert "<img src=x onerror=" in text and "⟦U+202E⟧" in text and "\u202e" not in text, place
    page.close()


def test_groups_of_rows_open_by_keyboard_and_it_prints(browser, folder: Path) -> None:
    page = browser.new_page()
    page.goto((folder / "hostile.html").as_uri())
    first = page.locator("#directions details").first
    assert not first.locator(".rows").is_visible()
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert first.locator(".rows").is_visible() and first.locator(".rows li").count() == 4
    assert len(page.pdf()) > 10_000
    page.close()


def test_a_script_put_into_the_page_is_not_run(browser, folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    source = (folder / "quiet.html").read_text(encoding="utf-8")
    changed.write_text(source.replace("</main>", '<script>document.title="run"</script></main>'), encoding="utf-8")
    page = browser.new_page()
    page.goto(changed.as_uri())
    assert page.title() != "run"
    page.close()
