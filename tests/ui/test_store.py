"""The page of a server with a store: what is chosen is recorded, and items are added and hidden."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import pytest
import screenshots
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from llamarec.page.app import DemoPage
from llamarec_client.recommender import RecommenderClient
from preprocessing.data import load_data
from serving.server.local import LocalServer
from stores.address import open_store

TITLE = "Star Wars: A Newer Hope (1999)"


class Live(NamedTuple):
    """A page whose server has a store."""

    address: str
    url: str
    """gRPC endpoint of the server."""
    store: str


@pytest.fixture(scope="module")
def live(titled_repository, artifacts, tmp_path_factory) -> Iterator[Live]:
    store = f"sqlite:///{tmp_path_factory.mktemp('page') / 'store'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMAREC_STORE", store)
        running = LocalServer(titled_repository)
        with running as server:
            page = DemoPage.open(server.url, titled_repository, load_data(artifacts), store)
            with screenshots.showing(page) as address:
                yield Live(address, server.url, store)


def call(url: str, body: object = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.mark.thorough
def test_what_is_chosen_is_recorded_and_answered_to(live):
    """The list is the server's own for that user id, and not the one before; forgetting empties the history."""
    before = call(f"{live.address}/api/recommend", {"visitor": "ann"})
    history = call(f"{live.address}/api/events", {"visitor": "ann", "items": ["50", "181"]})
    assert history == [
        {"id": "50", "title": "Star Wars (1977)"},
        {"id": "181", "title": "Return of the Jedi (1983)"},
    ]
    assert call(f"{live.address}/api/visitors/ann") == history
    after = call(f"{live.address}/api/recommend", {"visitor": "ann"})
    with RecommenderClient(live.url) as client:
        assert [row["id"] for row in after["ranked"]] == [row.item_id for row in client.recommend(user_id="ann")]
    assert after["ranked"] != before["ranked"]
    assert "Star Wars (1977)" in after["prompt"]
    assert call(f"{live.address}/api/events", {"visitor": "ann", "items": ["172"], "anew": True}) == [
        {"id": "172", "title": "The Empire Strikes Back (1980)"}
    ]
    assert call(f"{live.address}/api/events", {"visitor": "ann", "items": [], "anew": True}) == []


@pytest.mark.thorough
def test_a_new_item_is_found_ranked_and_hidden(live):
    """Its title finds it, it is among the candidates and in the prompt, and hidden it is nowhere."""
    new = call(f"{live.address}/api/items", {"title": f"  {TITLE} "})
    assert new["title"] == TITLE
    assert call(f"{live.address}/api/items?q=newer+hope") == [new]
    asked = {"history": ["172", "181", new["id"]]}
    answer = call(f"{live.address}/api/recommend", asked)
    assert answer["unknown"] == []
    assert TITLE in answer["prompt"].partition("Candidate pool")[0]
    hidden = answer["ranked"][0]["id"]
    assert [item["id"] for item in call(f"{live.address}/api/hidden", {"item": hidden, "hidden": True})] == [hidden]
    again = call(f"{live.address}/api/recommend", asked)
    assert hidden not in {row["id"] for name in ("retrieved", "ranked") for row in again[name]}
    assert (
        call(f"{live.address}/api/hidden", {"item": hidden, "hidden": False})
        == call(f"{live.address}/api/hidden")
        == []
    )
    assert call(f"{live.address}/api/recommend", asked)["ranked"] == answer["ranked"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("items", {"title": " "}, 400),
        ("items", {"title": "x" * 201}, 422),
        ("events", {"visitor": "", "items": []}, 422),
        ("events", {"visitor": "ann", "items": ["x" * 513]}, 422),
    ],
)
def test_what_cannot_be_recorded_is_refused(live, path, body, code):
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(f"{live.address}/api/{path}", body)
    assert raised.value.code == code


def test_without_a_store_the_page_changes_nothing(page):
    assert call(f"{page}/api/facts")["store"] is False
    with pytest.raises(urllib.error.HTTPError, match=r"405|404"):
        call(f"{page}/api/events", {"visitor": "ann", "items": ["50"]})


@pytest.mark.ui
def test_choosing_adding_and_hiding_in_the_browser(chromium, live):
    """A click on a recommended title is recorded and changes the lists; a typed title is found by the search, chosen
    and survives a reload; a hidden one is gone until it is shown again.
    """
    chromium.set_window_size(1360, 1100)
    chromium.get(live.address)
    wait = WebDriverWait(chromium, 60)

    def settled(browser) -> bool:
        return browser.find_element(By.ID, "result").get_attribute("aria-busy") == "false" and bool(
            shown("#ranked .take")
        )

    def shown(selector: str) -> list[str]:
        return chromium.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)", selector
        )

    wait.until(settled)
    first = shown("#ranked .take")[0]
    chromium.find_element(By.CSS_SELECTOR, "#ranked .take").click()
    wait.until(lambda _: shown("#history li") == [first])
    wait.until(settled)
    assert first not in shown("#ranked .take")
    assert "recorded for you: 1 item" in chromium.find_element(By.ID, "count").text
    chromium.find_element(By.ID, "new-title").send_keys("The Very Newest Film (2026)", Keys.ENTER)
    wait.until(lambda b: "was added as new-" in b.find_element(By.ID, "message").text)
    chromium.find_element(By.ID, "search").send_keys("newest film")
    wait.until(lambda _: shown("#search-list span") == ["The Very Newest Film (2026)"])
    chromium.find_element(By.ID, "search").send_keys(Keys.ENTER)
    wait.until(lambda _: shown("#history li") == ["The Very Newest Film (2026)", first])
    wait.until(settled)
    chromium.refresh()
    wait.until(lambda _: shown("#history li") == ["The Very Newest Film (2026)", first])
    wait.until(settled)
    away = shown("#ranked .take")[0]
    chromium.execute_script("arguments[0].click()", chromium.find_element(By.CSS_SELECTOR, "#ranked .hide"))
    wait.until(lambda _: any(away in row for row in shown("#hidden-items li")) or not shown("#hidden-items li"))
    wait.until(lambda _: settled(chromium) and away not in shown("#ranked .take"))
    chromium.execute_script("document.querySelector('#hidden-items button').click()")
    wait.until(lambda _: settled(chromium) and away in shown("#ranked .take"))
    chromium.find_element(By.ID, "clear").click()
    wait.until(lambda _: shown("#history li") == [])
    with closing(open_store(live.store)) as store:
        assert store.last(chromium.execute_script("return localStorage.visitor").encode()) == []
    assert not [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
