"""Every stored value of the official code: the ViT, RegViT, RoPE-ViT, no-position and mean-pooling models."""

import pytest
import torch

from locatvit_hf import LocAtViTForImageClassification
from locatvit_hf.conversion import locatvit
from locatvit_hf.locat import LocAtGaussian, refine
from tests import golden

TOLERANCE = 1e-5


@pytest.fixture(params=golden.VIT_CHECKPOINTS)
def case(request):
    return golden.load_case(request.param)


def build(case, implementation):
    model = LocAtViTForImageClassification._from_config(case.config, attn_implementation=implementation).eval()
    golden.load_weights(model, locatvit.key_table(case.config), case.state)
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_small_models_in_float32(case, implementation):
    model = build(case, implementation)
    gaussians = []
    if case.config.use_gaussian:
        module = model.locatvit.layers[0].attention.gaussian
        module.register_forward_hook(lambda module, inputs, gaussian: gaussians.append(gaussian))
    for index in range(case.num_inputs):
        with torch.no_grad():
            outputs = model.locatvit(case.input(index), output_hidden_states=True)
            refined = refine(outputs.last_hidden_state, case.config.num_attention_heads)
            logits = model(case.input(index)).logits
        computed = {"logits": logits, "tokens": outputs.last_hidden_state}
        if case.config.use_refinement:
            computed["tokens_prr"] = refined
            torch.testing.assert_close(outputs.pooler_output, refined[:, 0])
        for layer, hidden_states in enumerate(outputs.hidden_states[1:]):
            patches = hidden_states[:, case.config.num_prefix_tokens :].transpose(1, 2)
            computed[f"features.{layer}"] = patches.reshape(*patches.shape[:2], *feature_grid(case, index))
        if gaussians:
            bias = gaussians[-1].bias()
            computed["bias.first"] = bias if bias.shape[-1] < 300 else bias[:, :, :: case.bias_row_stride]
        for name, tensor in computed.items():
            assert case.error(f"{index}.{name}", tensor) < TOLERANCE, (index, name)
    assert bool(gaussians) == case.config.use_gaussian


def feature_grid(case, index):
    (patch_height, patch_width), (height, width) = case.config.patch_shape, case.input(index).shape[-2:]
    return -(-height // patch_height), -(-width // patch_width)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_in_training_mode(case, implementation):
    model = build(case, implementation).train()
    logits = model(case.input(0)).logits
    assert case.error("train.logits", logits) < TOLERANCE
    (logits * case.tensors["train.weight"]).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = locatvit.key_table(case.config)
    assert sorted(name for names in table.values() for name in names) == sorted(ours)
    for source, names in table.items():
        gradient = torch.cat([ours[name] for name in names])
        assert case.gradient_error(source, gradient) < 1e-4, source


def case_id(case):
    return case["tag"] if "tag" in case else f"{case['model']}-{case['kwargs']}-{case['input'][2:]}"


@pytest.mark.parametrize("case", golden.load_models(), ids=case_id)
def test_whole_models_in_float64(case):
    config = locatvit.build_config(case["model"], case["kwargs"])
    with torch.device("meta"):
        model = LocAtViTForImageClassification(config)
    model = model.to_empty(device="cpu").double().eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    table = locatvit.key_table(config)
    golden.load_weights(model, table, golden.rule_weights(table, shapes))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]

    with torch.no_grad():
        outputs = model(golden.model_input(case["input"]), output_hidden_states=True)
    features = outputs.hidden_states[-1][:, config.num_prefix_tokens :].transpose(1, 2).reshape(case["feat_shape"])
    # The reference computes rotary angles and resamples position embeddings in float32.
    native = list(config.native_grid) == [side // 16 for side in case["input"][2:]]
    tolerance = 1e-8 if native and config.position_embedding_type != "rope_mixed" else 1e-6
    for stored, computed in (
        (case["logits_0"], outputs.logits[0, : len(case["logits_0"])]),
        (case["logits_1"], outputs.logits[1, : len(case["logits_1"])]),
        (case["logits_sum"], outputs.logits.sum()),
        (case["logits_absmean"], outputs.logits.abs().mean()),
        (case["feat_0_0_0"], features[0, : len(case["feat_0_0_0"]), 0, 0]),
        (case["feat_absmean"], features.abs().mean()),
    ):
        torch.testing.assert_close(computed, torch.tensor(stored, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", [case for case in golden.load_modules() if "init" in case], ids=case_id)
def test_gaussian_alone_in_float64(case):
    head_dim, grid = case["head_dim"], tuple(case["cur"])
    module = LocAtGaussian(head_dim, tuple(case["init"]), coarse_training=case["fast"]).double().train(case["train"])
    names = {"variance.weight": "w_var", "variance.bias": "b_var"}
    names |= {"amplitude.weight": "w_alpha", "amplitude.bias": "b_alpha"}
    shapes = {ours: tensor.shape for ours, tensor in module.state_dict().items()}
    module.load_state_dict({ours: torch.from_numpy(golden.rule_normal(names[ours], shapes[ours])) for ours in shapes})
    query = golden.rule_normal("q", (2, case["heads"], case["prefix"] + grid[0] * grid[1], head_dim))
    bias = module(torch.from_numpy(query), grid, case["prefix"]).bias()
    assert list(bias.shape) == case["shape"]
    assert abs(bias.sum().item() - case["sum"]) < 1e-8 * case["sum"]
    assert abs(bias.max().item() - case["max"]) < 1e-8
    first = bias[0, 0, case["prefix"], case["prefix"] :][: len(case["row_p0"])]
    torch.testing.assert_close(first, torch.tensor(case["row_p0"], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", [case for case in golden.load_modules() if "init" not in case], ids=case_id)
def test_refinement_alone_in_float64(case):
    tokens = torch.from_numpy(golden.rule_normal("x", tuple(case["shape"]))).flatten(1, -2)
    if case.get("pre_norm"):
        tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    refined = refine(tokens, case["heads"])
    first = torch.tensor(case["first"], dtype=torch.float64)
    torch.testing.assert_close(refined.flatten()[: len(first)], first, rtol=0, atol=1e-8)
    assert abs(refined.sum().item() - case["sum"]) < 1e-6
