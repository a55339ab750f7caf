"""One bench for every architecture: sizes, channels, saving, pipelines, compilers, losses, frameworks, bad input.

A new architecture is a row in `ARCHITECTURES`. What only one family has is tested in a file of its own, stored logits
in `test_golden*.py`, and remote code in `tests/remote`.
"""

import copy
import inspect
import json
import warnings

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from torch import nn

import locatvit_hf
from locatvit_hf import LocAtViTImageProcessor
from tests.tolerances import assert_same_but_for_rounding

SWIN = {"image_size": 64, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 3}
JUMBO = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
JUMBO |= {"num_jumbo_tokens": 3, "layer_scale_init_value": 0.1}
PACA = {"image_size": 64, "hidden_sizes": [16, 24, 40, 48], "depths": [2, 1, 1, 1], "num_attention_heads": [1, 2, 2, 3]}
PACA |= {"num_clusters": [5, 7, 6, 0], "segmentation_hidden_size": 16, "segmentation_dropout_prob": 0.0}
TEACHER = {"clustering_type": "teacher", "num_clusters": [5, 7, 6, 9], "teacher_depths": [1, 1, 1, 1]}
PLAIN = {"use_gaussian": False, "use_refinement": False}
# Prefix of the class names, and fields of a small configuration.
ARCHITECTURES = {
    "locatvit": (
        "LocAtViT",
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    "locatswin": ("LocAtSwin", SWIN),
    "swin": ("LocAtSwin", SWIN | PLAIN),
    "locatswin_rectangular": ("LocAtSwin", SWIN | {"image_size": [48, 64], "window_size": [2, 3]}),
    "locatjumbo": ("LocAtJumbo", JUMBO),
    "jumbo": ("LocAtJumbo", JUMBO | PLAIN),
    "locatjumbo_coarse": ("LocAtJumbo", JUMBO | {"coarse_training": True}),
    "pacavit": ("PaCaViT", PACA),
    "pacavit_teacher": ("PaCaViT", PACA | TEACHER),
}
HIERARCHICAL = ("locatswin", "pacavit")
SIZES = [(64, 64), (40, 72), (33, 70), (5, 3)]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def build(architecture, task="ForImageClassification", implementation=None, **overrides):
    """A small model in evaluation mode with trained-like weights: nothing is zero, no Gaussian is at its start."""
    prefix, fields = ARCHITECTURES[architecture]
    config_class = getattr(locatvit_hf, f"{prefix}Config")
    config = config_class(**{"num_labels": 5, "drop_path_rate": 0.0, **fields, **overrides})
    torch.manual_seed(0)
    model = getattr(locatvit_hf, f"{prefix}{task}")._from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5 if "gaussian" in name else 0.1)
    return model.eval()


