"""Our kernels in the place of an installed bitsandbytes' own.

In processes of their own, because here bitsandbytes is the yardstick and keeps its kernels.  There `register` takes its
CPU operators' place; the entry point itself is tested where the package is installed, in test_wheel.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import save_tiny

from qkernels import bitsandbytes_backend, env_report, explain

pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")


def run(script: str, *words: str, switch: str = "1") -> str:
    environment = os.environ | {bitsandbytes_backend.VARIABLE: switch}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_operator_is_ours_bit_for_bit():
    """Of a weight whose rows are no whole number of blocks, on which bitsandbytes' own CPU code decodes wrongly."""
    run("""
        import bitsandbytes as bnb, bitsandbytes.functional as F, torch
        import qkernels
        from qkernels import bitsandbytes_backend as backend
        backend.register("cpu")
        backend.register("cpu")
        assert {(name, "cpu") for name in backend.OPERATORS} <= backend.registered  # and "cuda" where this is installed

        def same(a, b):
            assert a.dtype == b.dtype and torch.equal(a, b)

        weight, x = torch.randn(40, 96), torch.randn(2, 3, 96, requires_grad=True)
        for quant_type in ("nf4", "fp4"):
            for nested in (True, False):
                options = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": 64}
                theirs, state = F.quantize_4bit(weight, **options)
                packed, ours = qkernels.quantize_4bit(weight, **options)
                same(theirs, packed)
                same(state.absmax, ours.absmax)
                decoded = qkernels.dequantize_4bit(packed, ours)
                same(F.dequantize_4bit(theirs, state), decoded)
                same(F.dequantize_4bit(theirs, state, out=torch.empty(40, 96)), decoded)
                expected = qkernels.matmul_4bit(x, packed, ours)
                same(bnb.matmul_4bit(x, theirs.t(), state), expected)
                same(F.gemv_4bit(x, theirs, state=state), expected)
                same(F.gemv_4bit(x, theirs, state=state, out=torch.empty(2, 3, 40)), expected)
                bnb.matmul_4bit(x, theirs, state).sum().backward()
        index, state = F.quantize_blockwise(weight, blocksize=256)
        expected, ours = qkernels.quantize_blockwise(weight, blocksize=256)
        same(index, expected)
        same(F.dequantize_blockwise(index, state), qkernels.dequantize_blockwise(expected, ours))
        same(F.dequantize_blockwise(index, state, out=torch.empty(40, 96)), F.dequantize_blockwise(index, state))

        state.code, state.absmax, state.blocksize = torch.ones(16), torch.ones(60), 64  # no table of the format
        state.shape, state.state2, state.nested = torch.Size((40, 96)), None, False
        try:
            F.gemv_4bit(x, theirs, state=state)
        except qkernels.UserError as error:
            assert "code: expected the table of nf4 or fp4" in str(error), error
        else:
            raise AssertionError
    """)


def test_unchanged_code_computes_what_nf4config_computes(tmp_path):
    """transformers with BitsAndBytesConfig and peft, in which nothing but the environment says so."""
    folder = save_tiny("llama", tmp_path / "float")
    run(
        """
        import sys
        from qkernels import bitsandbytes_backend
        import bitsandbytes, torch
        bitsandbytes_backend.register("cpu")
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        import qlora

        def step(config):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
            ids = torch.arange(18).view(2, 9)
            losses = []
            for _ in range(3):
                loss = model(ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses, type(model.base_model.model.model.layers[0].mlp.up_proj).__module__

        theirs, module = step(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                 bnb_4bit_use_double_quant=True))
        assert module == "bitsandbytes.nn.modules"
        ours, module = step(qlora.NF4Config())
        assert module == "qlora.linear4bit"
        assert theirs[0] == ours[0] and theirs[2] < theirs[0]
        # The layer adds its adapter's gradient to its own before autograd adds those of the layers beside it.
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
        """,
        str(folder),
    )


