"""The demo's page in headless Chromium: mouse, keyboard, addresses and screen sizes."""

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.ui


def ready(browser):
    """Wait until an answer is displayed, and return the browser."""
    WebDriverWait(browser, 60).until(
        lambda b: (
            b.find_element(By.ID, "result").get_attribute("aria-busy") == "false"
            and b.find_elements(By.CSS_SELECTOR, "#ranked li")
        )
    )
    return browser


@pytest.fixture
def browser(chromium):
    chromium.set_window_size(1360, 1100)
    yield chromium
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, "the page logs no error and breaks no policy of its own"


def texts(browser, selector: str) -> list[str]:
    """Return the text of all matching elements, read in one script call."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)", selector
    )


def test_a_user_is_picked_and_both_lists_stand_side_by_side(browser, page):
    """Both lists have the same 20 items, and every arrow shows the difference of an item's two places."""
    browser.get(page)
    ready(browser).find_element(By.ID, "user").send_keys("10")
    WebDriverWait(browser, 20).until(lambda b: texts(b, "#user-list span")[:1] == ["user 10"])
    browser.find_element(By.ID, "user").send_keys(Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda b: "user 10:" in b.find_element(By.ID, "count").text)
    ready(browser)
    retrieved, ranked = (texts(browser, f"#{name} li > span") for name in ("retrieved", "ranked"))
    assert len(retrieved) == 20
    assert sorted(retrieved) == sorted(ranked)
    for place, (title, arrow) in enumerate(zip(ranked, texts(browser, "#ranked em"), strict=True)):
        moved = retrieved.index(title) - place
        assert arrow == ("=" if not moved else f"▲ {moved}" if moved > 0 else f"▼ {-moved}")
    scores = [float(text) for text in texts(browser, "#ranked i")]
    assert scores == sorted(scores, reverse=True)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#links path")) == 20
    left, right = (browser.find_element(By.ID, name).rect for name in ("retrieved", "ranked"))
    assert left["x"] + left["width"] <= right["x"]
    assert "What this user really chose next" in browser.find_element(By.ID, "truth").text


def test_a_history_is_built_from_searched_titles(browser, page):
    """A title that is searched and chosen with the keyboard joins the history, the address and the prompt.

    It is no longer recommended, and its button removes it again.
    """
    browser.get(page)
    search = ready(browser).find_element(By.ID, "search")
    for words in ("star wars", "godfather"):
        search.send_keys(words)
        WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#search-list li"))
        search.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
        ready(browser)
    assert [title.split(" (")[0] for title in texts(browser, "#history li > span")] == ["The Godfather", "Star Wars"]
    assert browser.current_url.endswith("?item=50&item=127")
    WebDriverWait(browser, 60).until(lambda b: "(2) The Godfather" in b.find_element(By.ID, "prompt").text)
    assert "Star Wars (1977)" not in texts(browser, "#ranked li > span")
    assert "tokens" in browser.find_element(By.ID, "tokens").text
    assert [name.split()[0] for name in texts(browser, "#legend li")] == [
        "features", "retriever", "prompt", "ranker", "between",
    ]  # fmt: skip
    browser.find_element(By.CSS_SELECTOR, "#history button").click()
    WebDriverWait(browser, 20).until(lambda b: b.current_url.endswith("?item=50"))


def test_an_address_can_be_shared(browser, page):
    """The page shows the history given in its address, and reports an unknown id."""
    browser.get(f"{page}/?item=50&item=nothing")
    ready(browser)
    assert "nothing (unknown)" in texts(browser, "#history li > span")
    assert "1 item is unknown" in browser.find_element(By.ID, "message").text


def test_titles_are_text_and_never_markup(browser, page):
    """An id in the address that looks like HTML is shown as text."""
    browser.get(f"{page}/?item=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    ready(browser)
    assert "<img src=x onerror=alert(1)> (unknown)" in texts(browser, "#history li > span")
    assert not browser.find_elements(By.CSS_SELECTOR, "#history img")


@pytest.mark.parametrize("width", [360, 390, 768])
def test_it_fits_a_phone(browser, page, width):
    """The page does not scroll sideways, and both lists are displayed side by side at every width."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        browser.get(f"{page}/?user=10")
        ready(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        left, right = (browser.find_element(By.ID, name).rect for name in ("retrieved", "ranked"))
        assert left["x"] + left["width"] <= right["x"]
        assert right["x"] + right["width"] <= width
        assert all(score.is_displayed() for score in browser.find_elements(By.CSS_SELECTOR, "#ranked i"))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
