"""The page: one file that needs no other, with the numbers of the model in it."""

import shutil

import numpy as np
import pytest
import torch.nn.functional as F

from locatvit_hf.visualization import build_report, html_report, read_layers
from tests.visualization.reports import read_report, rows_of, unpack

TEMPLATE = 25_000  # characters of a page without content


def test_the_numbers_are_those_of_the_model(family, models, pixel_values, image):
    found = {name: read_layers(models[name], pixel_values[name]) for name in (family, "vit")}
    content = read_report(build_report("A <title> & more", image, found, 0, (1, 2)))
    assert content["size"] == [88, 48] and content["layer"] == 0
    assert [model["name"] for model in content["models"]] == list(found)
    for model, layers in zip(content["models"], found.values(), strict=True):
        assert (model["classSimilarity"] is None) == (len(layers[0].class_features) == 0)
        for packed, layer in zip(model["layers"], layers, strict=True):
            attention = rows_of(packed, "attention")
            assert len(attention) == 1 + layer.num_heads
            step = layer.attention.max().item() / 510
            np.testing.assert_allclose(attention[1:], layer.attention, atol=step + 1e-7)
            np.testing.assert_allclose(attention[0], layer.attention.mean(dim=0), atol=step + 1e-7)
            if layer.class_attention is not None:
                np.testing.assert_allclose(rows_of(packed, "classAttention")[1:], layer.class_attention, atol=step)
            if layer.key_patches is not None:
                np.testing.assert_array_equal(unpack(packed["keyPatches"]), layer.key_patches)
            if layer.assignment is not None:
                step = layer.assignment.max().item() / 510
                np.testing.assert_allclose(rows_of(packed, "assignment"), layer.assignment, atol=step + 1e-7)
            if layer.gaussian is not None:
                gaussian = unpack(packed["gaussian"])
                np.testing.assert_allclose(gaussian[..., :2], layer.gaussian.inverse_variance[0].rsqrt(), rtol=1e-3)
                np.testing.assert_allclose(gaussian[..., 2], layer.gaussian.amplitude[0], rtol=1e-3)
            np.testing.assert_array_equal(unpack(packed["components"]), layer.principal_colors())
            features = unpack(packed["features"])
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            expected = F.normalize(layer.features, dim=-1)
            np.testing.assert_allclose(features @ features.T, expected @ expected.T, atol=0.02)


def test_what_does_not_fit_is_left_out(models, pixel_values, image, monkeypatch):
    layers = read_layers(models["locatvit"], pixel_values["locatvit"])

    def build(room: int) -> tuple[int, list[int]]:
        monkeypatch.setattr(html_report, "LARGEST_REPORT", room)
        html = build_report("p", image, {"m": layers}, 0, None)
        content = read_report(html)["models"][0]["layers"]
        return len(html), [layer["attention"]["shape"][0] if "attention" in layer else 0 for layer in content]

    everything, all_kept = build(10**9)
    nothing, none_kept = build(0)
    assert all_kept == [3, 3, 3] and none_kept == [0, 0, 0]
    seen = set()
    for room in range(0, everything, everything // 25):
        size, kept = build(room)
        seen.add(tuple(kept))
        assert size <= max(nothing, room + TEMPLATE)
        assert 3 not in kept or 0 not in kept  # separate heads only where all have their mean
    assert (0, 0, 1) in seen and (1, 1, 1) in seen


@pytest.mark.browser
@pytest.mark.slow
def test_a_browser_shows_the_numbers_of_the_model(models, pixel_values, image, tmp_path):
    """In Chromium at the widths of a desktop and a phone: hover, keys, every view, and no error."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    found = {
        name: read_layers(models[name], pixel_values[name]) for name in ("locatvit", "vit", "locatswin", "pacavit")
    }
    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))

    def wait() -> None:
        WebDriverWait(browser, 20).until(
            lambda driver: driver.execute_script("return Number(document.body.dataset.shown) === turn")
        )

    try:
        for names in (["locatvit", "vit"], ["locatswin"], ["pacavit"]):
            path = tmp_path / f"{names[0]}.html"
            layers = found[names[0]]
            index = 1
            path.write_text(build_report("image", image, {name: found[name] for name in names}, index, (1, 2)))
            for width, height in ((1280, 900), (390, 844)):
                browser.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride",
                    {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
                )
                browser.get(path.as_uri())
                WebDriverWait(browser, 20).until(
                    lambda driver: driver.find_elements(By.CSS_SELECTOR, "body[data-shown]")
                )
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width
                canvas = browser.find_element(By.TAG_NAME, "canvas")
                canvas.send_keys(Keys.ARROW_RIGHT)
                wait()
                grid = layers[index].grid
                heat = browser.execute_script("return Array.from(content.models[0].heat)")
                expected = layers[index].attention_map(grid[1] + 3).ravel()
                np.testing.assert_allclose(heat, expected, atol=expected.max() / 200)
                ActionChains(browser).move_to_element_with_offset(canvas, 5, 5).perform()
                wait()
                said = browser.find_element(By.CSS_SELECTOR, ".says").text
                assert f"row {grid[0] // 2 + 1}, column {grid[1] // 2 + 1}" in said
                views = Select(browser.find_element(By.ID, "view"))
                for view in [option.get_attribute("value") for option in views.options]:
                    views.select_by_value(view)
                    wait()
                views.select_by_value("similarity")
                canvas.send_keys(Keys.ARROW_RIGHT)
                wait()
                heat = browser.execute_script("return Array.from(content.models[0].heat)")
                assert max(heat) == pytest.approx(1, abs=1e-3)
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
