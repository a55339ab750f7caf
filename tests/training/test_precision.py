"""Checkpoints in half precision: every program trains and evaluates float32 weights, unless `dtype` says otherwise."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from locatvit_hf import (
    LocAtViTConfig,
    LocAtViTForImageClassification,
    LocAtViTForSemanticSegmentation,
    LocAtViTImageProcessor,
)
from locatvit_hf.inference import Checkpoint
from tests.training.conftest import SMALL_MODEL
from training.detect import DetectArguments
from training.detect import build_model as build_detector
from training.dino import DinoArguments
from training.engine.arguments import build_arguments
from training.evaluation.classification import load_classifier
from training.evaluation.features import load_encoder
from training.finetune import FinetuneArguments, add_adapters
from training.finetune import build_model as build_classifier
from training.finetune import main as finetune
from training.pretrain import PretrainArguments
from training.pretrain import main as pretrain
from training.segment import SegmentArguments
from training.segment import build_model as build_segmenter
from training.tasks.distillation import Distillation

NAMES = ["red", "green"]
HALVES = ["float16", "bfloat16"]


def save(folder: Path, model: PreTrainedModel, dtype: str) -> str:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    LocAtViTImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=HALVES)
def halves(request, tmp_path_factory) -> dict[str, str]:
    """Folders of a classifier, a probe and a UPerNet whose weights are stored in half precision."""
    folder = tmp_path_factory.mktemp(request.param)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = LocAtViTConfig(**{**SMALL_MODEL, "num_hidden_layers": 4}, **names)
    found = {
        "classifier": save(folder / "classifier", LocAtViTForImageClassification(config), request.param),
        "probe": save(folder / "probe", LocAtViTForSemanticSegmentation(config), request.param),
    }
    settings = {"pretrained": found["classifier"], "head": "upernet", "upernet": {"hidden_size": 16}}
    upernet = build_segmenter(build_arguments(SegmentArguments, settings), NAMES)
    upernet.to(getattr(torch, request.param)).save_pretrained(folder / "upernet")
    return found | {"upernet": str(folder / "upernet")}


def finetuned(**settings) -> nn.Module:
    return build_classifier(build_arguments(FinetuneArguments, settings), NAMES)[0]


def adapted(pretrained: str) -> nn.Module:
    arguments = build_arguments(FinetuneArguments, {"pretrained": pretrained, "lora": {"r": 2}})
    return add_adapters(build_classifier(arguments, NAMES)[0], arguments, False)


def segmenter(pretrained: str, **settings) -> nn.Module:
    return build_segmenter(build_arguments(SegmentArguments, {"pretrained": pretrained, **settings}), NAMES)


def detector(pretrained: str) -> nn.Module:
    settings = {"pretrained": pretrained, "pyramid_channels": 8}
    return build_detector(build_arguments(DetectArguments, settings), [{"id": 1, "name": "x"}])


def teacher(pretrained: str) -> nn.Module:
    arguments = build_arguments(PretrainArguments, {"teacher": pretrained})
    return Distillation(arguments, 2, [0.5] * 3, [0.5] * 3, Accelerator(cpu=True)).teacher


BUILDERS = {
    "finetune, the same classes": lambda halves: finetuned(pretrained=halves["classifier"]),
    "finetune, other classes": lambda halves: finetuned(pretrained=halves["probe"], model={"image_size": 24}),
    "finetune, adapters": lambda halves: adapted(halves["classifier"]),
    "segment, probe": lambda halves: segmenter(halves["classifier"]),
    "segment, probe goes on": lambda halves: segmenter(halves["probe"]),
    "segment, UPerNet": lambda halves: segmenter(halves["classifier"], head="upernet", upernet={"hidden_size": 16}),
    "segment, UPerNet goes on": lambda halves: segmenter(
        halves["upernet"], head="upernet", upernet={"hidden_size": 16}
    ),
    "segment, probe on the encoder of a UPerNet": lambda halves: segmenter(halves["upernet"]),
    "detect": lambda halves: detector(halves["classifier"]),
    "teacher": lambda halves: teacher(halves["classifier"]),
    "evaluation.classification": lambda halves: load_classifier(halves["classifier"]),
    "evaluation.knn": lambda halves: load_encoder(halves["classifier"]),
    "evaluation.segmentation": lambda halves: Checkpoint(halves["probe"]).load_model(
        AutoModelForSemanticSegmentation, dtype=torch.float32
    ),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_half_precision_checkpoints_become_float32(halves, build):
    model = build(halves)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # The encoder holds the very values that are stored.
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    files = [load_file(f"{folder}/model.safetensors") for folder in halves.values()]
    stored = [value for file in files for key, value in file.items() if key.endswith("layers.1.mlp.up_proj.weight")]
    assert any(torch.equal(tensors[name], value.float()) for value in stored)


@pytest.mark.parametrize(("asked", "exported"), [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)])
def test_the_precision_is_asked_for_by_name(squares, tmp_path, asked, exported):
    """The steps of a small learning rate vanish in the source's bfloat16, and are kept in float32."""
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    source = save(
        tmp_path / "source", LocAtViTForImageClassification(LocAtViTConfig(**SMALL_MODEL, **names)), "bfloat16"
    )
    settings = {"dataset": str(squares), "pretrained": source, "output_dir": str(tmp_path / "run"), "length": "2 steps"}
    settings |= {"batch_size": 8, "warmup": "0 steps", "learning_rate": 1e-7, "schedule": "constant"}
    settings |= {"final_learning_rate": 1e-7, "weight_decay": 0.0, **asked}
    finetune(build_arguments(FinetuneArguments, settings))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (source, tmp_path / "run" / "model"))
    assert {tensor.dtype for tensor in after.values()} == {exported}
    name = "locatvit.layers.0.mlp.up_proj.weight"
    large = before[name].abs() > 1e-3  # a step of 1e-7 is less than half a unit in the last place of bfloat16 there
    moved = (after[name].float() != before[name].float())[large]
    assert moved.float().mean() > 0.9 if exported == torch.float32 else not moved.any()


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (PretrainArguments, {"dtype": "float16"}, "dtype"),
        (DetectArguments, {"dtype": "bfloat16"}, "dtype"),
        (DinoArguments, {"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_precisions_that_cannot_train_are_refused(program, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_arguments(program, settings)
    assert "\n" not in str(caught.value)


def test_an_average_needs_float32(pretrain_settings, tmp_path):
    settings = {**pretrain_settings, "output_dir": str(tmp_path / "run"), "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="ema_decay needs --dtype float32"):
        pretrain(build_arguments(PretrainArguments, settings))
