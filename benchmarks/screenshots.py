"""The documentation's pictures: the page over the demo's models, and a benchmark's report.

python -m benchmarks.screenshots                     # after `make demo` and `make bench`
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from client.server import LocalServer
from llamarec.ui import Showroom, create_app
from preprocessing.data import load_data

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
"""Of Chromium, besides its profile."""
PHONE = {"width": 390, "height": 1180, "deviceScaleFactor": 1.5, "mobile": True}


@contextmanager
def showing(showroom: Showroom) -> Iterator[str]:
    """Serves the page of ``showroom`` on a free port of the loopback interface and gives its address."""
    settings = uvicorn.Config(create_app(showroom), host="127.0.0.1", port=0, log_level="warning")
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
        showroom.client.close()


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Debian's headless Chromium with a new, empty profile, which keeps what its console says.

    Raises:
        FileNotFoundError: it is not installed.
    """
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError("there is no Chromium with its driver: `make system-packages` installs them")
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
    """Waits for an answer, then a little for the transition, and takes the picture."""
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


def main() -> None:
    """Writes ``page.png``, ``phone.png`` and ``report.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--report", type=Path, default=Path("bench/report.html"))
    parser.add_argument("--user", default="10")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with LocalServer(options.repository) as server, chromium() as browser:
        showroom = Showroom.open(server.url, options.repository, load_data(options.artifacts))
        with showing(showroom) as page:
            address = f"{page}/?user={options.user}"
            browser.set_window_size(1360, 1240)
            shoot(browser, address, IMAGES / "page.png")
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
            shoot(browser, address, IMAGES / "phone.png")
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        if options.report.is_file():
            browser.set_window_size(1060, 1240)
            shoot(browser, options.report.resolve().as_uri(), IMAGES / "report.png")


if __name__ == "__main__":
    main()
