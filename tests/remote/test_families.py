"""Every other family as a stranger meets it: a folder, the Auto classes, the pipelines, and no file too many."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

import locatvit_hf
from tests.remote.conftest import LABELS, AskStranger, assert_answer

SMALL = {"num_labels": 3, "id2label": LABELS, "segmentation_hidden_size": 16}
FAMILIES = {
    "locatswin": ("LocAtSwin", {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}),
    "locatjumbo": (
        "LocAtJumbo",
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "pacavit": (
        "PaCaViT",
        {
            "image_size": 64, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2], "num_clusters": [4, 4, 4, 0],
        },
    ),
}  # fmt: skip
SHARED = {
    "configuration_utils_locat.py",
    "image_processing_locatvit.py",
    "layers_locat.py",
    "modeling_utils_locat.py",
}
GAUSSIAN = {"attention_locat.py", "locat.py"}
KERNELS = {"blockwise_locat.py", "triton_locat.py"}
# Swin has a mask in every window, which no kernel takes, and PaCa-ViT has no Gaussian.
CODE = {
    "locatvit": SHARED | GAUSSIAN | KERNELS,
    "locatjumbo": SHARED | GAUSSIAN | KERNELS,
    "locatswin": SHARED | GAUSSIAN,
    "pacavit": SHARED,
}
CHECKS = ["image_processor", "model", "classifier", "segmenter"]
PIPELINES = ["classification_pipeline", "segmentation_pipeline", "features_pipeline"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_works_without_the_package(
    family: str, exported: Path, ask_stranger: AskStranger, tmp_path: Path
) -> None:
    prefix, fields = FAMILIES[family]
    config = getattr(locatvit_hf, f"{prefix}Config")(**SMALL, **fields)
    models = {}
    for name, suffix in (("classifier", "ForImageClassification"), ("segmenter", "ForSemanticSegmentation")):
        model = getattr(locatvit_hf, f"{prefix}{suffix}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # as far from the initial values as training goes
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        models[name] = model
        code = {path.name for path in (tmp_path / name).glob("*.py")}
        assert code == CODE[family] | {f"configuration_{family}.py", f"modeling_{family}.py"}

    image = Image.open(exported / "photo.png")
    crop, whole = (locatvit_hf.LocAtViTImageProcessor.from_pretrained(tmp_path / name) for name in models)
    pixel_values = crop(image, return_tensors="pt").pixel_values
    classifier, segmenter = models["classifier"], models["segmenter"]
    with torch.no_grad():
        logits = classifier(pixel_values).logits
        pooled = classifier.base_model(pixel_values).pooler_output
        scores = segmenter(whole(image, return_tensors="pt").pixel_values).logits
    order = logits[0].argsort(descending=True)[:2].tolist()
    segments = pipeline("image-segmentation", model=segmenter, image_processor=whole)(image)
    expected = {
        "image_processor": pixel_values.flatten()[:100].tolist(),
        "model": pooled.flatten().tolist(),
        "classifier": logits.flatten().tolist(),
        "segmenter": scores.flatten().tolist(),
        "classification_pipeline": [[LABELS[index], logits.softmax(dim=-1)[0, index].item()] for index in order],
        "segmentation_pipeline": sorted(
            [segment["label"], list(segment["mask"].size), segment["mask"].histogram()[255]] for segment in segments
        ),
        "features_pipeline": pooled[0].tolist(),
    }
    answers = ask_stranger(CHECKS + PIPELINES, {name: str(tmp_path / name) for name in models})
    for check in CHECKS + PIPELINES:
        assert_answer(answers, expected, check)
