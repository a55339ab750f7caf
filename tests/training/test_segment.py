"""Heads, freezing and fine-tuning of `segment`, and what it says about mistakes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, Features, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForSemanticSegmentation,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from locatvit_hf import (
    LocAtViTModel,
)
from locatvit_hf.inference import Segmenter
from tests.factories import FAMILIES, SMALLEST, model_class, tiny_config
from tests.tolerances import assert_same_but_for_rounding, assert_same_labels
from tests.training.conftest import PLAIN_DESCENT
from tests.training.programs import train
from training.data import load_splits
from training.engine.arguments import build_arguments
from training.engine.optimization import create_optimizer
from training.segment import LabelReader, SegmentArguments, build_model, build_processor, heads_of, main
from training.tasks.segmentation.evaluation import SegmentationCollator, draw_examples

NAMES = ["background", "red", "green"]
HEADS = [(family, head) for family in FAMILIES for head in ("probe", "upernet")] + [("pacavit", "paca")]
SMALL_HEAD = {
    "model": {"segmentation_hidden_size": 8},
    "upernet": {"hidden_size": 8, "auxiliary_channels": 8},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A saved classifier of each family, with two classes and random weights."""
    folder = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        torch.manual_seed(0)
        fields = SMALLEST[family] | ({} if family in ("locatswin", "pacavit") else {"num_hidden_layers": 3})
        config = model_class(family, "Config")(**fields, drop_path_rate=0.3, num_labels=2)
        model_class(family)(config).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


def arguments_for(source: Path, head: str = "probe", **settings) -> SegmentArguments:
    fixed = {"pretrained": str(source), "head": head, **SMALL_HEAD}
    return build_arguments(SegmentArguments, {**fixed, **settings})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 3, (2, 32, 32), generator=generator),
    }


@pytest.mark.parametrize("head", ["probe", "upernet"])
def test_a_new_head_starts_as_in_mmsegmentation_or_as_its_class_says(sources, head):
    wide = {"model": {"segmentation_hidden_size": 256}, "upernet": {"hidden_size": 256, "auxiliary_channels": 256}}
    modules = {}
    for kind in ("mmsegmentation", "default"):
        torch.manual_seed(0)
        model = build_model(arguments_for(sources["locatvit"], head, **wide, head_initialization=kind), NAMES * 50)
        modules[kind] = heads_of(model)
    assert modules["default"].keys() == (
        {"segmentation_head"} if head == "probe" else {"decode_head", "auxiliary_head"}
    )
    for name, reference in modules["mmsegmentation"].items():
        for (path, layer), other in zip(reference.named_modules(), modules["default"][name].modules(), strict=True):
            if not isinstance(layer, torch.nn.Conv2d):
                continue
            std = 0.01 if path == "classifier" else math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1), path
            assert layer.weight.abs().max() > 2.5 * std  # normal, not uniform
            assert layer.bias is None or not layer.bias.any()
            # Bounds of PyTorch in a probe, a normal with deviation 0.02 in a UPerNet of transformers.
            default = (3 * math.prod(other.weight.shape[1:])) ** -0.5 if head == "probe" else 0.02
            assert other.weight.std().item() == pytest.approx(default, rel=0.1), path


def test_a_head_that_goes_on_is_not_started_anew(sources, tmp_path):
    arguments = arguments_for(sources["locatvit"])
    build_model(arguments, NAMES).save_pretrained(tmp_path)
    continued = build_model(arguments_for(tmp_path), NAMES)
    assert continued.config.id2label == dict(enumerate(NAMES))
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in continued.segmentation_head.state_dict().items():
        assert torch.equal(tensor, saved[f"segmentation_head.{name}"])


