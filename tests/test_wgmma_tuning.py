"""The tiles of the Hopper product: every shape has some that can be launched, and split tiles cover the contraction."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import qkernels
from qkernels import aot
from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA
from qkernels.kernels._wgmma import TAKE_TURNS
from qkernels.tuning.wgmma import expected_us, tiling, wgmma_config, wgmma_limit
from qkernels.variants import wgmma_variant

SHAPES = [(1, 64), (17, 4096), (4096, 4096), (12288, 4096), (4096, 16384), (11008, 4096), (4096, 11008), (250880, 4096)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_program_has_turns_and_split_tiles_are_known(N, K, backward):
    R, C = (K, N) if backward else (N, K)
    for M in (1, 33, 64, 65, 200, 256, 300, 512, 4096):
        config = wgmma_config(M, N, K, backward)
        assert config == wgmma_config(M, N, K, backward)
        assert config.num_warps == config.rows // 16
        tile_turns = -(-C // (64 * config.stages))
        turns = -(-M // config.columns) * -(-R // config.rows) * tile_turns
        begins = [program * turns // config.programs for program in range(config.programs + 1)]
        assert all(end > begin for begin, end in itertools.pairwise(begins))
        assert config.split == any(begin % tile_turns for begin in begins)


def test_all_multiprocessors_have_as_much_to_do():
    # 96 tiles, and 192, on 132 multiprocessors: thirds and halves of tiles for 128 of them.
    for M in (256, 512):
        config = wgmma_config(M, 12288, 4096, False)
        assert (config.columns, config.programs, config.split) == (256, 128, True)
    whole, split = (tiling(512, 12288, 4096, 256, programs) for programs in (96, 128))
    assert not whole.split
    assert expected_us(split, 512, 12288, 4096, False) < expected_us(whole, 512, 12288, 4096, False)


def test_no_more_programs_than_run_at_once_wait_for_each_other():
    for programs in (132, 500):
        assert tiling(1024, 250880, 4096, 64, programs).programs == 132


def test_who_takes_what():
    explain = qkernels.explain
    assert explain(32, 12288, 4096, device=(9, 0)).implementation == SKINNY
    for M in (33, 64, 1024):
        assert explain(M, 12288, 4096, torch.bfloat16, (9, 0)).implementation == WGMMA
    for M in (65, 1024):
        assert explain(M, 12288, 4096, device=(9, 0), backward=True).implementation == WGMMA
    for M in (32, 64):
        assert explain(M, 12288, 4096, device=(9, 0), backward=True).implementation == SKINNY
    for K in (4096, 4128):
        assert explain(100, 12288, K, device=(9, 0), blocksize=32).implementation == WGMMA
    assert wgmma_limit(4096, 2048) == 256
    assert explain(257, 4096, 2048, device=(9, 0)).implementation == DEQUANTIZE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"M": 200, "device": (8, 0)}, "sm_80 has no wgmma instruction"),
        ({"M": 200, "device": (10, 0)}, "sm_100 has no wgmma instruction"),
        ({"dtype": torch.float32}, "wgmma has no float32"),
        ({"M": 200, "K": 4090}, "rows of K=4090 are not whole blocks, or whole 64"),
        ({"M": 200, "K": 4128}, "rows of K=4128 are not whole blocks, or whole 64"),
        ({"M": 200, "K": 4112, "blocksize": 32}, "rows of K=4112 are not whole blocks, or whole 64"),
        ({"N": 12289, "backward": True}, "rows of dy, N=12289, are not multiples of 16 bytes"),
        ({"N": 127}, "the weight [127, 4096] is smaller than a tile"),
        ({"M": 1025}, "M=1025 is not in 1 to 1024"),
        ({"M": 0}, "M=0 is not in 1 to 1024"),
    ],
)
def test_what_it_refuses(options, reason):
    choice = qkernels.explain(**({"M": 100, "N": 12288, "K": 4096, "device": (9, 0)} | options))
    assert choice.implementation == DEQUANTIZE
    assert f"not {WGMMA}: {reason}" in choice.reason


@pytest.mark.parametrize("backward", [False, True])
def test_the_code_is_what_the_turns_need(backward):
    ptx = aot.compile_variant(wgmma_variant(256, "fp16", True, backward), "sm_90").asm["ptx"]
    loop = ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.mma_async")]
    # Four steps of four products, and two barriers a step, of which the first two stand before this piece.
    assert loop.count("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16") == 15
    # Later versions of Triton add barriers, and no turns are taken.
    assert not TAKE_TURNS.value or loop.count("bar.sync") == 6
    # Nothing waits for copies other than by their own groups and barriers.
    assert "fence.proxy.async" not in loop
    assert "membar" not in loop


def test_a_step_is_decoded_before_the_barrier_that_gives_the_turn():
    # Behind it the other group decodes, and whatever stands between it and the product delays both.
    for backward in (False, True):
        ptx = aot.compile_variant(wgmma_variant(256, "fp16", True, backward), "sm_90").asm["ptx"]
        product = ptx.index("wgmma.mma_async")
        turn = ptx.rindex("mbarrier.try_wait", 0, product)
        assert "prmt" not in ptx[turn:product]
        assert "dp2a" not in ptx[turn:product]


def test_its_bytes_are_beside_enough_of_other_shared_memory():
    # The driver grants more than 48 KiB in all only if the dynamic part, which the launch raises, exceeds that alone,
    # or if both are below it.
    for columns in (64, 128, 256):
        resources = aot.inspect(wgmma_variant(columns, "fp16", False, False), "sm_90")
        assert resources.shared_bytes - 32768 > 48 * 1024
        assert not resources.faults()
        assert not resources.serialized


@pytest.mark.parametrize("backward", [False, True])
def test_blocks_of_32_have_twice_the_scales(backward):
    once, twice = (
        aot.compile_variant(wgmma_variant(256, "fp16", True, backward, blocksize=blocksize), "sm_90")
        for blocksize in (64, 32)
    )
    # Two turns of four steps in float32, of 128 rows, or backward of 64 rows and two groups.
    assert twice.metadata.shared - once.metadata.shared == 2 * 4 * 128 * 4


def test_serialized_products_are_a_fault():
    good = aot.inspect(wgmma_variant(64, "fp16", False, False), "sm_90")
    assert dataclasses.replace(good, serialized=True).faults() == ["wgmma instructions are serialized"]
