"""Detection and instance segmentation: annotated images in COCO's format, their augmentation, and Mask R-CNN."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel

from locatvit_hf.image_processing_locatvit import channel_values, pair
from locatvit_hf.utils.io import read_text
from training.arguments import DataArguments
from training.data import load_split, spread

NUM_LEVELS = 5
"""Maps of the pyramid: four of the encoder, and one of half the last one's size."""


@strict
@dataclass(kw_only=True)
class DetectionDataArguments(DataArguments):
    """Where images and annotations are: a folder laid out as COCO's or Roboflow's, or a Hub data set with `objects`."""

    train_split: str = "train2017"
    validation_split: str = "val2017"
    train_images: str | None = field(default=None, metadata={"help": "Folder; by default DATASET/TRAIN_SPLIT."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "COCO file; by default DATASET/annotations/instances_TRAIN_SPLIT.json."}
    )
    validation_images: str | None = field(default=None, metadata={"help": "As `train_images`."})
    validation_annotations: str | None = field(default=None, metadata={"help": "As `train_annotations`."})


@strict
@dataclass(kw_only=True)
class DetectionAugmentation:
    """Joint augmentation of images, boxes and masks; sides are in pixels."""

    shortest_sides: list[int] = field(
        default_factory=lambda: [800], metadata={"help": "The short side of a training image is one of these."}
    )
    longest_side: int = field(default=1333, metadata={"help": "No side is longer, in training and in evaluation."})
    horizontal_flip: float | int = 0.5
    crop: float | int = field(
        default=0.0, metadata={"help": "Probability of resizing to `crop_shortest_sides` and cropping first."}
    )
    crop_shortest_sides: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_size: list[int] = field(
        default_factory=lambda: [384, 600], metadata={"help": "Smallest and largest side of that crop."}
    )


@strict
@dataclass(kw_only=True)
class DetectorSettings:
    """What a detector is besides its encoder; the defaults are Mask R-CNN with a feature pyramid."""

    masks: bool = field(default=True, metadata={"help": "Mask R-CNN; without, Faster R-CNN: boxes alone."})
    pyramid_channels: int = 256
    anchor_scale: int = field(default=8, metadata={"help": "Side of an anchor in cells of its map."})
    test_shortest_side: int = field(default=800, metadata={"help": "Short side of an image in evaluation, in pixels."})
    longest_side: int = 1333
    score_threshold: float | int = field(default=0.05, metadata={"help": "Detections below are left out."})
    max_detections: int = field(default=100, metadata={"help": "Detections of an image."})