def test_unchanged_trl_code_trains_as_on_bitsandbytes_own_kernels(tmp_path):
    """transformers, peft and TRL, run twice: the environment alone says whose kernels compute."""
    folder = save_tiny("llama", tmp_path / "float", hidden_size=64, intermediate_size=128)  # rows of whole blocks
    script = """
        import json, sys, torch
        from datasets import Dataset
        from peft import LoraConfig
        from tokenizers import Tokenizer, models
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer
        from qkernels import bitsandbytes_backend
        bitsandbytes_backend.register("cpu")

        words = {f"w{number}": number for number in range(96)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
                                            eos_token="w95", pad_token="w0")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
        trainer = SFTTrainer(
            model, processing_class=tokenizer,
            args=SFTConfig(output_dir=sys.argv[2], max_steps=3, per_device_train_batch_size=2, learning_rate=0.02,
                           logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=0),
            train_dataset=Dataset.from_dict({"input_ids": [[3 + row, 7, 9 + row, 4, 8] for row in range(8)]}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        print(json.dumps([len(bitsandbytes_backend.registered),
                          [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]]))
        """
    ours, theirs = (
        json.loads(run(script, str(folder), str(tmp_path / switch), switch=switch).splitlines()[-1]) for switch in "10"
    )
    assert ours[0] > 0
    assert theirs[0] == 0
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert len(ours[1]) == 3
    assert ours[1][2] < ours[1][0]


def test_an_operator_with_other_arguments_is_left_alone():
    run("""
        import torch
        torch.library.define("bitsandbytes::quantize_blockwise", "(Tensor A, Tensor code) -> Tensor")
        torch.library.define("bitsandbytes::quantize_4bit",
                             "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
        from qkernels import bitsandbytes_backend
        bitsandbytes_backend.register("cpu")
        assert bitsandbytes_backend.registered == {("quantize_4bit", "cpu")}
    """)


def test_one_variable_switches_it_off():
    run(
        """
        import torch
        torch.library.define("bitsandbytes::quantize_blockwise", "(Tensor A, Tensor code, int blocksize) -> Tensor")
        from qkernels import bitsandbytes_backend
        bitsandbytes_backend.register("cpu")
        assert not bitsandbytes_backend.registered
        """,
        switch="0",
    )


def test_benchmarks_leave_the_rival_its_own_kernels():
    check = "import benchmarks, os; assert os.environ['QKERNELS_BITSANDBYTES'] == '0'"
    environment = {key: value for key, value in os.environ.items() if key != bitsandbytes_backend.VARIABLE}
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parent.parent, env=environment)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.setenv("QKERNELS_BITSANDBYTES", "0"), "QKERNELS_BITSANDBYTES=0"),
        (lambda patch: patch.setattr(torch.version, "hip", "6.4"), "a ROCm build of torch"),
        (lambda patch: patch.setattr("importlib.util.find_spec", lambda name: None), "Triton is not installed"),
    ],
)
def test_the_report_says_why_bitsandbytes_keeps_its_own(monkeypatch, change, reason):
    monkeypatch.setenv("QKERNELS_BITSANDBYTES", "1")
    change(monkeypatch)
    assert env_report.bitsandbytes().startswith(f"runs on its own kernels: {reason}")


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_report_says_what_the_operators_choose(capability):
    found = env_report.backends(capability)
    choice = explain(16, 16384, 4096, torch.float16, capability)
    assert found["gemm_4bit, M=16"] == f"{choice.implementation}: {choice.reason}"
    assert found["quantize_4bit"].startswith("Triton kernel")
    assert len({found[f"gemm_4bit, M={rows}"] for rows in (1, 16, 4096)}) > 1


@pytest.mark.gpu
def test_on_the_gpu_the_bits_are_bitsandbytes_own(tmp_path):
    """The same script with its kernels and with ours; the product may differ by rounding, but be no less exact."""
    script = """
        import copy, sys
        from qkernels import bitsandbytes_backend
        import bitsandbytes as bnb, bitsandbytes.functional as F, torch
        bitsandbytes_backend.register()
        torch.manual_seed(0)
        weight = torch.randn(512, 1024, device="cuda", dtype=torch.float16)
        packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        x = torch.randn(7, 1024, device="cuda", dtype=torch.float16)
        index, scales = F.quantize_blockwise(weight.float())
        product = bnb.matmul_4bit(x, packed, state)
        exact_state = copy.copy(state)
        exact_state.dtype = torch.float32
        exact = x.double() @ F.dequantize_4bit(packed, exact_state).double().t()
        torch.save({
            "packed": packed, "absmax": state.absmax, "decoded": F.dequantize_4bit(packed, state), "index": index,
            "blockwise": F.dequantize_blockwise(index, scales), "error": (product - exact).norm() / exact.norm(),
            "ours": len(bitsandbytes_backend.registered),
        }, sys.argv[1])
    """
    results = []
    for switch in "10":
        run(script, str(tmp_path / switch), switch=switch)
        results.append(torch.load(tmp_path / switch))
    ours, theirs = results
    assert (ours.pop("ours"), theirs.pop("ours")) == (len(bitsandbytes_backend.OPERATORS), 0)
    assert ours.pop("error") <= theirs.pop("error") < 1e-3
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
