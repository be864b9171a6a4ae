"""The table of the fused product: every configuration can be launched, and every shape has one or a reason."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels.dispatch import DEQUANTIZE, SKINNY
from qkernels.tuning.skinny import (
    PROCESSORS,
    SHARED_LIMIT_BYTES,
    chunks,
    generation,
    phases,
    programs,
    shared_bytes,
    skinny_config,
    skinny_limit,
)

# (N, K, blocksize) of rows that are not whole blocks of 64.
RAGGED = [(1152, 4304, 64), (1280, 3420, 128), (4096, 4095, 64), (100, 1001, 4096), (12288, 4096, 32), (1000, 84, 32)]
SHAPES = [(16, 64), (17, 4096), (4096, 4096), (12288, 4096), (4096, 16384), (11008, 4096), (28672, 8192), (8192, 28672)]


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_configuration_can_be_launched(N, K, sm):
    for M in range(1, skinny_limit(sm) + 1):
        config = skinny_config(M, N, K, sm)
        assert config is not None
        assert min(M, 32) <= config.columns <= 2 * max(M, 4)
        assert config.rows <= N
        assert config.num_warps % config.row_warps == 0
        assert config.paired == (M <= 4)
        assert config.turing == (sm < 80)
        used = shared_bytes(K, config.columns, config.tiles, config.row_warps, config.num_warps, parts=config.parts)
        assert config.parts == 1 or N % config.rows == 0
        assert used <= config.shared_bytes <= SHARED_LIMIT_BYTES[generation(sm)]
        assert used == config.shared_bytes or (M <= 4 and config.early)
        assert config.early == (sm >= 90 and not 4 < M <= 8)


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("N", "K", "blocksize"), RAGGED)
def test_every_configuration_for_other_rows_can_be_launched(N, K, blocksize, sm):
    for M in range(1, skinny_limit(sm, N, K, blocksize) + 1):
        config = skinny_config(M, N, K, sm, blocksize)
        assert config is not None
        assert min(M, 16) <= config.columns <= 2 * max(M, 4)
        assert config.paired == (M in range(1, 3 if blocksize == 32 else 5))
        assert not (config.arranged and config.paired)
        assert config.arranged or M <= 8 or K % 64 == 0
        used = shared_bytes(K, config.columns, config.tiles, config.row_warps, config.num_warps, blocksize)
        assert used <= config.shared_bytes <= SHARED_LIMIT_BYTES[generation(sm)]


@pytest.mark.parametrize(("N", "K", "blocksize"), [*RAGGED, (5, 65, 64), (12288, 4096, 64), (333, 1088, 64)])
def test_every_row_has_a_program_and_all_rows_of_a_program_begin_alike(N, K, blocksize):
    apart = min(max(1, phases(K, blocksize)), N)
    for rows in (16, 48):
        count = programs(N, K, blocksize, rows)
        assert count % apart == 0
        assert count // apart * rows >= len(range(0, N, apart)) > (count // apart - 1) * rows
        starts = [n * K % 64 for n in range(N)]
        assert all(len(set(starts[phase::apart])) == 1 for phase in range(apart)) or apart == N
        assert chunks(K) * 128 >= max(starts) + K


@pytest.mark.parametrize(("N", "K", "share"), [(4096, 4096, 2), (4096, 16384, 2), (2048, 4096, 1)])
def test_no_more_programs_fit_than_a_multiprocessors_share(N, K, share):
    config = skinny_config(2, N, K, 90)  # of one row [4096, 4096] has programs of 16 warps, whose registers limit it
    assert config is not None
    assert -(-N // config.rows) <= share * PROCESSORS[90]
    with_its_own = config.shared_bytes + 1024
    assert share * with_its_own <= 228 * 1024 < (share + 1) * with_its_own


def test_a_long_k_has_its_own_programs():
    chosen = {M: skinny_config(M, 4096, 16384, 90) for M in (1, 8, 16, 32)}
    assert {M: (config.tiles, config.row_warps, config.num_warps) for M, config in chosen.items()} == {
        1: (1, 1, 8),
        8: (2, 1, 8),
        16: (2, 1, 8),
        32: (2, 4, 8),
    }


def test_what_no_program_fits():
    assert skinny_config(1, 15, 4096, 90) is None
    assert skinny_config(1, 4096, 2**20, 90) is None
    assert skinny_limit(70) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 4096, 4096, torch.float32, (9, 0)), "no tensor cores for float32"),
        ((1, 4096, 4096, torch.bfloat16, (7, 5)), "no tensor cores for bfloat16"),
        ((0, 4096, 4096, torch.float16, (9, 0)), "M=0 is not in 1 to"),
        ((4096, 4096, 4096, torch.float16, (8, 0)), "M=4096 is not in 1 to"),
        ((4096, 4096, 4096, torch.float16, (9, 0)), "M=4096 is not in 1 to"),
        ((1, 4096, 4096, torch.float16, (7, 0)), "M=1 is not in 1 to 0"),
        ((1, 4096, 63, torch.float16, (9, 0)), "K=63 is below 64"),
        ((1, 15, 4100, torch.float16, (9, 0)), "N=15 is below 16"),
        ((1, 15, 4096, torch.float16, (9, 0)), "N=15 is below 16"),
    ],
)
def test_why_not(arguments, reason):
    implementation, said = qkernels.explain(*arguments)
    assert implementation == DEQUANTIZE
    assert reason in said


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0)])
@pytest.mark.parametrize(("N", "K", "blocksize"), RAGGED)
def test_rows_that_are_not_whole_blocks_are_fused(N, K, blocksize, capability):
    for M in (1, 4, 5, 32):
        chosen = qkernels.explain(M, N, K, torch.float16, capability, blocksize=blocksize)
        assert chosen.implementation == SKINNY


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0)])
def test_few_rows_are_fused(capability):
    for M in (1, 4, 5, 32):
        assert qkernels.explain(M, 12288, 4096, torch.float16, capability).implementation == SKINNY