def with_implementation(model, implementation):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(implementation)
    return twin


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_backends_agree_in_values_and_gradients(architecture, implementation):
    reference = build(architecture, implementation="sdpa").double()
    if reference.config.model_type == "pacavit" and implementation == "flex_attention":
        return  # that of transformers, which compiles for minutes and has no backward on CPU: see test_pacavit.py
    other = with_implementation(reference, implementation)
    pixel_values = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(pixel_values).logits, reference(pixel_values).logits, rtol=1e-9, atol=1e-9)
    for model in (reference, other):
        model.train()(pixel_values, labels=torch.tensor([0, 3])).loss.backward()
    for (name, parameter), twin in zip(reference.named_parameters(), other.named_parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(twin[1].grad, parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(architecture, size):
    model = build(architecture)
    pixel_values = torch.randn(2, 3, *size)
    patch_height, patch_width = model.config.patch_shape
    padded = nn.functional.pad(pixel_values, (0, -size[1] % patch_width, 0, -size[0] % patch_height))
    with torch.no_grad():
        logits = model(pixel_values).logits
        if model.config.model_type != "pacavit":  # whose convolutions pad each map by themselves
            torch.testing.assert_close(logits, model(padded).logits)
        one_by_one = torch.cat([model(image[None]).logits for image in pixel_values])
    assert_same_but_for_rounding(logits, one_by_one)


@pytest.mark.parametrize("family", ["locatvit", "locatswin"])  # those that use their grid each in a way of its own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_torchscript_trace_serves_sizes_and_orientations_that_it_has_not_seen(family):
    """While torch.jit.trace records, every size is a tensor; OpenVINO and Core ML convert what it records."""
    model = build(family)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        traced = torch.jit.trace(model, torch.randn(2, 3, 32, 48), strict=False, check_trace=False)
        for shape in ((2, 3, 32, 48), (1, 3, 64, 32)):
            pixel_values = torch.randn(shape)
            torch.testing.assert_close(traced(pixel_values)["logits"], model(pixel_values).logits, rtol=1e-4, atol=1e-5)


def test_one_channel(architecture):
    model = build(architecture, num_channels=1)
    assert model(torch.randn(1, 1, 32, 32)).logits.shape == (1, 5)
    processor = LocAtViTImageProcessor.from_model_config(model.config)
    inputs = processor(torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8), return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 5)


@pytest.mark.parametrize("task", ["Model", "ForImageClassification", "ForSemanticSegmentation", "Backbone"])
def test_saving_and_loading(architecture, task, tmp_path):
    model = build(architecture, task)
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"Auto{'Model' if task.startswith('For') else ''}{task}")
    loaded = auto_class if task != "Backbone" else type(model)  # AutoBackbone asks the Hub about local folders
    loaded = loaded.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    pixel_values = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        for ours, theirs in zip(model(pixel_values).to_tuple(), loaded(pixel_values).to_tuple(), strict=True):
            assert_same_but_for_rounding(theirs, ours)
    files = {file.name for file in tmp_path.iterdir()}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert len(auto_map) == 5
    assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} < files
    assert "preprocessor_config.json" in files


def test_pipelines(architecture):
    """From a picture to answers, prepared by the processor of the configuration."""
    picture = Image.effect_noise((60, 40), 64).convert("RGB")
    model = build(architecture)
    processor = LocAtViTImageProcessor.from_model_config(model.config)
    with torch.no_grad():
        outputs = model.base_model(processor(picture, return_tensors="pt").pixel_values)
        scores = model.classifier(outputs.pooler_output)[0].softmax(dim=-1)
    answers = transformers.pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=5)
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        {label: scores[index].item() for index, label in model.config.id2label.items()}, abs=1e-5
    )
    extract = transformers.pipeline("image-feature-extraction", model=model.base_model, image_processor=processor)
    assert_same_but_for_rounding(torch.tensor(extract(picture, pool=True)), outputs.pooler_output)

    model = build(architecture, "ForSemanticSegmentation")
    processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
    segments = transformers.pipeline("image-segmentation", model=model, image_processor=processor)(picture)
    assert all(segment["mask"].size == picture.size for segment in segments)
    assert sum(segment["mask"].histogram()[255] for segment in segments) == 60 * 40


def test_outputs_are_taken_where_the_documentation_says(architecture):
    model = build(architecture)
    body, config = model.base_model, model.config
    pixel_values = torch.randn(2, 3, 64, 40)
    with torch.no_grad():
        outputs = body(pixel_values, output_hidden_states=True)
        torch.testing.assert_close(model.classifier(outputs.pooler_output), model(pixel_values).logits)
        if config.model_type != "pacavit":
            torch.testing.assert_close(body.pool(outputs.last_hidden_state), outputs.pooler_output)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    if config.model_type == "pacavit":  # whose maps are normalised in the trunk
        torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
        torch.testing.assert_close(outputs.last_hidden_state.mean(dim=(2, 3)), outputs.pooler_output)
    elif config.model_type != "locatjumbo":  # whose jumbo tokens are normalised as one
        torch.testing.assert_close(body.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)


def test_attention_maps_are_distributions_and_include_the_gaussian(architecture):
    model = build(architecture, implementation="eager")
    pixel_values = torch.randn(1, 3, 64, 40)
    with torch.no_grad():
        maps = model(pixel_values, output_attentions=True).attentions
        for attention in maps:
            torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
        modules = [module for module in model.modules() if hasattr(module, "o_proj")]
        assert len(maps) == len(modules)
        seen = {}
        if getattr(model.config, "use_gaussian", False):
            hook = modules[0].gaussian.register_forward_hook(lambda *hooked: seen.update(gaussian=hooked[-1]))
            model(pixel_values)
            hook.remove()
            modules[0].gaussian = None
            without = model(pixel_values, output_attentions=True).attentions[0]
            expected = (without.log() + seen["gaussian"].bias()).softmax(dim=-1)
            torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-5)