def test_images_are_tested_as_the_recipe_says(sources):
    for interpolation, number in (("bilinear", 2), ("bicubic", 3)):
        arguments = arguments_for(sources["locatvit"], test_interpolation=interpolation)
        assert build_processor(arguments, build_model(arguments, NAMES).config).resample == number
    assert SegmentArguments().test_interpolation == "bilinear"


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_frozen_model_builds_no_graph_below_its_head(sources, family, head):
    model = build_model(arguments_for(sources[family], head), NAMES).train()
    encoder, saved = model.base_model, []
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    def forget(tensor):
        saved.append(tensor)
        return tensor

    contexts = []
    encoder.register_forward_pre_hook(
        lambda *_: (
            contexts.append(torch.autograd.graph.saved_tensors_hooks(forget, lambda t: t)) or contexts[0].__enter__()
        )
    )
    encoder.register_forward_hook(lambda *_: contexts.pop().__exit__())
    loss = model(**batch()).loss
    assert not saved, "the encoder kept tensors for a backward pass"
    assert not any(module.training for module in encoder.modules())
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert [model.config.id2label[index] for index in range(3)] == NAMES


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_fine_tuning_gives_every_parameter_a_gradient_and_a_layer(sources, family, head):
    """A parameter without a gradient would stop several processes; one without a layer would ignore layer decay."""
    arguments = arguments_for(sources[family], head, freeze=False, layer_decay=0.5)
    model = build_model(arguments, NAMES).train()
    model(**batch()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    rates = {}
    for group in create_optimizer(model, arguments).param_groups:
        rates.update({id(parameter): group.get("lr_scale", 1.0) for parameter in group["params"]})
    rates = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    head_rates = {rate for name, rate in rates.items() if "head" in name}
    stem_rates = {rate for name, rate in rates.items() if ".embeddings." in name}
    assert head_rates == {1.0} and len(stem_rates) == 1
    layers = 4 if family in ("locatswin", "pacavit") else 3
    assert 0 < stem_rates.pop() <= 0.5**layers


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_pretrained_weights_are_those_of_the_checkpoint(sources, family, head, capsys):
    model = build_model(arguments_for(sources[family], head), NAMES)
    stored = load_file(sources[family] / "model.safetensors")
    loaded = {f"{family}.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    assert loaded.keys() == {name for name in stored if name.startswith(f"{family}.")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
    assert capsys.readouterr().out == ""


def test_changed_fields_start_anew_and_are_named(sources, capsys):
    """The recipe of PaCa-ViT gives 200 clusters to the segmentor where the classifier had 100."""
    settings = {"model": {"num_clusters": [6, 6, 6, 0], "segmentation_hidden_size": 8, "drop_path_rate": 0.0}}
    model = build_model(arguments_for(sources["pacavit"], "paca", **settings), NAMES)
    assert model.config.num_clusters == [6, 6, 6, 0] and model.config.drop_path_rate == 0.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Starts anew" in printed and printed.count("clusters.weight") == 3


def test_an_encoder_alone_is_a_source_too(tmp_path):
    """As `AutoModel` saves it: without the prefix of a head."""
    encoder = LocAtViTModel(tiny_config("locatvit", **SMALLEST["locatvit"]))
    encoder.save_pretrained(tmp_path / "encoder")
    model = build_model(arguments_for(tmp_path / "encoder"), NAMES)
    assert all(
        torch.equal(tensor, model.base_model.state_dict()[name]) for name, tensor in encoder.state_dict().items()
    )


@pytest.mark.parametrize("head", ["probe", "upernet"])
def test_a_segmentor_is_a_source_too(sources, tmp_path, head):
    """For other classes its head starts anew; for as many it goes on, where it is of the same kind."""
    arguments = arguments_for(sources["pacavit"], "upernet")
    source = build_model(arguments, NAMES)
    source.save_pretrained(tmp_path / "upernet")
    model = build_model(arguments_for(tmp_path / "upernet", head), ["sky", *NAMES])
    weights = source.base_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.base_model.state_dict().items())
    assert model.config.id2label[0] == "sky"
    with pytest.raises(ValueError, match="give other shapes than the tensors"):
        build_model(arguments_for(tmp_path / "upernet", head, model={"num_clusters": [9, 9, 9, 0]}), NAMES)
    if head == "upernet":
        again = build_model(arguments_for(tmp_path / "upernet", head), NAMES)
        assert torch.equal(again.decode_head.classifier.weight, source.decode_head.classifier.weight)
        assert model.decode_head.classifier.weight.shape[0] == 4


@pytest.mark.parametrize("head", ["probe", "upernet"])
def test_a_plain_vit_is_a_source_too(tmp_path, head):
    """Of transformers, without Gaussians where they are switched off: the baseline of the paper."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16)
    vit = ViTForImageClassification(ViTConfig.from_dict({**config.to_dict(), "patch_size": 4})).eval()
    vit.save_pretrained(tmp_path / "vit")
    fields = {"use_gaussian": False, "use_refinement": False, "segmentation_hidden_size": 8}
    model = build_model(arguments_for(tmp_path / "vit", head, model=fields), NAMES).eval()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = vit(pixels, output_hidden_states=True).hidden_states[-1]
        found = model.base_model(pixels, output_hidden_states=True).hidden_states[-1]
    assert_same_but_for_rounding(found, expected)


def test_upernet_recomputes_the_layers_of_its_backbone(sources):
    passes = []
    for recompute in (False, True):
        model = build_model(arguments_for(sources["locatvit"], "upernet", freeze=False), NAMES).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        model.backbone.locatvit.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(**batch()).loss.backward()
        passes.append(len(calls))
    assert passes == [1, 2]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("locatvit", {"head": "paca"}, "reads four stages of a pacavit; for a locatvit choose probe or upernet"),
        ("locatvit", {"head": "segformer"}, "head"),
        ("locatvit", {"pretrained": None}, "Name the model to start from"),
        ("locatvit", {"pretrained": "./nowhere"}, r"There is no file or folder \./nowhere"),
        ("locatvit", {"model": {"num_labels": 7}}, "model.num_labels is 7, but the data has 3 classes"),
        ("locatvit", {"model": {"hidden_sizes": 8}}, "A locatvit configuration has no field 'hidden_sizes'"),
        ("pacavit", {"model": {"num_clusters": [5, 5]}}, "num_clusters must have 4 entries"),
        ("locatvit", {"head": "upernet", "upernet": {"width": 8}}, "A UPerNet configuration has no field 'width'"),
    ],
)
def test_impossible_models_are_one_sentence(sources, family, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(arguments_for(sources[family], **settings), NAMES)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_refused(sources, tmp_path):
    """Weights of which none fits must not become a silent start from random ones."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text((sources["locatvit"] / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((sources["pacavit"] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no weights of a locatvit"):
        build_model(arguments_for(folder), NAMES)


