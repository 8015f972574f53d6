"""The live page in a real browser: log in, ask, watch scores come, review an alert."""

import time
from collections.abc import Callable

import pytest

from chromium import needs_chromium

pytestmark = needs_chromium
KEY = "a-key-for-tests-only"
HOSTILE = "<img src=x onerror=document.title='run'>"


def opened(browser, url: str, width: int = 1280, scheme: str = "light"):
    """The page behind its key, and everything that the browser complained about."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.goto(url)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.get_by_label("Key of this server").fill(KEY)
    page.get_by_role("button", name="Open the live page").click()
    until(lambda: page.locator("#link").inner_text() == "open")
    return page, said


def until(so: Callable[[], bool]) -> None:
    """The page's policy forbids the string that `wait_for_function` would evaluate."""
    end = time.monotonic() + 20
    while not so():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.05)


def complete(served, text: str) -> None:
    with served.client() as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_an_answer_is_drawn_an_alert_is_shaded_and_reviewed(serve, browser) -> None:
    served = serve(threshold=-1e9)
    page, said = opened(browser, served.url)
    complete(served, HOSTILE)
    page.wait_for_selector("#stream circle.hit")
    assert page.locator("#now-word").inner_text() == "Flagged"
    alert = page.locator("details.alert").first
    alert.wait_for()
    page.wait_for_selector("details.alert .shaded span")  # explained while nobody waited
    assert alert.locator("pre").count() == 2 and "run'>" in alert.locator(".shaded").inner_text()
    assert page.title().startswith("Molehunt live")
    page.get_by_role("button", name="Dismiss: benign").click()
    page.wait_for_selector("details.alert .tag.note")
    (kept,) = served.ledger.recent(1)
    assert kept.status == "dismissed"
    complete(served, "abc")
    until(lambda: page.locator("#stream circle").count() == 2)
    assert said == []
    page.close()


def test_asking_shades_both_models_tokens_on_one_scale(serve, browser) -> None:
    served = serve()
    page, said = opened(browser, served.url)
    page.get_by_label("Prompt").fill("abc <b>")
    page.get_by_label("Prompt").press("Control+Enter")
    page.wait_for_selector("#asked-tuned span")
    tuned = page.locator("#asked-tuned span:not(.arrow)").count()
    assert tuned == page.locator("#asked-base span:not(.arrow)").count() > 5
    assert page.locator("#asked pre").count() == 2 and "<b>" in page.locator("#asked-tuned").inner_text()
    assert page.locator("#asked .s9").count() >= 1
    assert said == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_reached_by_keyboard(serve, browser, scheme: str) -> None:
    served = serve(threshold=-1e9)
    complete(served, "longword" * 20)
    page, said = opened(browser, served.url, width=390, scheme=scheme)
    page.wait_for_selector("details.alert .shaded span")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to alerts"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert said == []
    page.close()


def test_without_scripts_alerts_are_there_and_can_be_reviewed(serve, browser) -> None:
    served = serve(threshold=-1e9)
    complete(served, "abc")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(served.url)
    page.get_by_label("Key of this server").fill(KEY)
    page.get_by_role("button", name="Open the live page").click()
    page.get_by_role("button", name="Confirm: an attack").click()
    page.locator("details.alert .tag.confirmed").wait_for()  # a click does not wait for the page that it asks for
    assert page.locator("details.alert .tag.confirmed").count() == 1
    assert served.ledger.recent(1)[0].status == "confirmed"
    context.close()
