"""What Python and PyTorch do with any module they do with ours: other processes, joblib and torch.func."""

import joblib
import pytest
import torch
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from locatvit_hf.detection import Detector
from tests.detection.detectors import ENCODERS, small_detector
from tests.factories import FAMILIES, tiny_model
from tests.tolerances import assert_same_but_for_rounding

TASKS = ("Model", "Backbone", "ForImageClassification", "ForSemanticSegmentation")


@pytest.fixture
def models():
    """Every model and every detector, each after a forward pass."""
    found = [tiny_model(family, task) for family in FAMILIES for task in TASKS]
    found += [small_detector(family).eval() for family in ENCODERS]
    for model in found:
        answer(model)
    return found


@torch.no_grad()
def answer(model):
    """Numbers that a model computes for one image, the recorded ones among them."""
    image = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)
    if isinstance(model, Detector):
        return model([image])[0]["boxes"]
    outputs = model(image[None], output_hidden_states=True)
    return torch.cat([outputs[0][0].flatten(), *map(torch.flatten, outputs.hidden_states)])


def answers(models):
    return [answer(model) for model in models]


def test_models_go_to_a_spawned_process(models):
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same_but_for_rounding(pool.apply(answers, (models,)), answers(models))


def test_joblib_stores_models(models, tmp_path):
    joblib.dump(models, tmp_path / "models.joblib")
    assert_same_but_for_rounding(answers(joblib.load(tmp_path / "models.joblib")), answers(models))


@pytest.mark.slow
def test_joblib_hands_models_to_its_workers(models):
    halves = models[::2], models[1::2]
    found = joblib.Parallel(n_jobs=2)(joblib.delayed(answers)(half) for half in halves)
    for half, observed in zip(halves, found, strict=True):
        assert_same_but_for_rounding(observed, answers(half))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("task", ["ForImageClassification", "ForSemanticSegmentation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_of_torch_func(family, task):
    """On images that are large enough for attention in blocks."""
    model = tiny_model(family, task).double()
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    labels = torch.tensor([1, 4]) if task == "ForImageClassification" else torch.randint(0, 5, (2, 128, 128))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def logits(parameters, images):
        return functional_call(model, parameters, (images,)).logits

    def loss(parameters, image, label):
        return functional_call(model, parameters, (image[None],), {"labels": label[None]}).loss

    expected = model(images).logits
    assert_same(logits(parameters, images), expected)
    assert_same(vmap(lambda image: logits(parameters, image[None])[0])(images), expected)

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for index in range(2):
        model.zero_grad()
        model(images[index : index + 1], labels=labels[index : index + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            assert_same(each[name][index], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    # <J v, w> = <v, J^T w>; of PyTorch's kernels one alone has a derivative in forward mode.
    tangent, weight = torch.randn_like(images), torch.randn_like(expected)
    with sdpa_kernel(SDPBackend.MATH):
        _, along = jvp(lambda images: logits(parameters, images), (images,), (tangent,))
    _, pull = vjp(lambda images: logits(parameters, images), images)
    assert_same((along * weight).sum(), (tangent * pull(weight)[0]).sum())


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