class DetectionSplits(NamedTuple):
    """train, validation: columns `image` and `objects`, JSON with the annotations of an image.

    categories: {"id": as in the annotations, "name": …}; a label is a place in this list.
    num_empty_boxes: annotations whose box has no area, which were left out.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    categories: list[dict[str, Any]]
    num_empty_boxes: int


class _Annotated(NamedTuple):
    images: datasets.Dataset
    objects: list[dict[str, Any]]
    categories: list[dict[str, Any]]


def load_detection_splits(arguments: DetectionDataArguments, masks: bool) -> DetectionSplits:
    """Read both splits. Crowds stay in the validation split alone, and so do images without an object.

    masks: whether every object needs a segmentation.
    Raises ValueError where annotations and images do not fit each other.
    """
    if arguments.streaming or arguments.validation_share is not None:
        raise ValueError("Detection reads two splits from local files: leave out --streaming and --validation_share.")
    annotated = []
    for split, images, annotations in (
        (arguments.train_split, arguments.train_images, arguments.train_annotations),
        (arguments.validation_split, arguments.validation_images, arguments.validation_annotations),
    ):
        found = _find_coco(arguments.dataset, split, images, annotations)
        if found is not None:
            annotated.append(read_coco(*found, masks))
        elif arguments.dataset is None:
            raise ValueError("Name a data set with --dataset, or --train_annotations and --validation_annotations.")
        elif masks:
            raise ValueError(
                f"There are no COCO annotations of the split {split!r} in {arguments.dataset}; "
                f"a data set with a column `objects` holds boxes alone and needs --masks false."
            )
        else:
            annotated.append(_read_objects_column(arguments, split))
    train, validation = annotated
    if train.categories != validation.categories:
        raise ValueError("The training and the validation annotations list different categories.")
    num_empty = sum(_drop_empty_boxes(image) for split in annotated for image in split.objects)
    for image in train.objects:
        image["annotations"] = [entry for entry in image["annotations"] if not entry["iscrowd"]]
    used = [index for index, image in enumerate(train.objects) if image["annotations"]]
    if not used:
        raise ValueError(f"No image of the split {arguments.train_split!r} has an object to learn from.")
    if not validation.objects:
        raise ValueError(f"The split {arguments.validation_split!r} has no image.")
    limits = arguments.max_train_samples, arguments.max_validation_samples
    chosen = used, list(range(len(validation.objects)))
    return DetectionSplits(
        *(
            spread(split.images.select(rows).add_column("objects", [json.dumps(split.objects[i]) for i in rows]), limit)
            for split, rows, limit in zip(annotated, chosen, limits, strict=True)
        ),
        train.categories,
        num_empty,
    )


def _find_coco(
    dataset: str | None, split: str, images: str | None, annotations: str | None
) -> tuple[Path, Path] | None:
    """Folder of images and annotation file of a split, or None where there are no such annotations."""
    if annotations is not None:
        if images is None and dataset is None:
            raise ValueError(f"Name the folder with the images of {annotations}: --train_images, --validation_images.")
        return Path(images) if images is not None else Path(dataset) / split, Path(annotations)
    if dataset is None:
        return None
    folder = Path(images) if images is not None else Path(dataset) / split
    for file in (Path(dataset) / "annotations" / f"instances_{split}.json", folder / "_annotations.coco.json"):
        if file.is_file():
            return folder, file
    return None


def read_coco(folder: Path, file: Path, masks: bool) -> _Annotated:
    """The images of a COCO annotation file with their objects.

    Raises ValueError for a file that is not such, one that names images which are not in the folder, annotations of
    unknown images or categories, boxes that are no four numbers, and with `masks` objects without segmentation.
    """
    try:
        content = json.loads(read_text(file))
        images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
        objects = {
            image["id"]: {
                "image_id": image["id"],
                "size": [image["width"], image["height"]],
                "annotations": [],
                "file_name": image["file_name"],
            }
            for image in images
        }
        categories = sorted(({"id": c["id"], "name": str(c["name"])} for c in categories), key=lambda c: c["id"])
    except OSError as error:
        raise ValueError(f"Cannot read the annotations {file}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no COCO annotation file with images, annotations and categories.") from None
    if len(objects) < len(images):
        raise ValueError(f"{file} gives one id to several images.")
    labels = {category["id"]: label for label, category in enumerate(categories)}
    for annotation in annotations:
        name = f"The annotation {annotation.get('id')} of {file}"
        if annotation.get("image_id") not in objects:
            raise ValueError(f"{name} belongs to image {annotation.get('image_id')}, which the file does not list.")
        if annotation.get("category_id") not in labels:
            raise ValueError(f"{name} has category {annotation.get('category_id')}, which the file does not list.")
        if masks and not annotation.get("segmentation"):
            raise ValueError(f"{name} has no segmentation: give --masks false to learn boxes alone.")
        entry = _annotation(name, annotation.get("bbox"), labels[annotation["category_id"]], annotation)
        if masks:
            entry["segmentation"] = annotation["segmentation"]
        objects[annotation["image_id"]]["annotations"].append(entry)
    rows = list(objects.values())
    names = [row.pop("file_name") for row in rows]
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in names if name not in present and not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images of {file} are not in {folder}, for example {missing[0]}."
        )
    files = datasets.Dataset.from_dict(
        {"image": [str(folder / name) for name in names]}, features=datasets.Features({"image": datasets.Image()})
    )
    return _Annotated(files, rows, categories)


def _read_objects_column(arguments: DataArguments, name: str) -> _Annotated:
    """A split in the layout of the Hub: `objects` with `bbox` as [left, top, width, height] and `category`."""
    split = load_split(arguments, name, [arguments.image_column, "objects"], [arguments.image_column])
    names = arguments.label_names or getattr(_inner(_inner(split.features["objects"]).get("category")), "names", None)
    if not isinstance(names, list):
        raise ValueError("The data does not name its categories: give --label_names as a list.")
    rows = []
    for index, row in enumerate(split.remove_columns(arguments.image_column)):
        objects = row["objects"]
        if isinstance(objects, list):
            objects = {key: [entry[key] for entry in objects] for key in (objects[0] if objects else ())}
        image = {"image_id": index, "size": None, "annotations": []}
        for number, (box, label) in enumerate(zip(objects.get("bbox", []), objects.get("category", []), strict=True)):
            text = f"Object {number} of row {index} of the split {name!r}"
            if not isinstance(label, int) or not 0 <= label < len(names):
                raise ValueError(f"{text} has category {label}, outside the {len(names)} that are named.")
            details = {key: objects[key][number] for key in ("area", "iscrowd") if key in objects}
            image["annotations"].append(_annotation(text, box, label, details))
        rows.append(image)
    images = split.select_columns([arguments.image_column]).rename_columns({arguments.image_column: "image"})
    return _Annotated(images, rows, [{"id": label, "name": name} for label, name in enumerate(names)])


def _inner(feature: Any) -> Any:
    """What a list of `datasets` holds, or the feature itself."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def _annotation(name: str, box: Any, label: int, details: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
        raise ValueError(f"{name} has the box {box}, which is not [left, top, width, height] in pixels.")
    area = details.get("area")
    return {
        "box": [box[0], box[1], box[0] + box[2], box[1] + box[3]],
        "label": label,
        "iscrowd": int(details.get("iscrowd") or 0),
        "area": area if area is not None else box[2] * box[3],
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _drop_empty_boxes(image: dict[str, Any]) -> int:
    """Leave out boxes without area, of which COCO itself has some; returns their number."""
    before = image["annotations"]
    image["annotations"] = [e for e in before if e["box"][2] > e["box"][0] and e["box"][3] > e["box"][1]]
    return len(before) - len(image["annotations"])


def read_objects(image: Image.Image, objects: str, masks: bool) -> dict[str, Any]:
    """The annotations of an image as `boxes` (n, 4), `labels` (n,), and with `masks` run-length encoded `masks`.

    Also `iscrowd`, `area` and `image_id`. Boxes are [left, top, right, bottom] in pixels.
    Raises ValueError where the annotations are made for an image of another size.
    """
    content = json.loads(objects)
    if content["size"] is not None and tuple(content["size"]) != image.size:
        raise ValueError(f"the annotations are for an image of {content['size']} pixels, but it has {image.size}.")
    entries = content["annotations"]
    read = {
        "image_id": content["image_id"],
        "boxes": torch.tensor([entry["box"] for entry in entries], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([entry["label"] for entry in entries], dtype=torch.int64),
        "iscrowd": [entry["iscrowd"] for entry in entries],
        "area": [entry["area"] for entry in entries],
    }
    if masks:
        read["masks"] = [_run_lengths(entry["segmentation"], *image.size) for entry in entries]
    return read


def _run_lengths(segmentation: list | dict, width: int, height: int) -> dict:
    """Polygons, or run lengths in either of COCO's forms, as compressed run lengths."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


class DetectionTransform:
    """Maps (image, objects) to (normalised pixels (3, height, width), target) for training.

    A target has `boxes` (n, 4) as [left, top, right, bottom] in pixels of the new image, `labels` (n,), and with
    `masks` also `masks` (n, height, width) of 0 and 1. Objects that a crop cuts off are left out.

    mean, std: of the three channels, in 0 to 1.
    """

    def __init__(self, arguments: DetectionAugmentation, masks: bool, mean: list[float], std: list[float]):
        self.masks = masks
        resize = v2.RandomShortestSize(arguments.shortest_sides, max_size=arguments.longest_side)
        crop = [v2.RandomShortestSize(arguments.crop_shortest_sides), RandomSizedCrop(*arguments.crop_size)]
        self.transform = v2.Compose(
            [
                v2.RandomApply(crop, arguments.crop),
                resize,
                v2.RandomHorizontalFlip(arguments.horizontal_flip),
                v2.SanitizeBoundingBoxes(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image, objects: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        read = read_objects(image, objects, self.masks)
        size = image.height, image.width
        target = {"boxes": tv_tensors.BoundingBoxes(read["boxes"], format="XYXY", canvas_size=size)}
        target["labels"] = read["labels"]
        if self.masks:
            masks = [torch.from_numpy(coco_mask.decode(mask)) for mask in read["masks"]]
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        pixels, target = self.transform(tv_tensors.Image(tvF.pil_to_tensor(image.convert("RGB"))), target)
        return pixels.as_subclass(torch.Tensor), {k: v.as_subclass(torch.Tensor) for k, v in target.items()}


class RandomSizedCrop(v2.Transform):
    """A crop whose sides are drawn between two lengths in pixels, or are those of the image where it is smaller."""

    def __init__(self, smallest: int, largest: int):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        image = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.Image))
        params = {}
        for side, start, length in (("height", "top", image.shape[-2]), ("width", "left", image.shape[-1])):
            low, high = min(self.smallest, length), min(self.largest, length)
            params[side] = int(torch.randint(low, high + 1, ()))
            params[start] = int(torch.randint(0, length - params[side] + 1, ()))
        return params

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return self._call_kernel(tvF.crop, inpt, **params)


def collate_training(rows: list[tuple]) -> tuple[list, list]:
    """Images of different sizes and their targets, as two lists."""
    images, targets = zip(*rows, strict=True)
    return list(images), list(targets)


class EvaluationCollator:
    """Turns rows (image, objects) into a list of normalised pixels (3, height, width), and one of references."""

    def __init__(self, masks: bool, mean: list[float], std: list[float]):
        self.masks, self.mean, self.std = masks, mean, std

    def __call__(self, rows: list[tuple]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        pixels = [normalized_pixels(image, self.mean, self.std) for image, _ in rows]
        return pixels, [read_objects(image, objects, self.masks) for image, objects in rows]


def normalized_pixels(image: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
    """A whole image as (3, height, width), normalised."""
    pixels = tvF.to_dtype(tvF.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
    return tvF.normalize(pixels, mean, std)


class _Resize(GeneralizedRCNNTransform):
    """Training images keep the size that augmentation drew for each; at other times they get that of evaluation.

    The images are normalised already.
    """

    def __init__(self, shortest_side: int, longest_side: int):
        super().__init__(shortest_side, longest_side, image_mean=[0.0] * 3, image_std=[1.0] * 3)

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        return (image, target) if self.training else super().resize(image, target)


class PyramidEncoder(nn.Module):
    """Our encoder and a feature pyramid on its four maps, as torchvision's detectors expect it."""

    def __init__(self, encoder: PreTrainedModel, channels: int):
        super().__init__()
        self.encoder = encoder
        self.pyramid = FeaturePyramidNetwork(encoder.channels, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): maps for level, maps in enumerate(self.encoder(images).feature_maps)})


