"""The page without a browser: what it answers, and what it refuses in one sentence."""

import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import islice

import gradio as gr
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from PIL import Image
from typer.testing import CliRunner

from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor
from locatvit_hf.cli import app
from locatvit_hf.serving import build_app, write_space
from locatvit_hf.serving.app import MAX_WAITING
from locatvit_hf.serving.predictor import Predictor
from locatvit_hf.serving.sample_images import draw_sample_images
from locatvit_hf.utils.colors import label_colors
from tests.large_images import png_bomb
from tests.processes import run_program


def test_predictor_says_what_the_model_says(checkpoints, images):
    image = Image.open(images / "wide.png")
    model = LocAtViTForImageClassification.from_pretrained(checkpoints / "classifier").eval()
    processor = LocAtViTImageProcessor.from_pretrained(checkpoints / "classifier")
    expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(dim=-1)
    predictor = Predictor(str(checkpoints / "classifier"))
    assert predictor.classify(image) == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-6)
    frame = predictor.look(image)
    assert 'sandbox="allow-scripts"' in frame
    assert "locatvitHeight" in frame


NAMES = ("road", "sky <b>", "tree")


def test_segmentation_colors_the_image_and_names_the_shares(checkpoints, images):
    image = Image.open(images / "tall.jpg")
    predictor = Predictor(str(checkpoints / "segmenter"))
    overlay, legend = predictor.segment(image)
    assert overlay.size == image.size
    label_map = predictor.segmenter([image])[0]
    for label, name in enumerate(NAMES):
        share = (label_map == label).mean()
        shown = name.replace("<", "&lt;").replace(">", "&gt;")
        assert (f"{shown}<b>{share:.0%}</b>" in legend) == (share > 0)
    colors = label_colors(3)
    painted = np.asarray(overlay, np.float64) - 0.25 * 0.6 * np.asarray(image, np.float64)
    np.testing.assert_allclose(painted, 0.75 * colors[label_map], atol=2)


@pytest.mark.parametrize("name", ["clusters", "upernet"])
def test_other_models_can_be_looked_at(name, checkpoints, images):
    predictor, image = Predictor(str(checkpoints / name)), Image.open(images / "wide.png")
    assert "srcdoc" in predictor.look(image)
    if name == "upernet":
        assert predictor.segment(image)[0].size == image.size


def test_app_answers_over_http(checkpoints, images, tmp_path, monkeypatch):
    page = build_app([str(checkpoints / "classifier"), str(checkpoints / "segmenter")])
    page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(page.local_url, verbose=False)
        both = client.predict(handle_file(images / "wide.png"), "classifier", "segmenter", api_name="/show")
        visible = [part for part in both if not isinstance(part, dict) or part.get("visible", True)]
        text = str(visible)
        assert "### classifier" in text and "### segmenter" in text
        assert text.count("<iframe") == 2
        alone = str(client.predict(handle_file(images / "wide.png"), "segmenter", "nobody", api_name="/show"))
        assert "### classifier" not in alone and alone.count("<iframe") == 1
        with pytest.raises(Exception, match=r"This file (is not an image file|cannot be decoded)"):
            client.predict(handle_file(images / "broken.jpg"), "classifier", "nobody", api_name="/show")
        (tmp_path / "bomb.png").write_bytes(png_bomb())
        with pytest.raises(Exception, match=r"This file has 900 megapixels, more than the 50 that max_megapixels"):
            client.predict(handle_file(tmp_path / "bomb.png"), "classifier", "nobody", api_name="/show")
        again = str(client.predict(handle_file(images / "tall.jpg"), "classifier", "nobody", api_name="/show"))
        assert "### classifier" in again
        warned = []
        monkeypatch.setattr(gr, "Warning", lambda sentence, **_: warned.append(sentence))
        frames = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
        client.predict(handle_file(tmp_path / "two.gif"), "classifier", "nobody", api_name="/show")
        assert warned == ["This file holds 2 images: only the first is used."]
    finally:
        page.close()


BUSY = "Queue is full! Please try again."


