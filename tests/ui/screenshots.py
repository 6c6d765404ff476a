"""Takes the pictures of the documentation: the page of the demo's models, and the report of a load test.

python tests/ui/screenshots.py    # make screenshots, after `make demo` and `make bench`
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from llamarec.page.app import DemoPage, create_app
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.contract import STORE_VARIABLE
from serving.server.local import LocalServer

IMAGES = Path("docs/images")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
"""Flags of Chromium, in addition to its profile."""
PHONE = {"width": 390, "height": 1180, "deviceScaleFactor": 1.5, "mobile": True}


@contextmanager
def showing(page: DemoPage) -> Iterator[str]:
    """Serve a page on a free port of the loopback interface, and yield its address."""
    settings = uvicorn.Config(create_app(page), host="127.0.0.1", port=0, log_level="warning")
    socket, running = settings.bind_socket(), uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)
        page.client.close()


def programs() -> tuple[str, str]:
    """Return the paths of Chromium and of its driver.

    Raises:
        InputError: one of them is not installed.
    """
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise InputError("Chromium and its driver are not installed: run `make system-packages`")
    return browser, driver


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Yield a headless Chromium with a new, empty profile; its console is logged.

    Raises:
        InputError: Chromium or its driver is not installed.
    """
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        chrome.set_page_load_timeout(60)
        try:
            yield chrome
        finally:
            chrome.quit()


def shoot(browser: webdriver.Chrome, address: str, path: Path) -> None:
    """Take a picture of an address; on the page, after an answer has arrived and its transition has ended."""
    browser.get(address)
    if address.startswith("http"):
        WebDriverWait(browser, 120).until(
            lambda b: (
                b.find_elements(By.CSS_SELECTOR, "#ranked li")
                and b.find_element(By.ID, "result").get_attribute("aria-busy") == "false"
            )
        )
        time.sleep(0.6)
    browser.save_screenshot(str(path))


def take_pictures(artifacts: Path, repository: Path, report: Path, user: str) -> None:
    """Write ``page.png`` and ``phone.png``, and ``report.png`` if there is a report.

    Args:
        artifacts: folder with the data set.
        repository: the exported model repository, which is served.
        report: HTML report of a load test.
        user: raw id of the user whom the page shows.
    """
    IMAGES.mkdir(exist_ok=True)
    with ExitStack() as opened:
        store = f"sqlite:///{opened.enter_context(tempfile.TemporaryDirectory())}/store"
        os.environ[STORE_VARIABLE] = store  # of the server
        browser, server = opened.enter_context(chromium()), opened.enter_context(LocalServer(repository))
        with showing(DemoPage.open(server.url, repository, load_data(artifacts), store)) as url:
            address = f"{url}/?user={user}"
            browser.set_window_size(1360, 1240)
            shoot(browser, address, IMAGES / "page.png")
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
            shoot(browser, address, IMAGES / "phone.png")
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        if report.is_file():
            browser.set_window_size(1060, 1240)
            shoot(browser, report.resolve().as_uri(), IMAGES / "report.png")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--report", type=Path, default=Path("bench/report.html"), help="Report of `make bench`.")
    parser.add_argument("--user", default="10", help="Raw id of the user whom the page shows.")
    given = parser.parse_args()
    try:
        take_pictures(given.artifacts, given.repository, given.report, given.user)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