def test_a_batch_without_classes_costs_nothing(sources):
    for family, head in HEADS:
        model = build_model(arguments_for(sources[family], head), NAMES).train()
        inputs = batch()
        loss = model(inputs["pixel_values"], labels=torch.full_like(inputs["labels"], 255)).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.fixture
def settings(squares, sources, tmp_path) -> dict:
    """A short fine-tuning of a LocAtViT that exercises everything random."""
    return {
        "dataset": str(squares),
        "label_column": "segmentation",
        "label_names": NAMES,
        "pretrained": str(sources["locatvit"]),
        "output_dir": str(tmp_path / "run"),
        "freeze": False,
        "layer_decay": 0.7,
        "length": "6 steps",
        "warmup": "2 steps",
        "batch_size": 8,
        "resize": 16,
        "crop_size": 16,
        "evaluate_every": "3 steps",
        "log_every": 1,
        **SMALL_HEAD,
    }


@pytest.mark.parametrize(("family", "head"), [("locatvit", "upernet"), ("pacavit", "paca")])
def test_an_exported_head_answers_in_the_pipeline(settings, sources, capsys, family, head):
    """The folder loads as the library's own class and says what the program's inference says."""
    settings |= {"pretrained": str(sources[family]), "head": head, "resize": 32, "crop_size": 32}
    results = main(build_arguments(SegmentArguments, settings))
    assert list(results["metrics"]["per_category_iou"]) == NAMES
    assert "IoU: background" in capsys.readouterr().out

    folder = f"{settings['output_dir']}/model"
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers." if head == "upernet" else "locatvit_hf.")
    assert isinstance(model, UperNetForSemanticSegmentation) == (head == "upernet")
    image = load_splits(build_arguments(SegmentArguments, settings), segmentation=True).validation[0]["image"]
    segmenter = pipeline("image-segmentation", folder)
    (found,) = Segmenter(model, segmenter.image_processor)([image])
    assert list(segmenter.image_processor.output_stride) == ([1, 1] if head == "upernet" else [4, 4])
    with torch.no_grad():
        logits = model(**segmenter.image_processor(image, return_tensors="pt")).logits
    assert_same_labels(found, F.interpolate(logits, (16, 16), mode="bilinear")[0].argmax(dim=0))
    masked = np.full((16, 16), -1)
    for entry in segmenter(image):
        masked[np.asarray(entry["mask"]) > 0] = NAMES.index(entry["label"])
    assert_same_labels(masked, found)


