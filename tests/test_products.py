"""Linear layers of training: oneDNN's products are torch's, forward and backward."""

import copy

import pytest
import torch
from tiny import tiny_value
from torch import nn

from vas.training.products import SoonerLinear, hasten

SHAPES = [(1, 24), (7, 24), (2, 5, 24), (3, 1, 24)]


def twins(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice, one of them oneDNN's."""
    torch.manual_seed(0)
    usual = nn.Linear(24, 40, bias=bias).to(dtype)
    sooner = copy.deepcopy(usual)
    hasten(sooner)
    assert type(sooner) is SoonerLinear
    return usual, sooner


def gradients(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor | None]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_torchs(shape, bias):
    usual, sooner = twins(bias)
    x = torch.randn(shape)
    for found, expected in zip(gradients(sooner, x), gradients(usual, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_transposed_input_is_as_good_as_any():
    usual, sooner = twins(True)
    x = torch.randn(24, 6).t()
    for found, expected in zip(gradients(sooner, x), gradients(usual, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    _, sooner = twins(True)
    sooner.requires_grad_(False)
    _, of_x, of_weight, of_bias = gradients(sooner, torch.randn(3, 24))
    assert of_x is not None
    assert (of_weight, of_bias) == (None, None)


def test_other_dtypes_are_left_to_torch():
    usual, sooner = twins(True, torch.bfloat16)
    x = torch.randn(5, 24).bfloat16()
    for found, expected in zip(gradients(sooner, x), gradients(usual, x), strict=True):
        assert torch.equal(found, expected)
    _, sooner = twins(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert sooner(torch.randn(5, 24)).dtype == torch.bfloat16


def test_a_value_model_keeps_its_values_and_its_weights_names():
    value = tiny_value()
    names, ids = list(value.state_dict()), torch.randint(0, 50, (2, 9))
    before = value(ids)
    hasten(value)
    assert list(value.state_dict()) == names
    assert sum(type(module) is SoonerLinear for module in value.modules()) > 7
    torch.testing.assert_close(value(ids), before, rtol=1e-5, atol=1e-5)
