"""MLflow's own pages in a real browser: where the links lead, and that what we log is found there."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from richkd.files import read_json
from tune.links import Pages

BROWSER, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=2400,1400",  # columns that lie outside are not even made
)
PATIENCE = 60  # seconds, on a machine that does other things beside

pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    """A fresh browser."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(word)
    # with its path no driver is looked for, let alone fetched; in a group of its own all of it can be ended
    service = Service(DRIVER, popen_kw={"start_new_session": True})
    found = webdriver.Chrome(options=options, service=service)
    try:
        yield found
    finally:
        group = service.process.pid
        found.quit()
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Shown:
    """A page, looked at as it becomes."""

    def __init__(self, browser, address: str) -> None:
        self.browser = browser
        browser.get("about:blank")  # of an address with another # only the old page would stay
        browser.get(address)

    def find(self, path: str):
        """Return the first element that an XPath finds, once there is one."""
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, PATIENCE)
        return wait.until(lambda page: next(iter(page.find_elements("xpath", path)), None), path)

    def see(self, *texts: str) -> None:
        """Wait until each of these texts is shown."""
        for text in texts:
            self.find(f"//*[normalize-space(text())={text!r}]")

    def press(self, path: str) -> None:
        """Click on an element, once it takes a click."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[WebDriverException])
        wait.until(lambda page: page.find_element("xpath", path).click() or True, path)

    def texts(self, path: str) -> list[str]:
        """Return the texts of all elements that an XPath finds, from the top down."""
        found = self.browser.find_elements("xpath", path)
        return [each.text for each in sorted(found, key=lambda one: one.location["y"])]


@pytest.fixture(scope="module")
def there(swept, server) -> dict[str, str]:
    """The links that the sweep printed, as they are on this server."""
    root = Pages("sqlite:///any.db").root
    links = swept[0]["mlflow"]["links"]
    return {name: link.replace(root, Pages(server).root) for name, link in links.items()}


SEARCHED = ("clip.prompts", "fusion.alpha", "loss.logit", "loss.temperature")
CELL = "//div[@role='gridcell'][@col-id='attributes.`Run Name`']"


def test_a_sweep_is_one_row_with_our_columns_that_unfolds_its_runs(browser, there):
    page = Shown(browser, there["runs"])
    page.see("small", *SEARCHED, "student.name", "richkd.method", "richkd.state")
    page.see("best_val_top1", "best/refit_test_top1", "test/top1")
    assert page.texts(f"{CELL}//a") == ["small"]
    page.press(f"{CELL}[.//a[normalize-space()='small']]//button")
    page.see("trial-000", "trial-kd-000", "refit-richkd-l-seed1")


def test_the_runs_of_a_sweep_are_ranked_by_validation_accuracy(browser, there, swept):
    page = Shown(browser, there["ranking"])
    page.see("best_val_top1", "test/top1", "trial-000", *SEARCHED)
    answer, client = swept
    ids = read_json(Path(answer["sweep"]) / "mlflow.json")
    found = {key.removeprefix("small/"): client.get_run(run_id) for key, run_id in ids.items()}
    del found["small"]
    shown = [found[name].data.metrics["best_val_top1"] for name in page.texts(f"{CELL}//a")]
    assert len(shown) == len(found)
    assert shown == sorted(shown, reverse=True)


def test_the_page_of_a_sweep_shows_its_summary_and_its_report(browser, there):
    page = Shown(browser, there["sweep"])
    page.see("richkd-l, as found", "best/refit_test_top1")
    page.press("//*[@role='tab'][normalize-space()='Artifacts']")
    page.see("best", "config.yaml", "summary.json")
    page.press("//*[normalize-space(text())='report']")
    page.press("//*[normalize-space(text())='report.html']")
    browser.switch_to.frame(page.find("//iframe"))
    page.find("//h1[contains(., 'small')]")
    browser.switch_to.default_content()


def test_parallel_coordinates_open_on_what_was_searched(browser, there):
    page = Shown(browser, there["compare"])
    page.see("Parallel Coordinates Plot")
    axes = "//*[name()='svg']//*[contains(@class, 'axis-title')]"
    page.find(f"{axes}[.='best_val_top1']")
    # numbers that differ among the best trials, three at most
    shown = set(page.texts(axes)) - {"best_val_top1"}
    assert shown
    assert shown <= set(SEARCHED)
