"""The page over the real server, and a headless Chromium to look at it."""

import shutil
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from llamarec.ui import Showroom, create_app
from preprocessing.data import load_data

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def page(server, repository, artifacts) -> Iterator[str]:
    """The address of the page over the tiny ranker's server."""
    showroom = Showroom.open(server.url, repository, load_data(artifacts))
    settings = uvicorn.Config(create_app(showroom), host="127.0.0.1", port=0, log_level="warning")
    running = uvicorn.Server(settings)
    socket = settings.bind_socket()
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    showroom.client.close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A browser with a new, empty profile."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.fail("the page is tested in Chromium: `make system-packages` installs it")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()