def test_few_wait_for_the_models_and_others_hear_that_the_page_is_busy(checkpoints, images, monkeypatch):
    free, classify = threading.Event(), Predictor.classify

    def classify_once_free(predictor, image):
        assert free.wait(60)
        return classify(predictor, image)

    monkeypatch.setattr(Predictor, "classify", classify_once_free)
    page = build_app([str(checkpoints / "classifier")])
    page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(page.local_url, verbose=False)
        ask = partial(client.predict, handle_file(images / "wide.png"), "classifier", "nobody", api_name="/show")
        with ThreadPoolExecutor(20) as visitors:
            jobs = [visitors.submit(ask) for _ in range(20)]
            refused = list(islice(as_completed(jobs, timeout=60), 20 - MAX_WAITING - 1))  # one is being answered
            free.set()
        heard = [str(job.exception() or job.result()) for job in jobs]
        assert {str(job.exception()) for job in refused} == {BUSY}
        assert MAX_WAITING <= sum("<iframe" in said for said in heard) == 20 - heard.count(BUSY)
        assert "<iframe" in str(ask())
    finally:
        free.set()
        page.close()


@pytest.mark.slow
def test_200_requests_at_once_and_the_next_one(address, images):
    """From 20 visitors, who ask again at once; some send files that are not images."""

    def visit(visitor: int) -> Counter:
        client, heard = Client(address, verbose=False), Counter()
        for number in range(10):
            try:
                heard["answer" if "<iframe" in ask(client, "broken.jpg" if number == 9 else "wide.png") else ""] += 1
            except (AppError, QueueError) as error:
                heard[str(error)] += 1
        return heard

    def ask(client: Client, name: str) -> str:
        return str(client.predict(handle_file(images / name), "classifier", "segmenter", api_name="/show"))

    with ThreadPoolExecutor(20) as visitors:
        heard = sum(visitors.map(visit, range(20)), Counter())
    assert heard.total() == 200 and heard["answer"] >= 20 and heard[BUSY] > 0
    assert all(said in ("answer", BUSY) or said.startswith("This file cannot be decoded") for said in heard), heard
    begin = time.monotonic()
    assert "<iframe" in ask(Client(address, verbose=False), "tall.jpg")
    assert time.monotonic() - begin < 30


def test_two_checkpoints_of_one_name_are_told_apart(checkpoints, tmp_path):
    twin = tmp_path / "classifier"
    twin.symlink_to(checkpoints / "classifier")
    page = build_app([str(checkpoints / "classifier"), str(twin)])
    models = next(block for block in page.blocks.values() if isinstance(block, gr.Dropdown) and block.label == "Model")
    assert [choice for choice, _ in models.choices] == ["classifier", str(twin)]


def test_examples_are_drawn_or_taken_from_a_folder(checkpoints, images, tmp_path):
    drawn = draw_sample_images(tmp_path)
    assert len(drawn) == 3
    assert all(Image.open(path).size == (480, 360) and path.stat().st_size < 50_000 for path in drawn)
    with pytest.raises(ValueError, match="holds no images"):
        build_app([str(checkpoints / "classifier")], checkpoints)


def test_drawn_examples_go_with_the_process(checkpoints, tmp_path):
    code = "import sys; from locatvit_hf.serving import build_app; build_app(sys.argv[1:])"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert run_program("-c", code, checkpoints / "classifier", environment=environment).returncode == 0
    assert not list(tmp_path.glob("locatvit-*"))


def test_space_names_its_models_and_this_version(tmp_path, checkpoints):
    write_space(tmp_path / "space", ["me/locatvit", "me/vit"])
    assert sorted(path.name for path in (tmp_path / "space").iterdir()) == ["README.md", "app.py", "requirements.txt"]
    app_text = (tmp_path / "space" / "app.py").read_text()
    compile(app_text, "app.py", "exec")
    assert "['me/locatvit', 'me/vit']" in app_text and "max_megapixels=50" in app_text
    assert re.search(r"^locatvit-hf\[serve\]==\d", (tmp_path / "space" / "requirements.txt").read_text())
    with pytest.raises(ValueError, match="Push it there first"):
        write_space(tmp_path / "other", [str(checkpoints / "classifier")])
    with pytest.raises(ValueError, match="is not empty"):
        write_space(tmp_path / "space", ["me/vit"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/nowhere/at/all"], "There is no checkpoint"),
        (["--model", "{checkpoints}", "--port", "1"], "is not a checkpoint"),
    ],
)
def test_command_refuses_in_one_sentence(arguments, sentence, checkpoints):
    arguments = [argument.format(checkpoints=checkpoints) for argument in arguments]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert sentence in result.output and "Traceback" not in result.output