def _roi_align(levels: list[str], output_size: int, stride: float) -> MultiScaleRoIAlign:
    """RoIAlign over the pyramid, whose first map has this stride in pixels.

    Told the strides: torchvision would guess them from the first images that it sees, whose padding misleads it.
    """
    pool = MultiScaleRoIAlign(levels, output_size=output_size, sampling_ratio=0)
    pool.scales = [1 / (stride * 2**level) for level in range(len(levels))]
    first = round(math.log2(stride))
    pool.map_levels = initLevelMapper(first, first + len(levels) - 1, canonical_scale=224, canonical_level=4)
    return pool


class Detector(nn.Module):
    """Mask R-CNN, or Faster R-CNN, on one of our encoders (PaCa-ViT paper, section 4.2; the parts are torchvision's).

    encoder: a backbone with four maps, see `pyramid_config`.
    categories: {"id": …, "name": …}; a label is a place in this list.
    """

    def __init__(self, encoder: PreTrainedModel, categories: list[dict[str, Any]], settings: DetectorSettings):
        super().__init__()
        self.categories, self.settings = categories, settings
        config, channels = encoder.config, settings.pyramid_channels
        num_classes, hidden = len(categories) + 1, 4 * channels  # torchvision counts the background as class 0
        levels = [str(level) for level in range(NUM_LEVELS - 1)]
        stride = max(pair(config.patch_size)) / (4 if getattr(config, "feature_pyramid", False) else 1)
        anchors = tuple((settings.anchor_scale * stride * 2**level,) for level in range(NUM_LEVELS))
        parts = {
            "rpn_anchor_generator": AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * NUM_LEVELS),
            "box_roi_pool": _roi_align(levels, 7, stride),
            "box_head": TwoMLPHead(channels * 7**2, hidden),
            "box_predictor": FastRCNNPredictor(hidden, num_classes),
            "box_score_thresh": settings.score_threshold,
            "box_detections_per_img": settings.max_detections,
        }
        if settings.masks:
            parts["mask_roi_pool"] = _roi_align(levels, 14, stride)
            parts["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
            parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes)
        detector_class = MaskRCNN if settings.masks else FasterRCNN
        self.model = detector_class(PyramidEncoder(encoder, channels), **parts)
        self.model.transform = _Resize(settings.test_shortest_side, settings.longest_side)

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, *options: Any) -> None:
        """As in transformers, of the encoder."""
        self.encoder.gradient_checkpointing_enable(*options)

    @property
    def encoder(self) -> PreTrainedModel:
        """The backbone below the feature pyramid."""
        return self.model.backbone.encoder

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """images: each (3, height, width), normalised. targets: `boxes`, `labels`, `masks`, see `DetectionTransform`.

        Returns the terms of the loss in training, else for each image `boxes` (n, 4) in its pixels, `labels` (n,),
        `scores` (n,), best first, and with masks `masks` (n, height, width) of bool.
        """
        if self.training:
            return self.model(images, [{**target, "labels": target["labels"] + 1} for target in targets])
        results = self.model(images)
        for result in results:
            result["labels"] = result["labels"] - 1
            if self.settings.masks:
                result["masks"] = result["masks"][:, 0] > 0.5
        return results

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Any]:
        """What is on one image: as `forward`, with the `names` of the categories."""
        config = self.encoder.config
        mean, std = (channel_values(values, config.num_channels) for values in (config.image_mean, config.image_std))
        pixels = normalized_pixels(image, mean, std)
        (result,) = self.eval()([pixels.to(next(self.parameters()).device)])
        return {**result, "names": [self.categories[label]["name"] for label in result["labels"].tolist()]}

    def save_pretrained(self, folder: str | Path) -> None:
        """The encoder as a Hub folder; beside it what makes it a detector, for `load_detector`."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder)
        weights = {name: weight for name, weight in self.model.state_dict().items() if not _is_of_encoder(name)}
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "detector.safetensors")
        content = {"settings": asdict(self.settings), "categories": self.categories}
        (folder / "detector.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_of_encoder(name: str) -> bool:
    return name.startswith("backbone.encoder.")


def load_detector(folder: str | Path) -> Detector:
    """The detector that `Detector.save_pretrained` wrote, ready to detect; a local folder or a name on the Hub.

    Raises ValueError for a folder without one.
    """
    if not Path(folder).is_dir():
        folder = snapshot_download(str(folder))
    folder = Path(folder)
    if not (folder / "detector.json").is_file():
        raise ValueError(f"{folder} holds no detector: it has no detector.json.")
    content = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
    encoder = load_encoder(folder, AutoConfig.from_pretrained(folder))
    detector = Detector(encoder, content["categories"], DetectorSettings(**content["settings"]))
    names = detector.model.load_state_dict(load_file(folder / "detector.safetensors"), strict=False)
    lacking = [name for name in names.missing_keys if not _is_of_encoder(name)]
    if lacking or names.unexpected_keys:
        raise ValueError(f"{folder / 'detector.safetensors'} does not fit: {(lacking + names.unexpected_keys)[0]}.")
    return detector.eval()


def pyramid_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Sets a configuration of any family to four maps: those of its stages, or of a simple pyramid where it has none.

    The maps of a ViT, all of one stride, are read at the quarters of its depth and brought to four strides.
    """
    depth = config.num_hidden_layers
    if hasattr(config, "feature_pyramid"):
        if depth < 4:
            raise ValueError(f"A feature pyramid for detection reads four layers, and the model has {depth}.")
        config.feature_pyramid = True
    config.set_output_features_output_indices(
        out_indices=[depth * quarter // 4 for quarter in (1, 2, 3, 4)], out_features=None
    )
    return config


def load_encoder(pretrained: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of any checkpoint of the family as a backbone of this configuration, in float32."""
    # `AutoBackbone.from_pretrained` does not take local folders, but knows the class of a configuration.
    with torch.device("meta"):
        backbone_class = type(AutoBackbone.from_config(config))
    return backbone_class.from_pretrained(pretrained, config=config, dtype=torch.float32)
