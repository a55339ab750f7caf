"""Tables of tensor names and their bookkeeping."""

import pytest
import torch

from locatvit_hf.conversion.key_mapping import expand, rename, restrict, source_shapes

TABLE = expand({"=token": "ours.token", "blocks.{i}.qkv": tuple(f"ours.{{i}}.{name}" for name in "qkv")}, 2)
SHAPES = {"ours.token": torch.Size([1, 4])} | {
    f"ours.{i}.{name}.{kind}": torch.Size([4, 3] if kind == "weight" else [4])
    for i in range(2)
    for name in "qkv"
    for kind in ("weight", "bias")
}
SHARED = expand({"mlp.fc1": "ours.mlp", "blocks.{i}.mlp.fc1": "ours.mlp"}, 2)
SHARED_SHAPES = {"ours.mlp.weight": torch.Size([2, 2]), "ours.mlp.bias": torch.Size([2])}


def random_state(table, shapes):
    return {name: torch.randn(shape) for name, shape in source_shapes(table, shapes).items()}


def test_rows_are_expanded_and_split():
    state = random_state(TABLE, SHAPES)
    assert state["blocks.1.qkv.weight"].shape == (12, 3) and len(state) == 5
    ours = rename(state, TABLE, SHAPES)
    assert {name: tensor.shape for name, tensor in ours.items()} == SHAPES
    assert torch.equal(ours["ours.1.k.weight"], state["blocks.1.qkv.weight"][4:8])


def test_rows_are_restricted_to_what_a_model_has():
    names = {"token", "0.q.bias", "0.k.bias", "0.v.bias"}
    assert restrict(TABLE, names, "ours.") == {
        "token": ("token",),
        "blocks.0.qkv.bias": ("0.q.bias", "0.k.bias", "0.v.bias"),
    }


def test_many_problems_are_counted():
    state = random_state(TABLE, SHAPES) | {f"other{i}": torch.ones(1) for i in range(5)}
    del state["token"]
    with pytest.raises(ValueError, match="lacks token and holds other0, other1, other2 and 2 more"):
        rename(state, TABLE, SHAPES)


def test_copies_of_a_shared_tensor():
    weight, bias = torch.randn(2, 2), torch.randn(2)
    state = {f"{name}.weight": weight for name in ("mlp.fc1", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1")}
    state |= {name.replace("weight", "bias"): bias for name in state}
    assert torch.equal(rename(state, SHARED, SHARED_SHAPES)["ours.mlp.weight"], weight)
    # safetensors keeps one copy, whichever.
    one = {"blocks.1.mlp.fc1.weight": weight, "mlp.fc1.bias": bias}
    assert torch.equal(rename(one, SHARED, SHARED_SHAPES)["ours.mlp.weight"], weight)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.bias differs"):
        rename(state | {"blocks.0.mlp.fc1.bias": bias + 1}, SHARED, SHARED_SHAPES)
    with pytest.raises(ValueError, match=r"lacks mlp.fc1.bias"):
        rename({"mlp.fc1.weight": weight}, SHARED, SHARED_SHAPES)
