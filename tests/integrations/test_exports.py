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

import locatvit_hf
from locatvit_hf.locat import LocAtGaussian
from tests.tolerances import assert_same_but_for_rounding

SIZES = ((1, 64, 64), (2, 64, 96), (3, 128, 80), (1, 224, 160))  # batch, height, width
SMALL = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PYRAMID = {"image_size": 64, "depths": [1, 1, 2, 1]}
FAMILIES = {
    "LocAtViTForImageClassification": SMALL,
    "LocAtViTForSemanticSegmentation": {**SMALL, "position_embedding_type": "rope_mixed", "num_register_tokens": 2},
    "LocAtJumboForImageClassification": SMALL,
    "PaCaViTForImageClassification": {**PYRAMID, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
    "LocAtSwinForImageClassification": {**PYRAMID, "embed_dim": 16, "num_heads": [1, 2, 2, 4]},
}
SLOW = [name for name in FAMILIES if name != "LocAtViTForImageClassification"]


def build(name):
    """A model whose Gaussians, logits and everything else are far from zero."""
    torch.manual_seed(0)
    config_class = getattr(locatvit_hf, f"{name.partition('For')[0]}Config")
    options = {"initializer_range": 0.3, "num_labels": 5, **FAMILIES[name]}
    config = config_class.from_preset("tiny", **options) if "depths" in options else config_class(**options)
    model = getattr(locatvit_hf, name)(config).eval()
    for module in model.modules():
        if isinstance(module, LocAtGaussian):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(list(model.parameters())[-2], std=0.3)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "classifier"
    build("LocAtViTForImageClassification").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def load(folder, **options):
    return locatvit_hf.LocAtViTForImageClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
@torch.no_grad()
def test_onnx_runtime_equals_pytorch_at_four_sizes(name, tmp_path):
    model = build(name)
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
    model, path = build("LocAtViTForImageClassification"), tmp_path / "model.onnx"
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(
        model, (torch.randn(2, 3, 64, 64),), path, dynamo=False, dynamic_axes={"pixel_values": [0]}, **names
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = torch.randn(3, 3, 64, 64)
    (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(pixels).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_int8_survives_saving_and_serves_the_pipeline(classifier, picture, tmp_path):
    pixels = torch.randn(2, 3, 64, 64)
    exact = load(classifier)(pixels).logits
    small = load(classifier, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    expected = small(pixels).logits
    assert 0 < (expected - exact).abs().max() < 0.1 * exact.abs().max()
    small.save_pretrained(tmp_path / "int8")
    reloaded = load(tmp_path / "int8")
    assert type(reloaded.locatvit.layers[0].attention.q_proj.weight).__name__ == "Int8Tensor"
    assert_same_but_for_rounding(reloaded(pixels).logits, expected)
    answers = pipeline("image-classification", str(tmp_path / "int8"))(picture, top_k=5)
    processor = locatvit_hf.LocAtViTImageProcessor.from_pretrained(tmp_path / "int8")
    shares = reloaded(**processor(picture, return_tensors="pt")).logits.softmax(dim=-1)[0]
    assert [answer["score"] for answer in answers] == pytest.approx(
        shares.sort(descending=True).values.tolist(), abs=1e-6
    )


def test_lora_survives_saving_merging_and_serves_the_pipeline(classifier, picture, tmp_path):
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
    assert len(pipeline("image-classification", str(tmp_path / "merged"))(picture, top_k=5)) == 5


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_equals_pytorch(tmp_path):
    model, pixels = build("LocAtViTForImageClassification"), torch.randn(2, 3, 64, 64)
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


def test_pipeline_in_batches_and_on_any_device(classifier, picture):
    spread = pipeline("image-classification", str(classifier), device_map="auto")
    one_by_one, batched = spread([picture] * 5), spread([picture] * 5, batch_size=4)
    for alone, together in zip(one_by_one, batched, strict=True):
        assert [a["label"] for a in alone] == [b["label"] for b in together]
        assert [a["score"] for a in alone] == pytest.approx([b["score"] for b in together], abs=1e-5)
