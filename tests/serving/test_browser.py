"""The page in Chromium, at the width of a desk and of a telephone."""

import json
import shutil
import time

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [pytest.mark.browser, pytest.mark.slow]
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture
def open_browser(tmp_path):
    browsers = []
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.fail("These tests drive Chromium: apt-get install chromium chromium-driver.", pytrace=False)

    def start(width, height):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / str(len(browsers))}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(driver))
        browsers.append(browser)
        if width < 600:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        return browser

    yield start
    for browser in browsers:
        browser.quit()


def wait(browser, condition, seconds=90):
    return WebDriverWait(browser, seconds, ignored_exceptions=[StaleElementReferenceException]).until(condition)


def visible(browser, selector):
    return [element for element in browser.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


def open_page(browser, address):
    browser.get(address)
    wait(browser, lambda found: found.find_elements(By.CSS_SELECTOR, "input[type=file]"))


def upload(browser, path):
    if clear := visible(browser, "button[aria-label=Clear], button[title=Clear]"):
        browser.execute_script("arguments[0].click()", clear[0])  # a message may still lie over it
        wait(browser, lambda found: found.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))


def headings(browser):
    return [element.text for element in visible(browser, "h3")]


@pytest.mark.parametrize("width", list(WIDTHS))
def test_a_visit(address, images, open_browser, width):
    browser = open_browser(*WIDTHS[width])
    open_page(browser, address)
    upload(browser, images / "wide.png")
    wait(browser, lambda found: headings(found) == ["classifier", "segmenter"])
    wait(browser, lambda found: len(visible(found, "iframe.look")) == 2)

    # Classify: five bars or fewer, the shares of the classes. Segment: a legend that adds up.
    answer = visible(browser, "[data-testid=label], .label-wrap, .output-class, h2.output-class")
    assert any("road" in element.text or "tree" in element.text or "sky <b>" in element.text for element in answer)
    shares = [int(element.text.rstrip("%")) for element in visible(browser, ".legend b")]
    assert shares and abs(sum(shares) - 100) <= 2
    assert "sky <b>" in browser.find_element(By.TAG_NAME, "body").text

    # Nothing is wider than the screen, and each frame becomes as tall as what it holds once it is looked at.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTHS[width][0]
    frames = visible(browser, "iframe.look")
    for frame in reversed(frames):
        browser.execute_script("arguments[0].scrollIntoView()", frame)
        wait(browser, lambda _, frame=frame: frame.size["height"] != 640)

    # Pointing at a patch, or tapping it, says where it looks.
    browser.switch_to.frame(frames[0])
    assert browser.execute_script("return document.documentElement.scrollHeight <= innerHeight + 1")
    canvas = browser.find_element(By.CSS_SELECTOR, "canvas")
    for corner, place in ((-1, "Patch at row 1, column 1"), (1, "Patch at row")):
        pointer = webdriver.ActionChains(browser).move_to_element_with_offset(
            canvas, corner * (canvas.size["width"] // 2 - 4), corner * (canvas.size["height"] // 2 - 4)
        )
        before = browser.find_element(By.TAG_NAME, "body").text
        pointer.click().perform() if width == "phone" else pointer.perform()
        wait(browser, lambda found, place=place: place in found.find_element(By.TAG_NAME, "body").text)
    assert browser.find_element(By.TAG_NAME, "body").text != before
    browser.switch_to.default_content()

    # Another model in the second place, then nobody.
    choose(browser, "Beside it", "nobody")
    wait(browser, lambda found: headings(found) == ["classifier"])
    choose(browser, "Model", "segmenter")
    wait(browser, lambda found: headings(found) == ["segmenter"])

    # A broken image is named, and the page lives.
    upload(browser, images / "broken.jpg")
    wait(browser, lambda found: "This file" in found.find_element(By.TAG_NAME, "body").text)
    upload(browser, images / "tall.jpg")
    wait(browser, lambda found: headings(found) == ["segmenter"])
    wait(browser, lambda found: len(visible(found, "iframe.look")) == 1)

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if url.startswith("http") and not url.startswith(address)] == []


def choose(browser, label, value):
    box = browser.find_element(By.CSS_SELECTOR, f"input[aria-label='{label}']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    time.sleep(0.3)
    option = wait(browser, lambda found: visible(found, f"[role=option][aria-label='{value}']"))
    option[0].click()


def test_two_visitors_at_once(address, images, open_browser):
    visitors = [open_browser(*WIDTHS["desk"]), open_browser(*WIDTHS["phone"])]
    for browser in visitors:
        open_page(browser, address)
    for browser, name in zip(visitors, ("wide.png", "tall.jpg"), strict=True):
        upload(browser, images / name)
    for browser, wide in zip(visitors, (True, False), strict=True):
        wait(browser, lambda found: len(visible(found, "iframe.look")) == 2)
        browser.switch_to.frame(visible(browser, "iframe.look")[0])
        canvas = browser.find_element(By.CSS_SELECTOR, "canvas")
        assert (canvas.get_property("width") > canvas.get_property("height")) == wide
