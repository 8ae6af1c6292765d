"""The page of `demo` in a real browser, headless: it searches, plays, draws a time line, and says what is wrong."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demo.test_demo import READ
from tests.demo.test_demo import files as files

selenium = pytest.importorskip("selenium", reason="the browser is driven by selenium: pip install selenium")
pytest.importorskip("flask", reason="the page's server is Flask: pip install 'umt_fast[demo]'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium with chromedriver; Debian: apt install chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def address(files: tuple[Path, Path]) -> Iterator[str]:
    """The command in a process of its own, one of its clips gone since `embed`."""
    features, weights = map(str, files)
    (files[0].with_name("clips") / "4.mp4").unlink()
    words = ["--tokenizer", str(files[0].with_name("words")), "--device", "cpu", "--port", "0"]
    command = [sys.executable, "-m", "umt_fast", "demo", "--features", features, "--weights", weights, *words]
    # A shell starts what runs in the background deaf to Ctrl-C, and a child stays so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
    yield line.split()[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "Traceback" not in process.stderr.read()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    for flag in ("headless=new", "no-sandbox", "window-size=1200,900", "disable-dev-shm-usage", *quiet):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What a condition gives once it is true. A browser is waited for, and a machine may be slow."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return value


def test_a_search_in_a_browser(address: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    def all_of(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def search(text: str) -> str:
        """The message after a search."""
        before = browser.execute_script("return found.dataset.done")
        browser.execute_script("document.getElementById('text').value = arguments[0]", text)
        all_of("form button")[0].click()
        until(lambda: browser.execute_script("return found.dataset.done") != before)
        return browser.find_element(By.ID, "said").text

    browser.get(address)
    until(lambda: len(all_of("li")) == 5)
    assert "Type what happens in a clip" in browser.find_element(By.ID, "said").text
    # One clip is gone: its card says so. The others play.
    assert "4.mp4 is not there any more" in until(lambda: all_of(".missing"))[0].text
    until(lambda: browser.execute_script("return [...document.querySelectorAll('video')].some(v => v.currentTime > 0)"))

    assert search("a b") == ""
    scores = [float(score.text) for score in all_of(".score")]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    playing = next(card for card in all_of("li") if not card.text.endswith("4.mp4") and "4.mp4" not in card.text)
    until(lambda: browser.execute_script("return arguments[0].querySelector('video').currentTime > 0", playing))
    next(button for button in playing.find_elements(By.TAG_NAME, "button") if button.text == "When?").click()
    until(lambda: len(playing.find_elements(By.CSS_SELECTOR, ".line button")) == 8)
    shot = tmp_path / "page.png"
    assert browser.save_screenshot(str(shot)) and shot.stat().st_size > 10_000

    assert f"Only the first {READ} of 1000 tokens were read." in search("a b " * 500)
    assert "has no word" in search("?!")
    assert "at most 5000" in search("a" * 6000)
    assert "Type what happens" in search("")
    next(button for button in all_of("li button") if button.text == "More like this").click()
    until(lambda: "Clips like" in browser.find_element(By.ID, "said").text)
    until(lambda: len(all_of("li")) == 4)
    assert not [entry for entry in browser.get_log("browser") if "Uncaught" in entry["message"]]