def save_maps(folder: Path, maps: list[np.ndarray], sizes: list[tuple[int, int]]) -> str:
    """A dataset of gray images of `sizes` (height, width) with these label maps, as both splits."""
    features = Features({"image": ImageFeature(), "segmentation": ImageFeature()})
    rows = [
        {"image": Image.fromarray(np.full((*size, 3), 90, np.uint8)), "segmentation": Image.fromarray(label_map)}
        for label_map, size in zip(maps, sizes, strict=True)
    ]
    split = Dataset.from_list(rows, features=features)
    DatasetDict({"train": split, "validation": split}).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("label_map", "changes", "message"),
    [
        (np.zeros((16, 12), np.uint8), {}, "sample 0: the label map is 12 x 16 pixels, but its image 16 x 16"),
        (np.full((16, 16), 3, np.uint8), {}, "sample 0: labels run from 3 to 3, outside the 3 classes"),
        (np.zeros((16, 16, 3), np.uint8), {}, "sample 0: .*one class id per pixel.* RGB image"),
        (np.zeros((16, 16), np.uint8), {"label_mapping": {0: 5}}, "names class 5, outside the 3 classes"),
        (np.zeros((16, 16), np.uint8), {"inference": "sliding", "window_size": 14}, "multiple of 4 pixels"),
        (np.zeros((16, 16), np.uint8), {"label_names": None}, "does not name its classes"),
    ],
)
def test_bad_maps_end_the_run_with_one_sentence(settings, tmp_path, label_map, changes, message):
    settings |= {"dataset": save_maps(tmp_path / "maps", [label_map], [(16, 16)]), "batch_size": 1, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        main(build_arguments(SegmentArguments, settings))
    assert "\n" not in str(caught.value).strip()


TWO = {"label_names": ["background", "polyp"], "batch_size": 2, "length": "2 steps", "warmup": "1 steps"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "No pixel of the 4 training label maps is 'polyp', but 256 of 1,024 are 255, which means no class; for "
            "masks of 0 and 255 give --label_mapping '{0: 0, 255: 1}'.",
        ),
        (
            {"label_mapping": {"#123456": 0, "#654321": 1}},
            "No pixel of the 4 training label maps is of a class: all 1,024 are of values that --label_mapping leaves",
        ),
        ({"reduce_labels": True}, "is of a class: all 1,024 are 0 or 255, which with --reduce_labels means no class."),
        ({"label_names": ["polyp"]}, "at least two classes"),
    ],
)
def test_labels_that_teach_nothing_end_the_run(settings, tmp_path, changes, message, streaming):
    """Masks of 0 and 255, as most tools write them, train the background alone."""
    label_map = np.zeros((16, 16), np.uint8)
    label_map[4:12, 4:12] = 255
    saved = save_maps(tmp_path / "maps", [label_map] * 4, [(16, 16)] * 4)
    if streaming:
        for name, split in load_from_disk(saved).items():
            split.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
        files = {"train_split": "train.parquet", "validation_split": "validation.parquet"}
        changes = {"streaming": True, "dataset": str(tmp_path / "parquet"), **files, **changes}
    settings |= {"dataset": saved, "evaluate_every": "2 steps", **TWO, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        main(build_arguments(SegmentArguments, settings))
    assert not (tmp_path / "run" / "model").exists()


def test_the_remedy_of_the_message_trains_both_classes(settings, tmp_path, capsys):
    label_map = np.zeros((16, 16), np.uint8)
    label_map[4:12, 4:12] = 255
    settings |= {"dataset": save_maps(tmp_path / "maps", [label_map] * 4, [(16, 16)] * 4), **TWO}
    results = main(build_arguments(SegmentArguments, settings | {"label_mapping": {0: 0, 255: 1}}))
    assert not np.isnan(list(results["metrics"]["per_category_iou"].values())).any()
    assert "No pixel" not in capsys.readouterr().out


def test_a_class_that_never_occurs_is_named_once(settings, capsys):
    settings |= {"label_names": [*NAMES, "blue"], "length": "8 steps", "evaluate_every": "2 steps"}
    main(build_arguments(SegmentArguments, settings))
    printed = capsys.readouterr().out.replace("\n", " ")
    for split, number in (("training", 48), ("validation", 10)):
        assert printed.count(f"No pixel of the {number} {split} label maps is 'blue'; see --label_names") == 1


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("probe", {"model": {"semantic_loss_ignore_index": 0}}),
        ("upernet", {"upernet": {"loss_ignore_index": 0}}),
    ],
)
def test_another_label_for_no_class_is_refused(sources, head, changes):
    with pytest.raises(ValueError, match=r"have the label 255 here: leave out .*loss_ignore_index"):
        build_model(arguments_for(sources["locatvit"], head, **changes), NAMES)


