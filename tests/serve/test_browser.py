"""The page in a real browser: Debian's Chromium, without a window."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from longlive_rag.serve.small_scene import SmallScene
from longlive_rag.serve.studio import Studio
from support.serving import serving
from support.tiny_scene import TinyScene

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromium-driver are not installed"
)
SCREENSHOTS = os.environ.get("LONGLIVE_RAG_SCREENSHOTS")
"""A folder that pictures of the page are left in, for people to look at."""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required"
)
NOW = "return document.getElementById('video').currentTime"
COLOUR = """
const canvas = document.createElement("canvas"), video = document.getElementById("video");
[canvas.width, canvas.height] = [8, 8];
const context = canvas.getContext("2d");
context.drawImage(video, 0, 0, 8, 8);
return Array.from(context.getImageData(0, 0, 8, 8).data);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(1360, 1000)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, scene, tmp_path):
    with serving(Studio(scene, tmp_path, ahead=2.0)) as address:
        browser.get(address)
        yield browser
        browser.get("about:blank")


def wait(browser: webdriver.Chrome, condition, seconds: float = 90.0):
    return WebDriverWait(browser, seconds, 0.1).until(condition)


def shot(browser: webdriver.Chrome, name: str) -> None:
    if SCREENSHOTS:
        browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def test_it_plays_and_can_be_sought_back(page):
    wait(page, lambda b: b.execute_script(NOW) > 3)
    wait(page, lambda b: "Growing" in text(b, "status"))
    page.execute_script("document.getElementById('timeline').focus()")
    page.switch_to.active_element.send_keys(Keys.HOME)
    wait(page, lambda b: b.execute_script(NOW) < 1.5)
    wait(page, lambda b: b.execute_script(NOW) > 2, 30)
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_late_viewer_begins_near_the_newest_picture_and_can_see_the_beginning(page):
    wait(page, lambda b: b.execute_script(NOW) > 6)
    page.refresh()
    began = wait(page, lambda b: b.execute_script(NOW) or None)
    assert began > 4
    page.execute_script("document.getElementById('timeline').focus()")
    page.switch_to.active_element.send_keys(Keys.HOME)
    # What was before the viewer came was not loaded yet.
    wait(page, lambda b: 0.5 < b.execute_script(NOW) < 4)


def test_thumbnails_of_memory_appear_and_lead_there(page):
    item = wait(page, lambda b: b.find_elements(By.CSS_SELECTOR, "#memory li button"))[0]
    wait(page, lambda b: b.execute_script("return document.querySelector('#memory img').naturalWidth") > 0)
    assert page.find_elements(By.CSS_SELECTOR, "#track .arc")
    wait(page, lambda b: b.execute_script(NOW) > 4)
    page.find_element(By.ID, "play").click()
    wait(page, lambda b: b.execute_script("return document.getElementById('video').paused"))
    label = page.find_element(By.CSS_SELECTOR, "#memory li button").get_attribute("aria-label")
    item = page.find_element(By.CSS_SELECTOR, "#memory li button")
    minutes, seconds = label.removeprefix("Go to ").split(",")[0].split(":")
    item.click()
    there = 60 * int(minutes) + int(seconds)
    wait(page, lambda b: there <= b.execute_script(NOW) < there + 1.05, 20)


def test_another_policy_another_video(page):
    wait(page, lambda b: b.execute_script(NOW) > 1)
    page.find_element(By.CSS_SELECTOR, "#policies label:first-child").click()
    page.find_element(By.CSS_SELECTOR, "#new button").click()
    wait(page, lambda b: "Video 2" in text(b, "facts"))
    wait(page, lambda b: b.execute_script("return document.getElementById('video').videoWidth") == 32)
    assert text(page, "captions") == "remembers draft"


def test_trouble_is_told_in_plain_words_and_can_be_overcome(page, scene: TinyScene):
    wait(page, lambda b: b.execute_script(NOW) > 0.5)
    scene.fails = RuntimeError("the device is gone")
    wait(page, lambda b: "the device is gone" in text(b, "trouble"))
    before = page.execute_script(NOW)
    wait(page, lambda b: text(b, "hold") == "Go on")
    page.find_element(By.ID, "hold").click()
    wait(page, lambda b: b.execute_script(NOW) > before + 3)
    assert text(page, "trouble") == ""


def test_a_button_changes_the_place(browser, tmp_path):
    with serving(Studio(SmallScene(16 * 1024**2), tmp_path)) as address:
        browser.get(address)
        wait(browser, lambda b: b.execute_script(NOW) > 0.7)
        wait(browser, lambda b: not b.find_element(By.ID, "cover").is_displayed())
        meadow = browser.execute_script(COLOUR)
        browser.find_element(By.CSS_SELECTOR, "button[value=desert]").click()
        wait(browser, lambda b: difference(b.execute_script(COLOUR), meadow) > 40)
        assert browser.find_element(By.CSS_SELECTOR, "button[value=desert]").get_attribute("aria-pressed") == "true"
        browser.find_element(By.TAG_NAME, "body").send_keys("1")
        wait(browser, lambda b: difference(b.execute_script(COLOUR), meadow) < 15)
        wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#track .run.tone-2"))
        wait(browser, lambda b: "Now: meadow." in b.find_element(By.ID, "live-region").get_attribute("textContent"))
        listen_to_it(browser)
        look_at_it(browser)
        browser.get("about:blank")


def difference(one: list[int], other: list[int]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one) * 4 / 3


def listen_to_it(browser: webdriver.Chrome) -> None:
    """What can be focused has a name for screen readers, which read the tree that is asked for here."""
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    browser.execute_cdp_cmd("Accessibility.disable", {})
    names: dict[str, list[str]] = {}
    for node in nodes:
        focusable = any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", ()))
        if focusable and node["role"]["value"] != "RootWebArea":
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert all(name for each in names.values() for name in each), names
    assert {"Meadow", "Seaside", "Newest", "Hold", "Save", "Begin again"} <= set(names["button"])
    assert names["slider"] == ["Timeline"] and set(names["radio"]) == {"Cut", "Pan"}


def look_at_it(browser: webdriver.Chrome) -> None:
    """At no size does anything stick out of the page; pictures of it for people."""
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for name, width, height in (("desktop", 1360, 1000), ("phone", 390, 844)):
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            shot(browser, f"{name}-{scheme}")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
