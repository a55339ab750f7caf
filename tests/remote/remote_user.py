"""The person who downloads our models: transformers, a folder or a Hub id, and no `locatvit_hf`.

Started in a process of its own, never imported::

    python -I remote_user.py requests.json answers.json

A request holds `models` (what to load: `classifier` and `segmenter`, each a folder or a Hub id), `image` and `target`
(an image and the directory for what is saved), `checks` (methods of `RemoteUser`) and optionally `push` (a Hub id) and
`revision` (what to load of a Hub id). Its answer holds for each check either its value or, under `error`, the
traceback. Values are plain numbers, lists and strings, to be compared with what the package computes.
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


def assert_remote(thing: object) -> None:
    """The class must be the one beside the weights."""
    module = type(thing).__module__
    assert module.startswith("transformers_modules."), f"{type(thing).__name__} is from {module}"


class RemoteUser:
    """Answers one request. Its methods are the checks."""

    def __init__(self, request: dict) -> None:
        self.request = request
        self.remote = {"trust_remote_code": True, "revision": request.get("revision")}
        self.classifier_name, self.segmenter_name = request["models"]["classifier"], request["models"]["segmenter"]

    def answer(self) -> dict[str, dict[str, object]]:
        answers = {}
        for name in self.request["checks"]:
            try:
                answers[name] = {"value": getattr(self, name)()}
            except Exception:
                answers[name] = {"error": traceback.format_exc()}
        return answers

    def image(self) -> Image.Image:
        return Image.open(self.request["image"])

    def pixel_values(self, model: str) -> torch.Tensor:
        return AutoImageProcessor.from_pretrained(model, **self.remote)(self.image(), return_tensors="pt").pixel_values

    def config(self) -> dict[str, object]:
        loaded = AutoConfig.from_pretrained(self.classifier_name, **self.remote)
        assert_remote(loaded)
        return {"model_type": loaded.model_type, "hidden_size": loaded.hidden_size, "id2label": loaded.id2label[1]}

    def image_processor(self) -> list[float]:
        processor = AutoImageProcessor.from_pretrained(self.classifier_name, **self.remote)
        assert_remote(processor)
        return processor(self.image(), return_tensors="pt").pixel_values.flatten()[:100].tolist()

    def label_maps(self) -> list[object]:
        processor = AutoImageProcessor.from_pretrained(self.segmenter_name, **self.remote)
        label_map = Image.new("L", self.image().size, 7)
        labels = processor(self.image(), segmentation_maps=label_map, return_tensors="pt").labels
        return [list(labels.shape), str(labels.dtype), labels.unique().tolist()]

    @torch.no_grad()
    def model(self) -> list[float]:
        loaded = AutoModel.from_pretrained(self.classifier_name, **self.remote)
        assert_remote(loaded)
        return loaded(self.pixel_values(self.classifier_name)).pooler_output.flatten().tolist()

    @torch.no_grad()
    def classifier(self) -> list[float]:
        loaded = AutoModelForImageClassification.from_pretrained(self.classifier_name, **self.remote)
        assert_remote(loaded)
        return loaded(self.pixel_values(self.classifier_name)).logits.flatten().tolist()

    @torch.no_grad()
    def segmenter(self) -> list[float]:
        loaded = AutoModelForSemanticSegmentation.from_pretrained(self.segmenter_name, **self.remote)
        assert_remote(loaded)
        return loaded(self.pixel_values(self.segmenter_name)).logits.flatten().tolist()

    @torch.no_grad()
    def new_segmentation_head(self) -> list[int]:
        """A segmenter on the body of a classifier: the head is new, the body is not."""
        loaded, info = AutoModelForSemanticSegmentation.from_pretrained(
            self.classifier_name, num_labels=5, output_loading_info=True, **self.remote
        )
        assert all(name.startswith("segmentation_head.") for name in info["missing_keys"]), info["missing_keys"]
        return list(loaded(self.pixel_values(self.classifier_name)).logits.shape)

    @torch.no_grad()
    def backbone(self) -> list[float]:
        loaded = AutoBackbone.from_pretrained(self.classifier_name, out_indices=[1, 2], **self.remote)
        assert_remote(loaded)
        first, second = loaded(self.pixel_values(self.classifier_name)).feature_maps
        assert first.shape == second.shape
        return second.flatten().tolist()

    def classification_pipeline(self) -> list[object]:
        answers = pipeline("image-classification", self.classifier_name, top_k=2, **self.remote)(self.request["image"])
        return [(answer["label"], answer["score"]) for answer in answers]

    def segmentation_pipeline(self) -> list[object]:
        segments = pipeline("image-segmentation", self.segmenter_name, **self.remote)(self.request["image"])
        return sorted(
            [segment["label"], list(segment["mask"].size), segment["mask"].histogram()[255]] for segment in segments
        )

    def features_pipeline(self) -> list[float]:
        (pooled,) = pipeline("image-feature-extraction", self.classifier_name, **self.remote)(
            self.request["image"], pool=True
        )
        return pooled

    def save_again(self) -> list[str]:
        """What a person does after fine-tuning: save model and processor as they came, for somebody else."""
        for name, auto_class, source in (
            ("classifier", AutoModelForImageClassification, self.classifier_name),
            ("segmenter", AutoModelForSemanticSegmentation, self.segmenter_name),
        ):
            auto_class.from_pretrained(source, **self.remote).save_pretrained(Path(self.request["target"]) / name)
        return sorted(path.name for path in (Path(self.request["target"]) / "classifier").iterdir())

    def push_again(self) -> None:
        for name, auto_class, source in (
            ("classifier", AutoModelForImageClassification, self.classifier_name),
            ("segmenter", AutoModelForSemanticSegmentation, self.segmenter_name),
        ):
            auto_class.from_pretrained(source, **self.remote).push_to_hub(f"{self.request['push']}-{name}")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    answers = [RemoteUser(request).answer() for request in json.loads(Path(sys.argv[1]).read_text())]
    assert "locatvit_hf" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(answers))
