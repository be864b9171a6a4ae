"""The mean of the scales has the bits of torch's mean on the same GPU, and the quantizer that finishes it is exact."""

from __future__ import annotations

import pytest
import torch
from edges import blocks_at_midpoints
from exact import assert_bits_equal, gpu_reciprocal

from qkernels.format import dynamic_map
from qkernels.kernels.blockwise import quantize_scales_triton
from qkernels.kernels.mean import CAPACITIES, SLOTS, summation_order
from qkernels.ops_cuda import _resident_ctas
from qkernels.reference import mean_reference, quantize_blockwise_reference
from qkernels.tuning import elementwise_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("new_inputs")]

# One CTA, more of them from 131,072 on, as many as the GPU holds from about 4.3 million on (an H100), with tails.
LENGTHS = [2048, 2049, 2050, 2051, 4096, 5001, 65_536, 131_071, 131_072, 131_073, 131_075, 139_265, 262_144, 786_432]
LENGTHS += [1_048_576, 1_048_577, 2_000_003, 4_194_304, 4_325_375, 4_325_377, 9_000_001, 30_000_002]


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def order_of(n: int):
    return summation_order(n, _resident_ctas(torch.cuda.current_device()))


def assert_as_torch(x: torch.Tensor) -> None:
    code = dynamic_map(device())
    index, absmax, mean = torch.ops.qkernels.quantize_scales(x, code, 256)
    assert_bits_equal(mean, x.mean())
    expected, expected_absmax = quantize_blockwise_reference(x, code, 256, mean, gpu_reciprocal)
    assert_bits_equal(index, expected)
    assert_bits_equal(absmax, expected_absmax)


@pytest.mark.parametrize("n", LENGTHS)
def test_the_bits_are_those_of_torch(n):
    assert order_of(n) is not None
    # Magnitudes alike, and very different ones, where the order of summation shows at once.
    for x in (torch.rand(n, device="cuda"), torch.randn(n, device="cuda").mul_(3).exp_()):
        assert_as_torch(x)
        assert_bits_equal(mean_reference(x, order_of(n).ctas), x.mean())


def test_the_bits_are_those_of_torch_at_other_lengths():
    for _ in range(200):
        n = int(2048 * 2 ** (12 * torch.rand(())).item())
        assert order_of(n) is not None
        assert_as_torch(torch.randn(n, device="cuda").exp_())


@pytest.mark.parametrize("n", [1, 128, 2047])
def test_a_short_vector_is_left_to_torch(n):
    assert order_of(n) is None
    assert_as_torch(torch.rand(n, device="cuda"))


def test_a_vector_that_is_not_aligned_is_left_to_torch():
    # torch sums its first numbers by themselves.
    assert_as_torch(torch.randn(300_001, device="cuda").exp_()[1:])


def test_nan_and_inf_reach_the_mean():
    for n in (65_536, 300_000):
        x = torch.rand(n, device="cuda")
        for value in (torch.inf, torch.nan):
            x[n // 2] = value
            *_, mean = torch.ops.qkernels.quantize_scales(x, dynamic_map(device()), 256)
            assert not mean.isfinite()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_sums_are_finished_in_the_order_of_the_reference(capacity):
    for count in (1, 2, 31, capacity // 2 + 1, capacity):
        sums = torch.randn(count, device="cuda").exp_()
        values = torch.zeros(count, 4 * SLOTS, device="cuda")
        values[:, 0] = sums
        config = elementwise_config("quantize_blockwise", 256)
        *_, mean = quantize_scales_triton(sums, dynamic_map(device()), 256, sums, values.numel(), config)
        assert_bits_equal(mean, mean_reference(values.view(-1), count))


@pytest.mark.parametrize("mean", [0.75, -0.75])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_ties_less_the_mean_go_to_the_even_index(blocksize, mean):
    code, offset = dynamic_map(device()), torch.tensor(mean, device="cuda")
    x = blocks_at_midpoints(code, blocksize, mean).cuda()
    config = elementwise_config("quantize_blockwise", blocksize)
    index, absmax, _ = quantize_scales_triton(x, code, blocksize, offset.view(1), 1, config)
    expected, expected_absmax = quantize_blockwise_reference(x, code, blocksize, offset, gpu_reciprocal)
    assert_bits_equal(index, expected)
    assert_bits_equal(absmax, expected_absmax)
    tie, above, below = index.view(-1, blocksize)[:, 1:4].int().unbind(1)
    assert (tie % 2 == 0).all()
    assert (above == below + 1).all()
