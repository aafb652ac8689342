"""Measurements on the GPU of a Mac, which has no float64."""

import pytest
import torch

from lewis_hub.calibration.grams import DIAGONAL, second_moments, sum_of_squares, widest_float
from lewis_hub.calibration.summaries import evenness, importances, outlier_ratios
from lewis_hub.report.cost import this_machine


class OnMac(torch.Tensor):
    """A tensor on the CPU that is like one on MPS: conversions to float64 fail."""

    @property
    def device(self):
        return torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def tensors(*shape):
    held = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return held, held.as_subclass(OnMac)


def test_the_tensor_of_these_tests_refuses_float64():
    with pytest.raises(TypeError, match="float64"):
        tensors(3)[1].double()


def test_long_sums_are_float32_there():
    rows, there = tensors(3000, 8)

    assert widest_float(rows.device) == sum_of_squares(rows).dtype == torch.float64
    assert sum_of_squares(there).dtype == torch.float32
    torch.testing.assert_close(
        sum_of_squares(there).as_subclass(torch.Tensor), sum_of_squares(rows).float()
    )
    assert second_moments(there, DIAGONAL).dtype == torch.float32


@pytest.mark.parametrize("summarise", [importances, outlier_ratios, evenness])
def test_the_summaries_agree_with_those_of_a_cpu(summarise):
    weight, norm = tensors(64, 32), tensors(32)
    module = "model.layers.0.mlp.up_proj"

    on_cpu, on_mac = (
        summarise({module: weight[i]}, {module: norm[i].abs()})[module] for i in range(2)
    )

    assert on_mac == pytest.approx(on_cpu, rel=1e-5)


def test_the_machine_is_told_with_its_gpu():
    assert this_machine("mps").accelerator == "Apple GPU"
