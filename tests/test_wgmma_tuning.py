"""The tiles of the Hopper product: every shape has some that can be launched, and split tiles cover the contraction."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import qkernels
from qkernels import aot
from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA
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
        assert config.stages % config.decoded == 0
        tile_turns = -(-C // (64 * config.stages))
        turns = -(-M // config.columns) * -(-R // config.rows) * tile_turns
        begins = [program * turns // config.programs for program in range(config.programs + 1)]
        assert all(end > begin for begin, end in itertools.pairwise(begins))
        assert config.split == any(begin % tile_turns for begin in begins)


def test_all_multiprocessors_have_as_much_to_do():
    # 96 tiles, and 192, on 132 multiprocessors.
    for M in (256, 512):
        config = wgmma_config(M, 12288, 4096, False)
        assert (config.columns, config.programs, config.split) == (256, 132, True)
    whole, split = (tiling(512, 12288, 4096, 256, programs) for programs in (96, 132))
    assert not whole.split
    assert expected_us(split, 512, 12288, 4096) < expected_us(whole, 512, 12288, 4096)


def test_who_takes_what():
    explain = qkernels.explain
    assert explain(32, 12288, 4096, device=(9, 0)).implementation == SKINNY
    for M in (33, 64, 512):
        assert explain(M, 12288, 4096, torch.bfloat16, (9, 0)).implementation == WGMMA
        assert explain(M, 12288, 4096, device=(9, 0), backward=True).implementation == WGMMA
    assert explain(1, 12288, 4096, device=(9, 0), backward=True).implementation == WGMMA
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
def test_those_that_multiply_do_nothing_else(backward):
    ptx = aot.compile_variant(wgmma_variant(256, "fp16", True, backward), "sm_90").asm["ptx"]
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16") == 4
    # From the barriers of a step, which say that its operands are there, to its products.
    fence = ptx.index("wgmma.fence")
    step = ptx[ptx.rindex("mbarrier.try_wait", 0, fence) : ptx.index("wgmma.commit_group", fence)]
    for instruction in ("ld.global", "ld.shared", "st.shared", "prmt", "bar.sync"):
        assert instruction not in step
    # This fence waits for a warp's loads: those that decode, which have some on the way, are spared it.
    assert ptx.count("fence.proxy.async") == 2
    assert "fence.proxy.async" in step


def test_serialized_products_are_a_fault():
    good = aot.inspect(wgmma_variant(64, "fp16", False, False), "sm_90")
    assert dataclasses.replace(good, serialized=True).faults() == ["wgmma instructions are serialized"]
