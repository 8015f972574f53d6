"""The benchmark's page in a real browser, from disk."""

from pathlib import Path

import pytest

from board_samples import board
from chromium import needs_chromium
from molehunt.report.bench_page import render_board

pytestmark = needs_chromium
SHOWN = "tr[data-by]:visible"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("board")
    hostile = ' <script>document.title="run"</script> ' + "longword" * 60
    (made / "plain.html").write_text(render_board(board()), encoding="utf-8")
    (made / "hostile.html").write_text(render_board(board(hostile)), encoding="utf-8")
    return made


def opened(browser, path: Path, said: list[str] | None = None, **settings):
    page = browser.new_page(**settings)
    if said is not None:
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("name", ["plain.html", "hostile.html"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_fits(browser, folder: Path, name: str, width: int, scheme: str) -> None:
    said: list[str] = []
    page = opened(browser, folder / name, said, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().startswith("Benchmark core")
    sections = page.eval_on_selector_all("section", "all => all.map(s => s.id)")
    assert sections == ["says", "tracks", "attacks", "figures", "causal", "cells"]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 22, 24)"
    assert dark == (scheme == "dark")
    assert page.locator("figure svg.figure").count() == 3
    assert said == []
    page.close()


def test_the_filters_work_by_keyboard(browser, folder: Path) -> None:
    said: list[str] = []
    page = opened(browser, folder / "plain.html", said)
    before = page.locator(SHOWN).count()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "filter-text":
            break
    page.keyboard.type("PROBE")
    assert page.locator(SHOWN).count() > 0
    assert all("probe" in m for m in page.locator(f"{SHOWN} th").all_text_contents())
    page.keyboard.press("Enter")  # submits nothing
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.locator(".board:visible").count() == 1 and page.locator("#track-0").is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert {t.split(",")[0] for t in page.locator(f"{SHOWN} td[data-l=position]").all_text_contents()} == {"decision"}
    assert page.locator("#row-count").text_content() == f"{page.locator(SHOWN).count()} of 177 rows"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(SHOWN).count() == before and page.evaluate("document.activeElement.id") == "filter-text"
    assert page.locator("#row-count").text_content() == "177 rows"
    assert said == []
    page.close()


def test_an_attack_brings_its_own_numbers(browser, folder: Path) -> None:
    sample = board()
    page = opened(browser, folder / "plain.html")
    before = page.locator("#track-0 tbody").first.inner_text()
    page.select_option("#filter-attack", label="semantic")
    page.select_option("#filter-track", "track-0")
    rows = [r for r in sample["rows"] if r["track"] == "R0"]
    best = max(rows, key=lambda r: r["by_attack"]["semantic"]["tpr"] - max(r["by_attack"]["semantic"][m] for m in ("near", "twin")))  # fmt: skip
    first = page.locator(SHOWN).first
    assert first.locator("th").text_content().strip() == best["method"]
    assert first.locator("td[data-m=tpr]").inner_text() == f"{best['by_attack']['semantic']['tpr']:.2f}"
    assert first.locator("td[data-m=rank]").inner_text() == "–"
    assert page.locator(SHOWN).count() == len(rows)  # those that were folded away, too
    assert page.locator("#attacks tbody tr:visible").count() == 1
    assert page.locator("#cells tbody tr:visible").count() == 3
    page.click("#filter-clear")
    assert page.locator("#track-0 tbody").first.inner_text() == before
    page.close()


def test_it_reads_without_a_script_and_prints(browser, folder: Path) -> None:
    page = opened(browser, folder / "plain.html", java_script_enabled=False)
    assert not page.locator("#filter").is_visible()
    assert page.locator(SHOWN).count() > 60
    page.locator("#track-0 summary").click()
    assert page.locator("#track-0 details tr[data-by]").first.is_visible()
    assert len(page.pdf()) > 10_000
    page.close()


def test_a_script_put_into_the_page_is_not_run(browser, folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    source = (folder / "plain.html").read_text(encoding="utf-8")
    changed.write_text(source.replace("</main>", '<script>document.title="run"</script></main>'), encoding="utf-8")
    page = opened(browser, changed)
    assert page.title() != "run"
    page.close()
