"""`locatvit look`: what it writes, for which models, and what may be wrong."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

from locatvit_hf import (
    LocAtSwinForSemanticSegmentation,
    LocAtViTForImageClassification,
    LocAtViTImageProcessor,
    PaCaViTForImageClassification,
)
from locatvit_hf.cli import app
from locatvit_hf.utils.images import read_image
from locatvit_hf.visualization import read_layers
from tests.large_images import png_bomb
from tests.visualization.conftest import FAMILIES
from tests.visualization.reports import read_report, rows_of

CLASSES = {
    "locatvit": LocAtViTForImageClassification,
    "vit": LocAtViTForImageClassification,
    "locatswin": LocAtSwinForSemanticSegmentation,
    "pacavit": PaCaViTForImageClassification,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of checkpoints with heads of several kinds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_class in CLASSES.items():
        torch.manual_seed(0)
        _, config_class, options = FAMILIES[name]
        model_class(config_class(image_size=32, initializer_range=0.4, **options)).save_pretrained(folder / name)
    return folder


@pytest.fixture
def photo(tmp_path) -> Path:
    """48 rows and 64 columns as it is seen, stored on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).resize((48, 64)).save(path, exif=turned, quality=95)
    return path


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["look", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_a_model_beside_its_baseline(checkpoints, photo, tmp_path):
    output = tmp_path / "out"
    options = ["--baseline", checkpoints / "vit", "--layer", 2, "--patch", "2,3", "--patch", "1,1"]
    code, said = run(photo, "--model", checkpoints / "locatvit", *options, "--output", output)
    assert code == 0 and "photo.html" in said
    images = ["attention", "components", "gaussians", "layers", "similarity"]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["photo.html", *(f"photo-{name}.png" for name in images)]
    )
    for name in images:
        with Image.open(output / f"photo-{name}.png") as drawn:
            assert min(drawn.size) > 300
    html = (output / "photo.html").read_text(encoding="utf-8")
    content = read_report(html)
    assert [model["name"] for model in content["models"]] == ["locatvit", "vit"]
    assert content["size"] == [64, 48] and content["layer"] == 1 and len(html) < 5_000_000
    model = AutoModel.from_pretrained(checkpoints / "locatvit")
    processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
    layers = read_layers(model, processor(read_image(photo), return_tensors="pt")["pixel_values"])
    grid = layers[1].grid
    assert content["query"] == [1.5 / grid[0], 2.5 / grid[1]]
    attention = rows_of(content["models"][0]["layers"][1], "attention")
    np.testing.assert_allclose(attention[1:], layers[1].attention, atol=layers[1].attention.max().item() / 250)


@pytest.mark.parametrize(
    ("name", "sentences", "images"),
    [
        ("vit", ["has no Gaussians, so none are drawn."], {"attention", "components", "layers", "similarity"}),
        ("locatswin", ["has no class token"], {"attention", "components", "gaussians", "similarity"}),
        (
            "pacavit",
            ["has no Gaussians, so none are drawn.", "has no class token"],
            {"attention", "clusters", "components", "similarity"},
        ),
    ],
)
def test_what_a_model_lacks_is_said_and_the_rest_is_drawn(name, sentences, images, checkpoints, photo, tmp_path):
    flat = Image.new("L", (31, 90))
    flat.save(tmp_path / "flat.png", save_all=True, append_images=[flat.point(lambda value: 255)])
    output = tmp_path / "out"
    options = ["--layer", 1] if name == "pacavit" else []
    code, said = run(photo, tmp_path / "flat.png", "--model", checkpoints / name, "--output", output, *options)
    assert code == 0 and said.count("flat.png holds 2 images: only the first is used.") == 1
    for sentence in sentences:
        assert sentence in said
    for stem in ("photo", "flat"):
        drawn = {re.sub(rf"^{stem}-", "", path.stem) for path in output.glob(f"{stem}-*.png")}
        assert drawn == images
        read_report((output / f"{stem}.html").read_text(encoding="utf-8"))


def test_what_cannot_be_read_is_skipped_and_named(checkpoints, photo, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "bomb.png").write_bytes(png_bomb())
    (tmp_path / "broken.png").write_bytes(b"no image")
    model = ["--model", checkpoints / "locatvit", "--output", output]
    code, said = run(tmp_path / "bomb.png", photo, tmp_path / "broken.png", *model)
    assert code == 0 and (output / "photo.html").exists() and not list(output.glob("b*"))
    assert "bomb.png has 900 megapixels, more than the 179 that max_megapixels allows." in said
    assert "broken.png is not an image file of a known format." in said
    code, said = run(tmp_path / "bomb.png", tmp_path / "broken.png", *model)
    assert code == 1 and "Skipped: " in said and said.endswith("broken.png is not an image file of a known format.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.jpg"], "There is no image file missing.jpg."),
        (["broken.png"], "broken.png is not an image file of a known format."),
        (["."], "is a folder; an image file is needed here."),
        (["photo.jpg", "--model", "nowhere/none"], "There is no checkpoint nowhere/none"),
        (["photo.jpg", "--model", "bert"], "is a bert, not one of locatvit, locatswin, locatjumbo, pacavit"),
        (["photo.jpg", "--layer", "9"], "has 3 layers; there is no layer 9."),
        (["photo.jpg", "--max-megapixels", "0.003"], "photo.jpg has 0.00307 megapixels, more than the 0.003 that"),
        (["photo.jpg", "--patch", "40,1"], "there is no patch 40,1."),
        (["photo.jpg", "--patch", "0,1"], "--patch takes ROW,COLUMN, two numbers from 1, as in --patch 3,5; got 0,1."),
        (["photo.jpg", "--patch", "middle"], "--patch takes ROW,COLUMN"),
        (["photo.jpg", "photo.png"], "Several images are named photo"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, checkpoints, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    if "bert" in arguments:
        AutoConfig.for_model("bert").save_pretrained("bert")
    model = [] if "--model" in arguments else ["--model", checkpoints / "locatvit"]
    code, said = run(*arguments, *model)
    assert code == 1 and sentence in said and "Traceback" not in said
    assert not (tmp_path / "look").exists()
