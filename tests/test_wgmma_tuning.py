"""The tiles of the Hopper product: every shape has some that can be launched, and split tiles cover the contraction."""

from __future__ import annotations

import dataclasses

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
def test_every_step_of_every_tile_is_computed_once(N, K, backward):
    R, C = (K, N) if backward else (N, K)
    steps = -(-C // 64)
    for M in (1, 33, 64, 65, 200, 256, 300, 512, 4096):
        config = wgmma_config(M, N, K, backward)
        assert config == wgmma_config(M, N, K, backward)
        tiles = -(-M // config.columns) * -(-R // config.rows)
        assert 0 <= config.whole_tiles <= tiles
        assert config.num_warps == config.rows // 16
        if config.whole_tiles == tiles:
            assert config.parts == 1
        else:
            assert config.part_steps % config.stages == 0
            assert (config.parts - 1) * config.part_steps < steps <= config.parts * config.part_steps


def test_tiles_that_fill_no_wave_are_split():
    # 192 tiles on 132 multiprocessors: a first wave of whole tiles, then halves of the other 60.
    assert wgmma_config(512, 12288, 4096, False) == tiling(512, 12288, 4096, 256, 2, 132)
    assert wgmma_config(64, 4096, 4096, False).parts == 4
    assert wgmma_config(128, 12288, 4096, False).parts == 1
    whole, split = (tiling(512, 12288, 4096, 256, parts, 132) for parts in (1, 2))
    assert expected_us(split, 512, 12288, 4096) < expected_us(whole, 512, 12288, 4096)


def test_who_takes_what():
    explain = qkernels.explain
    assert explain(32, 12288, 4096, device=(9, 0)).implementation == SKINNY
    for M in (33, 64, 512):
        assert explain(M, 12288, 4096, torch.bfloat16, (9, 0)).implementation == WGMMA
        assert explain(M, 12288, 4096, device=(9, 0), backward=True).implementation == WGMMA
    assert explain(32, 12288, 4096, device=(9, 0), backward=True).implementation == SKINNY
    assert wgmma_limit(4096, 4096) == 256
    assert explain(257, 4096, 4096, device=(9, 0)).implementation == DEQUANTIZE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"M": 200, "device": (8, 0)}, "sm_80 has no wgmma instruction"),
        ({"M": 200, "device": (10, 0)}, "sm_100 has no wgmma instruction"),
        ({"dtype": torch.float32}, "wgmma has no float32"),
        ({"K": 4090}, "K=4090 and blocks of 64 are not both multiples of 64"),
        ({"blocksize": 32}, "K=4096 and blocks of 32 are not both multiples of 64"),
        ({"N": 12289, "backward": True}, "rows of dy, N=12289, are not multiples of 16 bytes"),
        ({"N": 127}, "the weight [127, 4096] is smaller than a tile"),
        ({"M": 513}, "M=513 is not in 1 to 512"),
        ({"M": 0}, "M=0 is not in 1 to 512"),
    ],
)
def test_what_it_refuses(options, reason):
    choice = qkernels.explain(**({"M": 100, "N": 12288, "K": 4096, "device": (9, 0)} | options))
    assert choice.implementation == DEQUANTIZE
    assert f"not {WGMMA}: {reason}" in choice.reason


@pytest.mark.parametrize("backward", [False, True])
def test_the_code_is_what_the_turns_need(backward):
    ptx = aot.compile_variant(wgmma_variant(256, "fp16", True, backward), "sm_90").asm["ptx"]
    loop = ptx[ptx.index("wgmma.fence") : ptx.rindex("wgmma.commit_group")]
    # Four steps of four products, and two barriers for two of them, of which the first two stand before this piece.
    assert loop.count("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16") == 16
    # Later versions of Triton add barriers, and no turns are taken.
    assert not TAKE_TURNS.value or loop.count("bar.sync") == 2
    # Nothing waits for copies other than by their own groups and barriers.
    assert "fence.proxy.async" not in loop
    assert "membar" not in loop


@pytest.mark.parametrize("backward", [False, True])
def test_copies_of_the_first_step_are_waited_for_before_turns_begin(backward):
    ptx = aot.compile_variant(wgmma_variant(256, "fp16", False, backward), "sm_90").asm["ptx"]
    # The first wait for copies has the barrier after it that all groups pass before one of them runs ahead.
    before = ptx[: ptx.index("wgmma.mma_async")]
    assert before.count("cp.async.wait_group") == 2
    first = before.index("cp.async.wait_group")
    assert "bar.sync" in before[first : before.index("cp.async.wait_group", first + 1)]


def test_its_table_is_beside_enough_of_other_shared_memory():
    # The driver grants more than 48 KiB in all only if the dynamic part, which the launch raises, exceeds that alone.
    for columns in (64, 128, 256):
        resources = aot.inspect(wgmma_variant(columns, "fp16", False, False), "sm_90")
        assert resources.shared_bytes - 32768 > 48 * 1024
        assert not resources.faults()
        assert not resources.serialized


def test_serialized_products_are_a_fault():
    good = aot.inspect(wgmma_variant(64, "fp16", False, False), "sm_90")
    assert dataclasses.replace(good, serialized=True).faults() == ["wgmma instructions are serialized"]
