"""The page in a real browser, from disk."""

from pathlib import Path

import pytest

from chromium import needs_chromium
from molehunt.report.machine import write_report
from report_samples import sample

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    hostile = ' <script>document.title="run"</script> ' + "longword" * 60
    return write_report(sample(hostile), tmp_path_factory.mktemp("report")).as_uri()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_quietly_and_fits(browser, address: str, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    assert said == []
    assert requests == [address]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().startswith("FLAGGED-CAUSAL")
    sections = page.eval_on_selector_all("section", "all => all.map(s => s.id)")
    middle = ["evidence", "where", "contexts", "causal", "switch-off", "robustness"]
    assert sections == ["verdict", *middle, "cost", "limits", "appendix"]
    page.close()


def test_it_prints_and_links_to_a_finding(browser, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}#answers-1")
    assert page.locator("#answers-1").is_visible()
    assert len(page.pdf()) > 10_000
    page.close()


def test_a_script_put_into_the_page_is_not_run(browser, address: str, tmp_path: Path) -> None:
    page = browser.new_page()
    source = Path(address.removeprefix("file://")).read_text()
    changed = tmp_path / "changed.html"
    changed.write_text(source.replace("</main>", '<script>document.title="run"</script></main>'))
    page.goto(changed.as_uri())
    assert page.title() != "run"
    page.close()