def test_examples_show_labels_and_prediction(sources, squares):
    arguments = arguments_for(sources["locatvit"], resize=16)
    model = build_model(arguments, NAMES)
    processor = build_processor(arguments, model.config)
    collate = SegmentationCollator(processor, LabelReader(arguments, 3), arguments)
    rows = []
    for size in (16, 40):
        labels = np.zeros((size, size), np.uint8)
        labels[: size // 2] = 2
        rows.append((Image.new("RGB", (size, size), "white"), Image.fromarray(labels)))
    small, large = draw_examples(Segmenter(model, processor, arguments), [collate(rows)])
    assert small.size == large.size  # both are drawn as the model sees them
    truth = np.asarray(small).astype(int)[:, : small.width // 2]
    top, bottom = truth[10 : small.height // 3].mean(axis=(0, 1)), truth[-small.height // 3 : -10].mean(axis=(0, 1))
    assert np.abs(top - bottom).max() > 40
    assert np.abs(np.asarray(small)[:, small.width // 2 :].astype(int) - truth[:, : small.width // 2]).max() > 40


@pytest.fixture
def unlabelled(settings, tmp_path) -> dict:
    """Fine-tuning without randomness in the model, on maps of which some have hardly a labelled pixel."""
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 3, (16, 16), dtype=np.uint8) for _ in range(16)]
    for index, label_map in enumerate(maps):
        label_map[: 16 - index] = 255
    settings["model"] = {**settings["model"], "drop_path_rate": 0.0}
    dataset = save_maps(tmp_path / "maps", maps, [(16, 16)] * 16)
    return {**settings, **PLAIN_DESCENT, "dataset": dataset, "ema_decay": None}


def test_accumulation_shares_a_batch(unlabelled, tmp_path):
    """Also where the images of a batch have different numbers of labelled pixels."""
    runs = {}
    for name, changes in {
        "whole": {},
        "split": {"gradient_accumulation_steps": 4},
        "labelled": {"gradient_accumulation_steps": 4, "loss_average": "labelled"},
    }.items():
        arguments = build_arguments(SegmentArguments, {**unlabelled, **changes, "output_dir": str(tmp_path / name)})
        runs[name] = [point["loss"] for point in main(arguments)["train_curve"]]
    assert runs["split"] == pytest.approx(runs["whole"], abs=1e-5)
    assert runs["labelled"] != pytest.approx(runs["whole"], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one(unlabelled, tmp_path, sharded):
    outputs = [tmp_path / "one", tmp_path / "two"]
    runs = [
        train({**unlabelled, "output_dir": str(outputs[0])}, program="segment"),
        train({**unlabelled, "output_dir": str(outputs[1])}, num_processes=2, sharded=sharded, program="segment"),
    ]
    assert [set(processes.wait()) for processes in runs] == [{0}, {0}]
    results = [json.loads((output / "all_results.json").read_text()) for output in outputs]
    losses = [[point["loss"] for point in result["train_curve"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert results[0]["metrics"]["mean_iou"] == pytest.approx(results[1]["metrics"]["mean_iou"], abs=1e-3)
    weights = [load_file(output / "model" / "model.safetensors") for output in outputs]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=0)
