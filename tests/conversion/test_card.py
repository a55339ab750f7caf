"""The README.md of a converted checkpoint says what it is, and nothing that is not so."""

import hashlib
import re

import pytest
import yaml

from locatvit_hf.hub.card import UNKNOWN, read_card
from tests.conversion.layouts import write_run
from tests.golden import load_case

VIT, SWIN, JUMBO = "arXiv 2010.11929", "arXiv 2103.14030", "arXiv 2502.15021"
LOCAT, PACA = "arXiv 2603.04892", "arXiv 2203.11987"


@pytest.fixture
def card_of(tmp_path, locatvit):
    """The front matter and the text of the card of a golden case."""

    def convert(name, **settings):
        case = load_case(name)
        source = write_run(case, tmp_path / "run", **settings)
        result = locatvit("convert", source, tmp_path / "out")
        assert result.exit_code == 0, result.output
        _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
        return yaml.safe_load(front), text

    return convert


@pytest.mark.parametrize(
    ("name", "tag", "kind", "papers"),
    [
        ("locatvit", "locatvit", "A vision transformer, with Gaussian-augmented attention and patch rep", {VIT, LOCAT}),
        ("vit_baseline", "locatvit", "A plain vision transformer: a baseline of LocAt.", {VIT}),
        ("locatrope", "locatvit", "A vision transformer, with", {VIT, LOCAT}),
        ("locatswin", "locatswin", "A Swin transformer, with Gaussian-augmented attention", {SWIN, LOCAT}),
        ("locatjumbo", "locatjumbo", "A Jumbo vision transformer, whose class token is several", {JUMBO, LOCAT}),
    ],
)
def test_card_of_every_family(card_of, name, tag, kind, papers):
    front, text = card_of(name)
    assert front["tags"] == ["custom_code", "vision", tag] and front["pipeline_tag"] == "image-classification"
    assert kind in text
    assert {paper for paper in (VIT, SWIN, JUMBO, LOCAT, PACA) if paper in text} == papers
    assert ("| Gaussian-augmented attention | yes |" in text) == (LOCAT in papers)
    copies = name == "locatjumbo"
    assert ("in the model but 12 copies, constants" in text) == copies
    assert ("Every tensor has its place in the model." in text) != copies
    assert "No accuracy was measured here" in text
    said = re.search(r"difference of its logits from those of the converted model was (\S+)\.\s", text)
    assert 0 <= float(said[1]) < 1e-4  # the folder was refused if it were more than rounding


def test_what_the_source_does_not_say_is_unknown(card_of, tmp_path):
    front, text = card_of("locatvit")
    card = read_card(tmp_path / "out")
    assert card.datasets == [UNKNOWN] and card.training is None and "datasets" not in front
    assert front["license"] == "unknown" and "No license of the weights is known" in text
    weights = (tmp_path / "run" / "model_best.pth.tar").read_bytes()
    assert card.conversion.sha256 == hashlib.sha256(weights).hexdigest()
