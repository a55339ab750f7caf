"""The person who downloads our models: transformers, a folder or a Hub id, and no `locatvit_hf`.

Started in a process of its own, never imported::

    python -I stranger.py request.json answer.json

The request holds `models` (what to load: `classifier` and `segmenter`, each a folder or a Hub id), `image` and `target`
(a picture and the directory for what is saved), `checks` (names from `CHECKS`) and optionally `push` (a Hub id) and
`revision` (what to load of a Hub id). The
answer holds for each check either its value or, under `error`, the traceback. Values are plain numbers, lists and
strings, to be compared with what the package computes.
"""

import importlib.abc
import json
import sys
import traceback
from pathlib import Path


class Absent(importlib.abc.MetaPathFinder):
    """Makes the package unimportable, also where it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "locatvit_hf":
            raise ImportError("locatvit_hf is not installed here.")


sys.meta_path.insert(0, Absent())

import torch
import transformers
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)

REQUEST = json.loads(Path(sys.argv[1]).read_text())
REMOTE = {"trust_remote_code": True, "revision": REQUEST.get("revision")}
CLASSIFIER, SEGMENTER = REQUEST["models"]["classifier"], REQUEST["models"]["segmenter"]


def image() -> Image.Image:
    return Image.open(REQUEST["image"])


def pixel_values(model: str) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(model, **REMOTE)(image(), return_tensors="pt").pixel_values


def came_from_afar(thing: object) -> None:
    """The class must be the one that travelled with the checkpoint."""
    module = type(thing).__module__
    assert module.startswith("transformers_modules."), f"{type(thing).__name__} is from {module}"


def config() -> dict[str, object]:
    loaded = AutoConfig.from_pretrained(CLASSIFIER, **REMOTE)
    came_from_afar(loaded)
    return {"model_type": loaded.model_type, "hidden_size": loaded.hidden_size, "id2label": loaded.id2label[1]}


def image_processor() -> list[float]:
    processor = AutoImageProcessor.from_pretrained(CLASSIFIER, **REMOTE)
    came_from_afar(processor)
    return processor(image(), return_tensors="pt").pixel_values.flatten()[:100].tolist()


def label_maps() -> list[object]:
    processor = AutoImageProcessor.from_pretrained(SEGMENTER, **REMOTE)
    label_map = Image.new("L", image().size, 7)
    labels = processor(image(), segmentation_maps=label_map, return_tensors="pt").labels
    return [list(labels.shape), str(labels.dtype), labels.unique().tolist()]


@torch.no_grad()
def model() -> list[float]:
    loaded = AutoModel.from_pretrained(CLASSIFIER, **REMOTE)
    came_from_afar(loaded)
    return loaded(pixel_values(CLASSIFIER)).pooler_output.flatten().tolist()


@torch.no_grad()
def classifier() -> list[float]:
    loaded = AutoModelForImageClassification.from_pretrained(CLASSIFIER, **REMOTE)
    came_from_afar(loaded)
    return loaded(pixel_values(CLASSIFIER)).logits.flatten().tolist()


@torch.no_grad()
def segmenter() -> list[float]:
    loaded = AutoModelForSemanticSegmentation.from_pretrained(SEGMENTER, **REMOTE)
    came_from_afar(loaded)
    return loaded(pixel_values(SEGMENTER)).logits.flatten().tolist()


@torch.no_grad()
def new_segmentation_head() -> list[int]:
    """A segmenter on the body of a classifier: the head is new, the body is not."""
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(
        CLASSIFIER, num_labels=5, output_loading_info=True, **REMOTE
    )
    assert all(name.startswith("segmentation_head.") for name in info["missing_keys"]), info["missing_keys"]
    return list(loaded(pixel_values(CLASSIFIER)).logits.shape)


@torch.no_grad()
def backbone() -> list[float]:
    loaded = AutoBackbone.from_pretrained(CLASSIFIER, out_indices=[1, 2], **REMOTE)
    came_from_afar(loaded)
    first, second = loaded(pixel_values(CLASSIFIER)).feature_maps
    assert first.shape == second.shape
    return second.flatten().tolist()


def classification_pipeline() -> list[object]:
    answers = pipeline("image-classification", CLASSIFIER, top_k=2, **REMOTE)(REQUEST["image"])
    return [(answer["label"], answer["score"]) for answer in answers]


def segmentation_pipeline() -> list[object]:
    segments = pipeline("image-segmentation", SEGMENTER, **REMOTE)(REQUEST["image"])
    return sorted(
        [segment["label"], list(segment["mask"].size), segment["mask"].histogram()[255]] for segment in segments
    )


def features_pipeline() -> list[float]:
    (pooled,) = pipeline("image-feature-extraction", CLASSIFIER, **REMOTE)(REQUEST["image"], pool=True)
    return pooled


def save_again() -> list[str]:
    """What a person does after fine-tuning: save model and processor as they came, for somebody else."""
    for name, auto_class, source in (
        ("classifier", AutoModelForImageClassification, CLASSIFIER),
        ("segmenter", AutoModelForSemanticSegmentation, SEGMENTER),
    ):
        auto_class.from_pretrained(source, **REMOTE).save_pretrained(Path(REQUEST["target"]) / name)
    return sorted(path.name for path in (Path(REQUEST["target"]) / "classifier").iterdir())


def push_again() -> None:
    for name, auto_class, source in (
        ("classifier", AutoModelForImageClassification, CLASSIFIER),
        ("segmenter", AutoModelForSemanticSegmentation, SEGMENTER),
    ):
        auto_class.from_pretrained(source, **REMOTE).push_to_hub(f"{REQUEST['push']}-{name}")


CHECKS = {
    check.__name__: check
    for check in (
        config,
        image_processor,
        label_maps,
        model,
        classifier,
        segmenter,
        new_segmentation_head,
        backbone,
        classification_pipeline,
        segmentation_pipeline,
        features_pipeline,
        save_again,
        push_again,
    )
}

if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    answers = {}
    for name in REQUEST["checks"]:
        try:
            answers[name] = {"value": CHECKS[name]()}
        except Exception:
            answers[name] = {"error": traceback.format_exc()}
    assert "locatvit_hf" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(answers))
