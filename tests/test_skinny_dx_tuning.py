"""The table of the backward product: every configuration can be launched, and every shape has one or a reason."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA
from qkernels.tuning.skinny import PROCESSORS, SHARED_LIMIT_BYTES, generation
from qkernels.tuning.skinny_dx import STEP, skinny_dx_candidates, skinny_dx_config, skinny_dx_limit

# (N, K)
SHAPES = [(8, 64), (333, 64), (4096, 4096), (12288, 4096), (4096, 16384), (11008, 4096), (1001, 4160), (28672, 8192)]


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize(("N", "K"), [*SHAPES, (1152, 4304), (1280, 3420), (333, 1001)])
def test_every_configuration_can_be_launched(N, K, blocksize, sm):
    most = 32 if sm < 80 else 16 if N % 8 else 64  # rows of dy that begin anywhere are loaded one by one
    if K == 3420 and sm != 90:  # blocks end within a lane's bytes, and two scales take registers
        most = 32
    for M in range(1, skinny_dx_limit(sm, N, K, blocksize) + 1):
        config = skinny_dx_config(M, N, K, sm, blocksize)
        assert config is not None
        assert config.ragged == (K % 64 != 0 or blocksize == 32)
        assert min(M, most) <= config.columns <= 2 * max(M, 4)
        assert config.num_warps % config.k_warps == 0
        assert config.turing == (sm < 80)
        assert config.early == (sm >= 90)
        assert config.shared_bytes <= SHARED_LIMIT_BYTES[generation(sm)]
        # Accumulators, with W's words now and in the next step: more would spill.
        assert config.bytes * config.columns // 2 + 4 * config.bytes <= 192


@pytest.mark.parametrize("sm", [75, 80, 90])
@pytest.mark.parametrize(("N", "K"), SHAPES[2:6])
def test_every_multiprocessor_and_every_warp_has_work(N, K, sm):
    for M in (1, 8, 16, 32, 64):
        config = skinny_dx_config(M, N, K, sm)
        programs = -(-K // config.rows) * config.parts
        assert programs >= 0.7 * PROCESSORS[sm]
        assert config.parts * (config.num_warps // config.k_warps) <= -(-N // STEP)
        assert config in skinny_dx_candidates(M, N, K, sm)


def test_ragged_rows_of_hopper():
    """Shapes of programs and limits as measured: narrow programs where wide ones would leave warps without work."""
    shapes = {
        (N, K): [skinny_dx_config(M, N, K, 90)[1:4] for M in (1, 16, 32, 64)]
        for N, K in ((1152, 4304), (1280, 3420), (12288, 4112), (12288, 4100))
    }
    assert shapes == {
        (1152, 4304): [(4, 2, 8), (4, 2, 8), (4, 2, 4), (4, 2, 4)],
        (1280, 3420): [(4, 1, 8), (4, 2, 8), (4, 2, 4), (4, 2, 8)],
        (12288, 4112): [(8, 1, 8), (8, 1, 4), (8, 1, 4), (4, 2, 4)],
        (12288, 4100): [(8, 1, 8), (8, 1, 4), (4, 2, 4), (4, 2, 8)],
    }
    # As many programs as multiprocessors need no second launch.
    assert [skinny_dx_config(M, 4096, 16384, 90, 32)[1:5] for M in (1, 16, 32)] == [(8, 1, 8, 1)] * 3
    assert [skinny_dx_limit(90, *shape, 64) for shape in shapes] == [64, 128, 128, 128]
    assert skinny_dx_limit(90, 1281, 3420, 64) == 64  # dy is read element by element
    assert skinny_dx_limit(90, 12288, 4096, 32) == 64  # Hopper's other product takes it


def test_many_rows_of_dy_and_a_long_k_need_no_second_launch():
    chosen = {(N, K): skinny_dx_config(64, N, K, 90) for N, K in SHAPES[2:6]}
    assert {shape: (config.columns, config.num_warps, config.parts) for shape, config in chosen.items()} == {
        (4096, 4096): (64, 4, 8),
        (12288, 4096): (64, 4, 8),
        (4096, 16384): (64, 8, 1),
        (11008, 4096): (64, 4, 8),
    }


@pytest.mark.parametrize(
    ("arguments", "options", "expected", "reason"),
    [
        ((1, 4096, 4096, torch.float32, (9, 0)), {}, DEQUANTIZE, "no tensor cores for float32"),
        ((1, 4096, 4096, torch.bfloat16, (7, 5)), {}, DEQUANTIZE, "no tensor cores for bfloat16"),
        ((0, 4096, 4096, torch.float16, (9, 0)), {}, DEQUANTIZE, "M=0 is not in 1 to"),
        ((256, 4096, 4096, torch.float16, (9, 0)), {}, WGMMA, "M=256 is not in 1 to"),
        ((256, 4096, 4096, torch.float16, (8, 0)), {}, DEQUANTIZE, "M=256 is not in 1 to"),
        ((1, 4096, 4096, torch.float16, (7, 0)), {}, DEQUANTIZE, "M=1 is not in 1 to 0"),
        ((256, 4096, 4100, torch.float16, (9, 0)), {}, DEQUANTIZE, "K=4100"),
        ((65, 1152, 4304, torch.float16, (9, 0)), {}, DEQUANTIZE, "M=65 is not in 1 to 64"),
        ((128, 4096, 4096, torch.float16, (9, 0)), {"blocksize": 32}, WGMMA, "M=128 is not in 1 to"),
        ((1, 7, 4096, torch.float16, (9, 0)), {}, DEQUANTIZE, "N=7 is below 8"),
    ],
)
def test_why_not(arguments, options, expected, reason):
    implementation, said = qkernels.explain(*arguments, backward=True, **options)
    assert implementation == expected
    assert reason in said


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0)])
def test_few_rows_are_fused(capability):
    for M in (1, 4, 5, 32):
        for N in (12288, 1001):
            for K, blocksize in ((4096, 64), (4096, 32), (4304, 64), (1001, 64)):
                choice = qkernels.explain(M, N, K, torch.float16, capability, blocksize=blocksize, backward=True)
                assert choice.implementation == SKINNY
