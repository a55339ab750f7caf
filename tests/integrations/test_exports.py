"""Exported, quantised and adapted models answer as the model they come from."""

import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig, pipeline
from transformers.exporters import OnnxConfig, OnnxExporter

from locatvit_hf import LocAtViTForImageClassification, LocAtViTImageProcessor
from tests.factories import tiny_model
from tests.tolerances import assert_same_but_for_rounding

SIZES = ((1, 64, 64), (2, 64, 96), (3, 128, 80), (1, 224, 160))  # batch, height, width
SHALLOW = {"num_hidden_layers": 1}
PYRAMID = {"depths": [1, 1, 2, 1]}
# The first one stands for all that are converted in the same way.
MODELS = [
    ("locatvit", "ForImageClassification", SHALLOW),
    (
        "locatvit",
        "ForSemanticSegmentation",
        {**SHALLOW, "position_embedding_type": "rope_mixed", "num_register_tokens": 2},
    ),
    ("locatjumbo", "ForImageClassification", SHALLOW),
    ("pacavit", "ForImageClassification", PYRAMID),
    ("locatswin", "ForImageClassification", {**PYRAMID, "num_heads": [1, 2, 2, 4], "window_size": 7}),
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "classifier"
    tiny_model("locatvit", image_size=64, patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def load(folder, **options):
    return LocAtViTForImageClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(
    ("family", "task", "fields"), [MODELS[0], *(pytest.param(*model, marks=pytest.mark.slow) for model in MODELS[1:])]
)
@torch.no_grad()
def test_onnx_runtime_equals_pytorch_at_four_sizes(family, task, fields, tmp_path):
    model = tiny_model(family, task, **fields)
    exported = OnnxExporter().export(
        model, {"pixel_values": torch.randn(2, 3, 64, 96)}, config=OnnxConfig(dynamic=True)
    )
    exported.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in SIZES:
        pixels = torch.randn(size[0], 3, *size[1:])
        expected = model(pixel_values=pixels).logits
        (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
        assert expected.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_the_older_onnx_exporter_gives_a_graph_for_one_image_size(tmp_path):
    """`dynamo=False` traces: it is what tools that convert models by themselves still call."""
    model, path = tiny_model("locatvit", image_size=64, patch_size=16, **SHALLOW), tmp_path / "model.onnx"
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(
        model, (torch.randn(2, 3, 64, 64),), path, dynamo=False, dynamic_axes={"pixel_values": [0]}, **names
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.randn(3, 3, 64, 64)
    (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pixels).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_int8_survives_saving_and_serves_the_pipeline(classifier, image, tmp_path):
    pixels = torch.randn(2, 3, 64, 64)
    exact = load(classifier)(pixels).logits
    small = load(classifier, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    expected = small(pixels).logits
    assert 0 < (expected - exact).abs().max() < 0.1 * exact.abs().max()
    small.save_pretrained(tmp_path / "int8")
    reloaded = load(tmp_path / "int8")
    assert type(reloaded.locatvit.layers[0].attention.q_proj.weight).__name__ == "Int8Tensor"
    assert_same_but_for_rounding(reloaded(pixels).logits, expected)
    answers = pipeline("image-classification", str(tmp_path / "int8"))(image, top_k=5)
    processor = LocAtViTImageProcessor.from_pretrained(tmp_path / "int8")
    scores = reloaded(**processor(image, return_tensors="pt")).logits.softmax(dim=-1)[0]
    assert [answer["score"] for answer in answers] == pytest.approx(
        scores.sort(descending=True).values.tolist(), abs=1e-6
    )


def test_lora_survives_saving_merging_and_serves_the_pipeline(classifier, image, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False)
    tuned = get_peft_model(load(classifier), lora)
    pixels = torch.randn(2, 3, 64, 64)
    tuned(pixel_values=pixels, labels=torch.tensor([0, 1])).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1).step()
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = tuned.eval()(pixel_values=pixels).logits
        assert (expected - load(classifier)(pixels).logits).abs().max() > 1e-2
        merged = PeftModel.from_pretrained(load(classifier), tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(pixels).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(pipeline("image-classification", str(tmp_path / "merged"))(image, top_k=5)) == 5


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_equals_pytorch(tmp_path):
    model, pixels = tiny_model("locatvit", image_size=64, patch_size=16, **SHALLOW), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (), {"pixel_values": pixels})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "classifier.pt2"))
    logits = torch._inductor.aoti_load_package(package)(pixel_values=pixels)["logits"]
    torch.testing.assert_close(logits, model(pixels).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_layers_on_disk_answer_the_same(classifier, tmp_path):
    pixels = torch.randn(2, 3, 64, 64)
    parts = {"locatvit.embeddings": "cpu", "locatvit.layers": "disk", "locatvit.layernorm": "cpu", "classifier": "cpu"}
    offloaded = load(classifier, device_map=parts, offload_folder=tmp_path / "offloaded")
    assert offloaded.locatvit.layers[0].attention.q_proj.weight.device.type == "meta"
    assert_same_but_for_rounding(offloaded(pixels).logits, load(classifier)(pixels).logits)


def test_pipeline_in_batches_and_on_any_device(classifier, image):
    spread = pipeline("image-classification", str(classifier), device_map="auto")
    one_by_one, batched = spread([image] * 5), spread([image] * 5, batch_size=4)
    for alone, together in zip(one_by_one, batched, strict=True):
        assert [a["label"] for a in alone] == [b["label"] for b in together]
        assert [a["score"] for a in alone] == pytest.approx([b["score"] for b in together], abs=1e-5)
