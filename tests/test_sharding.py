"""A layer split for FSDP: the same numbers, codes alone as its parameter, scales that no cast damages."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from models import save_tiny, tiny_model, tokens
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomBlock

from qkernels.errors import UserError
from qkernels.format import QUANT_STORAGES
from qlora import Linear4bit, NF4Config, Params4bit, prepare_for_fsdp, quantize_model


def layer(storage=torch.uint8, nested=True) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(48, 11), quant_storage=storage, compress_statistics=nested)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", QUANT_STORAGES, ids=str)
def test_a_split_layer_computes_the_same(storage, nested):
    whole = layer(storage, nested)
    split = copy.deepcopy(whole)
    split.split_weight()
    split.split_weight()
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.equal(split(x), whole(x))
    assert torch.equal(split.dequantize(), whole.dequantize())
    assert torch.equal(*(torch.autograd.grad(each(x).sum(), x)[0] for each in (split, whole)))
    assert type(split.weight) is nn.Parameter
    assert (split.weight.dtype, split.weight.shape) == (torch.uint8, (48 * 11 // 2, 1))
    assert list(split.state_dict()) == ["weight", "bias"]


def test_neither_casts_nor_moves_damage_it():
    split = layer()
    split.split_weight()
    weight = split.dequantize()
    again = copy.deepcopy(split).half().to(torch.bfloat16).to("cpu")
    assert torch.equal(again.dequantize(), weight)
    assert again.bias.dtype == torch.bfloat16
    assert again.quant_state.state2.absmax.dtype == torch.float32
    meta = copy.deepcopy(split).to("meta")
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}
    fresh = copy.deepcopy(split)
    fresh.weight.data.zero_()
    fresh.load_state_dict(split.state_dict(), assign=True)
    assert torch.equal(fresh.dequantize(), weight)


def test_a_model_and_what_is_not_one(name):
    model = quantize_model(tiny_model(name), NF4Config(quant_storage=torch.bfloat16))
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(prepare_for_fsdp(model)(tokens()).logits, expected)
    assert not any(isinstance(parameter, Params4bit) for parameter in model.parameters())
    with pytest.raises(UserError, match="expected a model with 4-bit layers, got a LlamaForCausalLM without any"):
        prepare_for_fsdp(tiny_model("llama"))
    with pytest.raises(UserError, match="expected a quantized weight"):
        prepare_for_fsdp(Linear4bit(48, 11, device="meta"))


def test_codes_that_something_has_cast_are_refused():
    """What FSDP's mixed precision does to codes in a float storage: float16 instead of bfloat16."""
    damaged = layer(torch.bfloat16)
    damaged.weight = nn.Parameter(damaged.weight.data.to(torch.float16), requires_grad=False)
    with pytest.raises(UserError, match=r"expected packed codes viewed as torch.bfloat16.* got torch.float16"):
        damaged(torch.randn(3, 48))


# --- the page about it


def test_the_page_and_its_configurations(tmp_path, monkeypatch):
    docs = Path(__file__).resolve().parent.parent / "docs"
    sharded = load_config_from_file(str(docs / "accelerate" / "fsdp2_8_gpus.yaml"))
    whole = load_config_from_file(str(docs / "accelerate" / "ddp_8_gpus.yaml"))
    assert (sharded.distributed_type, whole.distributed_type) == (DistributedType.FSDP, DistributedType.MULTI_GPU)
    assert sharded.num_processes == whole.num_processes == 8
    assert sharded.fsdp_config["fsdp_version"] == 2
    assert sharded.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    (block,) = re.findall(r"```python\n(.*?)```", (docs / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    save_tiny("bloom", tmp_path / "bloom")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block.replace('"bigscience/bloom-7b1"', '"./bloom"'), names)
    assert not any(isinstance(parameter, Params4bit) for parameter in names["model"].parameters())
    assert any(isinstance(module, BloomBlock) for module in names["model"].modules())


def test_a_torch_that_shards_no_integers_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.1+cu130")
    with pytest.raises(UserError, match=r"torch: expected 2\.12 or later.*got 2\.11\.1"):
        prepare_for_fsdp(tiny_model("llama"))
