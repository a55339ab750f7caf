"""Every stored value of the official code for LocAt-Swin and LocAt-Jumbo."""

import pytest
import torch

from locatvit_hf.locat import refine
from tests import golden

TOLERANCE = 1e-5


@pytest.fixture(params=golden.OTHER_CHECKPOINTS)
def case(request):
    return golden.load_case(request.param)


def build(case, implementation):
    config = case.config
    config.drop_path_rate = 0.0
    model = case.converter.classifier._from_config(config, attn_implementation=implementation).eval()
    golden.load_weights(model, case.converter.key_table(case.config), case.converter.prepare_state(case.state))
    return model


def feature_maps(hidden_states, config, image_size):
    """Each layer's (Swin: stage's) output before the norm as (batch, channels, height, width), prefix dropped."""
    grid = [-(-side // patch) for side, patch in zip(image_size, config.patch_shape, strict=True)]
    for index, tokens in enumerate(hidden_states[1:]):
        if config.model_type == "locatswin" and index > 0:
            grid = [-(-side // 2) for side in grid]
        patches = tokens[:, getattr(config, "num_jumbo_tokens", 0) :]
        yield patches.transpose(1, 2).reshape(len(patches), -1, *grid)


def first_attention(encoder):
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.stages[0].layers
    return layers[0].attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_small_models_in_float32(case, implementation):
    model = build(case, implementation)
    gaussians = []
    first_attention(model.base_model).gaussian.register_forward_hook(lambda *hook: gaussians.append(hook[-1]))
    for index in range(case.num_inputs):
        with torch.no_grad():
            outputs = model.base_model(case.input(index), output_hidden_states=True)
            logits = model(case.input(index)).logits
        heads = case.config.num_attention_heads
        refined = refine(outputs.last_hidden_state, heads if isinstance(heads, int) else heads[-1])
        if case.name == "locatswin":
            pooled = refined.mean(dim=1)
            grid = [side // stride for side, stride in zip((64, 64), case.config.output_stride, strict=True)]
            tokens, refined = (tensor.unflatten(1, grid) for tensor in (outputs.last_hidden_state, refined))
        else:
            pooled, tokens = refined[:, : case.config.num_jumbo_tokens].flatten(1), outputs.last_hidden_state
        torch.testing.assert_close(outputs.pooler_output, pooled)
        computed = {"logits": logits, "tokens": tokens, "tokens_prr": refined, "bias.first": gaussians[-1].bias()}
        image_size = case.input(index).shape[-2:]
        for layer, feature_map in enumerate(feature_maps(outputs.hidden_states, case.config, image_size)):
            computed[f"features.{layer}"] = feature_map
        assert {f"{index}.{name}" for name in computed} == {
            name for name in case.tensors if name.startswith(f"{index}.") and not name.endswith(".input")
        }
        for name, tensor in computed.items():
            assert case.error(f"{index}.{name}", tensor) < TOLERANCE, (index, name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_in_training_mode(case, implementation):
    model = build(case, implementation).train()
    logits = model(case.input(0)).logits
    assert case.error("train.logits", logits) < TOLERANCE
    (logits * case.tensors["train.weight"]).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = case.converter.key_table(case.config)
    assert sorted(name for names in table.values() for name in names) == sorted(ours)
    for source, names in table.items():
        # The reference names the gradient of the shared MLP after the first of its 13 aliases.
        stored = f"blocks.0.{source}" if source.startswith("jumbo_mlp") else source
        gradient = torch.cat([ours[name] for name in names])
        assert case.gradient_error(stored, gradient) < 1e-4, source


@pytest.mark.parametrize("case", golden.load_models(("locatswin", "locatjumbo")), ids=lambda case: case["model"])
def test_whole_models_in_float64(case):
    converter = golden.converter_of(case["model"])
    config = converter.build_config(case["model"], case["kwargs"])
    with torch.device("meta"):
        model = converter.classifier(config)
    model = model.to_empty(device="cpu").double().eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    table = converter.key_table(config)
    golden.load_weights(model, table, golden.rule_weights(table, shapes))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]

    with torch.no_grad():
        outputs = model(golden.model_input(case["input"]), output_hidden_states=True)
    *_, features = feature_maps(outputs.hidden_states, config, case["input"][2:])
    assert list(features.shape) == case["feat_shape"]
    for stored, computed in (
        (case["logits_0"], outputs.logits[0, : len(case["logits_0"])]),
        (case["logits_1"], outputs.logits[1, : len(case["logits_1"])]),
        (case["logits_sum"], outputs.logits.sum()),
        (case["logits_absmean"], outputs.logits.abs().mean()),
        (case["feat_0_0_0"], features[0, : len(case["feat_0_0_0"]), 0, 0]),
        (case["feat_absmean"], features.abs().mean()),
    ):
        torch.testing.assert_close(computed, torch.tensor(stored, dtype=torch.float64), rtol=0, atol=1e-8)
