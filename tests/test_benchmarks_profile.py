"""The breakdown of a training step, at a tiny size on the CPU; and which kernel is of which kind."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest

from benchmarks import step_profile

TINY = ["--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "512", "--device", "cpu", "--commit", "abc+"]


def test_every_way_is_profiled(prompts_csv, tmp_path):
    ways = ["qlora, without optimize_model", "qlora"]
    flags = ["--steps", "1", "--warmup", "1", "--length", "2x16", "--data", str(prompts_csv), "--out", str(tmp_path)]
    assert step_profile.main([*TINY, *flags, "--ways", *ways]) == 0
    (file,) = tmp_path.glob("profile-bloom-*.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(dict.fromkeys(row["way"] for row in rows)) == ways
    for way in ways:
        took = {row["kind"]: float(row["ms"]) for row in rows if row["way"] == way}
        assert took.keys() == {"wall", *(kind for kind, _ in step_profile.KINDS)}
        assert took["products"] > 0
        assert took["wall"] > 0
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert f"| wall | {float(rows[0]['ms']):.1f} |" in page
    assert "commit abc" in page


def test_times_are_of_one_step_and_by_kind():
    events = [
        SimpleNamespace(key="_dequantize_4bit_kernel", self_device_time_total=4000.0, count=6),
        SimpleNamespace(key="nvjet_sm90_tst_64x8", self_device_time_total=8000.0, count=4),
        SimpleNamespace(key="aten::mm", self_device_time_total=0.0, count=4),
    ]
    rows = {row["kind"]: row for row in step_profile.rows_of(events, "cuda", 2, 0.02)}
    assert (rows["wall"]["ms"], rows["wall"]["launches"]) == (pytest.approx(10), 5)
    assert (rows["decoding"]["ms"], rows["decoding"]["launches"]) == (pytest.approx(2), 3)
    assert rows["products"]["ms"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_dequantize_4bit_kernel", "decoding"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)", "decoding"),
        ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_bias_TNT", "products"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(AttentionKernel)", "attention"),
        ("_lora_grads_kernel", "adapters, where apart"),
        ("_matmul_wgmma_kernel", "products"),
        ("_backward_kernel", "loss"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "normalization"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "activation"),
        (
            "void at::native::vectorized_elementwise_kernel<2, at::native::bfloat16_copy_kernel_cuda>",
            "copies and casts",
        ),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdam>", "optimizer and clipping"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise and the rest"),
    ],
)
def test_the_kind_of_a_kernel(kernel, kind):
    assert step_profile.kind_of(kernel) == kind