class TestSegmentation:
    @pytest.mark.parametrize("size", SIZES)
    def test_logits_cover_the_padded_image_and_the_loss_cuts_it_off(self, architecture, size):
        model = build(architecture, "ForSemanticSegmentation")
        stride = model.config.output_stride
        pixel_values, labels = torch.randn(2, 3, *size), torch.randint(0, 5, (2, *size))
        labels[:, : size[0] // 2] = 255
        outputs = model(pixel_values, labels=labels, output_hidden_states=True)
        grid = [-(-side // cell) for side, cell in zip(size, stride, strict=True)]
        assert outputs.logits.shape == (2, 5, *grid)
        weighted = {1.0: outputs.logits}
        if model.config.model_type == "pacavit":  # whose head reads every stage and has a second loss
            logits, weighted[0.4] = model.segmentation_head(outputs.hidden_states[1:])
            assert_same_but_for_rounding(weighted[0.4], outputs.auxiliary_logits)
        else:
            last = outputs.hidden_states[-1]
            features = last[:, last.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
            logits = model.segmentation_head(features)
        assert_same_but_for_rounding(logits, outputs.logits)
        padded = [cells * cell for cells, cell in zip(grid, stride, strict=True)]
        expected = 0.0
        for weight, scores in weighted.items():
            full = nn.functional.interpolate(scores, size=padded, mode="bilinear")[..., : size[0], : size[1]]
            expected += weight * nn.functional.cross_entropy(full, labels, ignore_index=255)
        torch.testing.assert_close(outputs.loss, expected)
        assert model(pixel_values, labels=torch.full_like(labels, 255)).loss == 0

    def test_every_trained_parameter_gets_a_gradient(self, architecture):
        for task, labels in (
            ("ForSemanticSegmentation", torch.zeros(2, 64, 64).long()),
            ("ForImageClassification", torch.tensor([0, 1])),
        ):
            model = build(architecture, task).train()
            model(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
            assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]

    def test_frozen_backbone_stays_in_evaluation_mode(self, architecture):
        model = build(architecture, "ForSemanticSegmentation", drop_path_rate=0.5, hidden_dropout_prob=0.5)
        model.freeze_backbone()
        model.train()
        before = copy.deepcopy(model.base_model.state_dict())
        pixel_values = torch.randn(2, 3, 32, 32)
        outputs = model(pixel_values, labels=torch.zeros(2, 32, 32).long())
        torch.testing.assert_close(model(pixel_values).logits, outputs.logits)
        outputs.loss.backward()
        assert all(parameter.grad is None for parameter in model.base_model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
        assert model.segmentation_head.training and not model.base_model.training

    @pytest.mark.parametrize("size", [(360, 480), (100, 205)])
    def test_masks_land_where_things_are(self, architecture, size):
        """The processor's sizes are whole cells, and a map of the right class at one cell comes back at its place."""
        model = build(architecture, "ForSemanticSegmentation")
        processor = LocAtViTImageProcessor.from_model_config(model.config, segmentation=True)
        inputs = processor(torch.zeros(3, *size, dtype=torch.uint8), return_tensors="pt")
        stride = model.config.output_stride
        height, width = inputs["pixel_values"].shape[-2:]
        assert height % stride[0] == 0 and width % stride[1] == 0
        with torch.no_grad():
            outputs = model(**inputs)
        outputs.logits.zero_()
        rows, columns = outputs.logits.shape[-2:]
        outputs.logits[0, 1, rows // 2, columns // 2] = 10.0
        mask = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
        where = mask.nonzero().float().mean(dim=0)
        expected = [(rows // 2 + 0.5) * size[0] / rows, (columns // 2 + 0.5) * size[1] / columns]
        assert abs(where[0] - expected[0]) < 1.5 and abs(where[1] - expected[1]) < 1.5


class TestBackbone:
    @pytest.mark.parametrize("apply_layernorm", [True, False])
    def test_maps_have_their_channels_and_strides(self, architecture, apply_layernorm):
        backbone = build(architecture, "Backbone", out_indices=[1, 2, 3], apply_layernorm=apply_layernorm)
        with torch.no_grad():
            outputs = backbone(torch.randn(2, 3, 64, 40), output_hidden_states=True)
        config = backbone.config
        merges = range(3) if config.model_type in HIERARCHICAL else (0, 0, 0)
        strides = [[patch * 2**merge for patch in config.patch_shape] for merge in merges]
        assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [
            (2, channels, -(-64 // stride[0]), -(-40 // stride[1]))
            for channels, stride in zip(backbone.channels, strides, strict=True)
        ]
        if config.model_type == "pacavit":
            assert all(map(torch.equal, outputs.feature_maps, outputs.hidden_states[1:]))
            return
        if not apply_layernorm:
            for feature_map, tokens in zip(outputs.feature_maps, outputs.hidden_states[1:], strict=True):
                flat = feature_map.flatten(2).transpose(1, 2)
                torch.testing.assert_close(flat, tokens[:, tokens.shape[1] - flat.shape[1] :])
        backbone = build(architecture, "Backbone", out_indices=[1, 2, 3], reshape_hidden_states=False)
        assert all(feature_map.ndim == 3 for feature_map in backbone(torch.randn(2, 3, 64, 40)).feature_maps)

    @pytest.mark.parametrize("framework", ["upernet", "mask2former"])
    def test_dense_prediction_frameworks_train_on_it(self, architecture, framework):
        fields = {"num_hidden_layers": 4, "patch_size": 16, "feature_pyramid": True}
        if architecture.startswith("pacavit"):
            fields = {"out_indices": [1, 2, 3, 4]}
        elif "swin" in architecture:
            fields = {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "out_indices": [1, 2, 3, 4]}
        backbone = build(architecture, "Backbone", **fields)
        config, channels = backbone.config, backbone.channels[2]
        pixel_values = torch.randn(2, 3, 64, 64)
        if framework == "upernet":
            framework_config = transformers.UperNetConfig(
                backbone_config=config, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=channels,
                auxiliary_channels=8, num_labels=5,
            )  # fmt: skip
            model = transformers.UperNetForSemanticSegmentation(framework_config)
            loss = model(pixel_values, labels=torch.zeros(2, 64, 64).long()).loss
        else:
            framework_config = transformers.Mask2FormerConfig(
                backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
                encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
                num_attention_heads=2, num_labels=5, train_num_points=16,
            )  # fmt: skip
            model = transformers.Mask2FormerForUniversalSegmentation(framework_config)
            loss = model(
                pixel_values, mask_labels=[torch.ones(1, 64, 64)] * 2, class_labels=[torch.tensor([1])] * 2
            ).loss
        loss.mean().backward()
        assert loss.isfinite().all()
        backbone = next(module for module in model.modules() if type(module).__name__.endswith("Backbone"))
        assert not [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


class TestCompilers:
    def test_one_graph_in_training_and_inference(self, architecture):
        torch.compiler.reset()  # other architectures were compiled from the same functions
        model = build(architecture).double()
        twin = copy.deepcopy(model)
        pixel_values, labels = torch.randn(2, 3, 64, 40, dtype=torch.float64), torch.tensor([0, 4])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixel_values).logits, twin(pixel_values).logits)
        model.train(), twin.train()
        compiled(pixel_values, labels=labels).loss.backward()
        twin(pixel_values, labels=labels).loss.backward()
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected.grad)

    def test_one_exported_graph_serves_every_size(self, architecture):
        model = build(architecture)
        if model.config.model_type == "locatswin":
            # How often a window fits is part of the graph: torch guards the size, so there is one graph a size.
            pixel_values = torch.randn(2, 3, 40, 56)
            program = torch.export.export(model, (pixel_values,), strict=False)
            assert_same_but_for_rounding(program.module()(pixel_values).logits, model(pixel_values).logits)
            return
        dynamic = torch.export.Dim.DYNAMIC
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.randn(2, 3, 40, 56),),
                dynamic_shapes={"pixel_values": {2: dynamic, 3: dynamic}},
                strict=False,
            )
            # PaCa-ViT merges patches to 32 pixels; torch.export specialises a side of one patch.
            for size in [(40, 56), (64, 64), (48, 40), (128, 128), (33, 70)]:
                pixel_values = torch.randn(2, 3, *size)
                assert_same_but_for_rounding(program.module()(pixel_values).logits, model(pixel_values).logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_finite(self, architecture, dtype):
        model = build(architecture)
        expected = model(pixel_values := torch.randn(1, 3, 64, 96)).logits
        model = model.to(dtype)
        outputs = model(pixel_values.to(dtype), labels=torch.tensor([1]))
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        torch.testing.assert_close(outputs.logits.float(), expected, rtol=0.1, atol=0.1)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, architecture, use_reentrant):
        model = build(architecture).double().train()
        pixel_values, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4])
        model(pixel_values, labels=labels).loss.backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch notes that no input requires a gradient
            model(pixel_values.requires_grad_(), labels=labels).loss.backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, gradient)


def test_layer_decay_reaches_every_parameter_once(architecture):
    from timm.optim import param_groups_layer_decay

    model = build(architecture)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == trained
    assert found["classifier.weight"] == (1.0, 0.05)
    for name, (scale, decay) in found.items():
        table = name.endswith(("relative_position_bias_table", "position_embeddings", "cls_token", "jumbo_tokens"))
        assert (decay == 0.0) == (table or name.endswith(("bias", "scale")) or "norm" in name)
        if "embeddings." in name:
            assert scale == min(scale for scale, _ in found.values())
        if "jumbo_mlp" in name or "layernorm" in name:  # with the last layer
            assert scale == 0.5


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("locatvit", {"out_indices": []}, "out_indices is empty: name at least one stage, from stem to stage3"),
        ("locatswin", {"out_features": []}, "out_features is empty"),
        ("locatswin", {"num_heads": [1, 2]}, r"num_heads=\[1, 2\] must hold one entry for each stage"),
        ("locatswin", {"num_heads": [3, 2, 4]}, "16 channels cannot be divided among num_heads=3"),
        ("locatswin", {"depths": [2, 0, 2]}, "depths must be at least 1"),
        ("locatswin", {"window_size": 0}, "window_size must be at least 1 patch on each side"),
        ("locatswin", {"image_size": 12}, "image_size=12 is smaller than one patch of the last map, 16 x 16 pixels"),
        ("locatswin", {"mlp_ratio": 0.0}, "leaves the MLP without channels"),
        ("locatswin", {"embed_dim": -4}, "embed_dim must be at least 1"),
        ("locatswin", {"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
        ("locatjumbo", {"num_jumbo_tokens": 0}, "num_jumbo_tokens must be at least 1"),
        ("locatjumbo", {"hidden_size": 33}, "hidden_size=33 must be divisible by num_attention_heads=2"),
        ("locatjumbo", {"image_size": 4}, "smaller than one patch"),
        ("locatjumbo", {"feature_pyramid": True, "out_indices": [1, 2]}, "feature_pyramid=True needs four"),
        ("pacavit", {"depths": [2, 2, 2]}, "must have 3 entries"),
        ("pacavit", {"depths": []}, "depths must be at least 1"),
        ("pacavit", {"depths": [2, 0, 2, 2]}, "depths must be at least 1"),
        ("pacavit", {"hidden_sizes": [96, 192, 320, 380]}, "must be divisible by num_attention_heads"),
        ("pacavit", {"hidden_sizes": [95, 192, 320, 384], "num_attention_heads": [1, 4, 8, 16]}, "even number"),
        ("pacavit", {"num_clusters": [100, -1, 100, 0]}, "num_clusters must hold numbers of at least 0"),
        ("pacavit", {"clustering_type": "kmeans"}, "clustering_type must be one of"),
        ("pacavit", {"clusterless_attention": "linear"}, "clusterless_attention must be one of"),
        ("pacavit", {"segmentation_head_type": "upernet"}, "segmentation_head_type must be one of"),
        ("pacavit", {"clustering_type": "teacher", "blockwise_clustering": True}, "blockwise_clustering=False"),
        ("pacavit", {"clustering_type": "teacher", "num_clusters": [0, 0, 0, 0]}, "num_clusters above zero"),
        ("pacavit", {"segmentation_dropout_prob": 1.0}, "segmentation_dropout_prob must be at least 0 and below 1"),
        ("pacavit", {"drop_path_rate": -0.1}, "drop_path_rate must be at least 0"),
        ("pacavit", {"image_size": 0}, "image_size must be at least 1"),
        ("pacavit", {"num_channels": 0}, "num_channels must be at least 1"),
    ],
)
def test_bad_configurations_are_one_sentence(architecture, overrides, message):
    prefix, fields = ARCHITECTURES[architecture]
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        getattr(locatvit_hf, f"{prefix}Config")(**{**fields, **overrides})


def test_bad_images_are_one_sentence(architecture):
    for shape, message in (((1, 3, 0, 8), "holds no pixels"), ((1, 1, 32, 32), r"\(batch, 3, height, width\)")):
        with pytest.raises(ValueError, match=message):
            build(architecture)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("prefix", "sizes"),
    [
        ("LocAtSwin", {"tiny": (28_289_542, 28_288_354), "base": (87_770_600, 87_768_224)}),
        ("LocAtJumbo", {"tiny": (17_351_500, 17_348_776), "base": (260_498_956, 260_495_080)}),
    ],
)
def test_presets_have_the_papers_parameter_counts(prefix, sizes):
    config_class = getattr(locatvit_hf, f"{prefix}Config")
    for name, counts in sizes.items():
        for fields, expected in zip(({}, PLAIN), counts, strict=True):
            with torch.device("meta"):
                model = getattr(locatvit_hf, f"{prefix}ForImageClassification")(
                    config_class.from_preset(name, num_labels=1000, **fields)
                )
            assert sum(parameter.numel() for parameter in model.parameters()) == expected
    with pytest.raises(ValueError, match="no preset 'huge'"):
        config_class.from_preset("huge")


@pytest.mark.parametrize("architecture", ["locatswin", "pacavit"])
def test_attention_inside_windows_or_to_clusters_takes_no_mask(architecture):
    model, pixel_values = build(architecture), torch.zeros(1, 3, 32, 32)
    assert "attention_mask" not in inspect.signature(model.forward).parameters
    model(pixel_values, attention_mask=None)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(pixel_values, attention_mask=torch.ones(1, 64))


def test_swin_decides_windows_and_shifts_once_at_its_native_size():
    config = locatvit_hf.LocAtSwinConfig.from_preset("tiny")
    assert config.windows == [((7, 7), (3, 3))] * 3 + [((7, 7), (0, 0))]
    config = locatvit_hf.LocAtSwinConfig.from_preset("tiny", image_size=[224, 384])
    assert config.windows[-1] == ((7, 7), (0, 3))
    config = locatvit_hf.LocAtSwinConfig.from_preset("tiny", image_size=128)
    assert config.windows[-2:] == [((7, 7), (3, 3)), ((4, 4), (0, 0))]


@pytest.mark.parametrize("num_labels", [1, 2, 7, 100, 1000, 10450])
def test_jumbo_classifier_starts_from_the_prior_of_its_class_count(num_labels):
    config = locatvit_hf.LocAtJumboConfig(**JUMBO, num_labels=num_labels)
    model = locatvit_hf.LocAtJumboForImageClassification(config)
    assert model.classifier.weight.eq(0).all()
    logit = model(torch.randn(1, 3, 32, 32)).logits[0, 0].item()
    rounded = {1: 0.0, 2: 0.0, 100: -4.6, 1000: -6.9, 10450: -9.25}  # the reference writes the last three out
    assert logit == pytest.approx(rounded.get(num_labels, -1.7917595), abs=0.01)


def test_initial_weights_follow_the_reference():
    jumbo = locatvit_hf.LocAtJumboModel(
        locatvit_hf.LocAtJumboConfig(image_size=64, hidden_size=192, num_hidden_layers=2)
    )
    assert 5e-7 < jumbo.embeddings.jumbo_tokens.std().item() < 2e-6
    assert jumbo.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert jumbo.layers[0].layer_scale3.scale.eq(1e-4).all()
    swin = locatvit_hf.LocAtSwinModel(locatvit_hf.LocAtSwinConfig(depths=[1, 1], num_heads=[3, 6]))
    table = swin.stages[0].layers[0].attention.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.15)
    assert swin.stages[1].downsample.reduction.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_backbone_of_no_stage_is_refused_later_too(architecture):
    config = build(architecture, "Backbone").config
    for name in ("out_indices", "out_features"):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            setattr(config, name, [])
    assert config.out_features == config.stage_names[-1:]
