"""The input embedding and the output layer in 4 bits: products by rows, the loss, tied weights, files, generation."""

from __future__ import annotations

import json

import pytest
import torch
from models import TARGETS, save_tiny, tiny_model, tokens, writing_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer import utils as trl_utils

import qkernels.ops
import qkernels.reference
import qlora
import qlora.output4bit
from qkernels.errors import UserError
from qlora import Embedding4bit, NF4Config
from qlora.output4bit import DecodedRows, OutputLayer4bit, rows_of

SIZES = {"hidden_size": 64, "vocab_size": 900}
FAMILIES = [("bloom", True), ("llama", True), ("llama", False)]
BOTH = pytest.mark.parametrize(("name", "tied"), FAMILIES, ids=["bloom-tied", "llama-tied", "llama-untied"])


def quantized(name: str, tied: bool, dtype: torch.dtype = torch.float32, made=tiny_model, **config):
    model = made(name, tie_word_embeddings=tied, **SIZES).to(dtype)
    return qlora.quantize_model(model, NF4Config(quantize_embeddings=True, **config))


def ends(model) -> tuple[Embedding4bit, OutputLayer4bit]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, Embedding4bit)
    assert isinstance(head, OutputLayer4bit)
    return embedding, head


def decoded(name: str, tied: bool):
    """The float model that the 4-bit one stands for."""
    return qlora.dequantize_model(quantized(name, tied))


def layer(rows: int = 1000, columns: int = 64, **options) -> OutputLayer4bit:
    torch.manual_seed(1)
    return OutputLayer4bit.from_linear(nn.Linear(columns, rows, bias=options.pop("bias", False)), **options)


@pytest.fixture
def small_rows(monkeypatch):
    monkeypatch.setattr(qlora.output4bit, "ROWS", 256)


class Spy:
    """Elements of every weight that is decoded."""

    def __init__(self, monkeypatch) -> None:
        self.sizes: list[int] = []
        for module in (qkernels.ops, qkernels.reference):
            original = module.dequantize_4bit_reference

            def spy(*args, original=original, **kwargs):
                result = original(*args, **kwargs)
                self.sizes.append(result.numel())
                return result

            monkeypatch.setattr(module, "dequantize_4bit_reference", spy)


# --- rows


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [64, 192, 1024])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16])
def test_rows_are_those_of_the_whole_weight(nested, columns, storage):
    weight = layer(1000, columns, compress_statistics=nested, quant_storage=storage).weight
    table = layer(1000, columns, compress_statistics=nested, quant_storage=storage).dequantize(torch.float16)
    rows = DecodedRows(weight, torch.float16)
    assert (rows.shape, rows.dtype, rows.device) == (table.shape, table.dtype, table.device)
    for start, stop in ((0, 256), (256, 1000), (3, 70), (999, 1000), (0, 1000), (5, 5)):
        assert torch.equal(rows[start:stop], table[start:stop])
    codes, state = rows_of(weight.data, weight.quant_state, slice(256, 512))
    assert codes.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert state.absmax.untyped_storage().data_ptr() == weight.quant_state.absmax.untyped_storage().data_ptr()


def test_one_buffer_holds_all_slices():
    rows = DecodedRows(layer().weight, torch.float32)
    assert rows[0:256].data_ptr() == rows[256:512].data_ptr()


def test_anything_else_is_refused():
    rows = DecodedRows(layer().weight, torch.float32)
    for asked in (lambda: rows[0], lambda: rows[::2], lambda: rows.t(), lambda: rows + 1):
        with pytest.raises(UserError, match=r"output layer: expected slices of rows"):
            asked()


@pytest.mark.parametrize("bias", [True, False])
def test_product_by_rows_is_the_product(small_rows, bias):
    head = layer(bias=bias)
    x = torch.randn(3, 5, 64, requires_grad=True)
    weight = head.dequantize()
    expected = nn.functional.linear(x, weight, head.bias)
    y = head(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(ours, grad @ weight)


def test_product_decodes_rows_only(small_rows, monkeypatch):
    head, spy = layer(), Spy(monkeypatch)
    x = torch.randn(3, 64, requires_grad=True)
    head(x).sum().backward()
    assert spy.sizes
    assert max(spy.sizes) == 256 * 64


# --- models


@BOTH
def test_both_ends_are_4_bit_and_shared_as_before(name, tied):
    model = quantized(name, tied)
    embedding, head = ends(model)
    assert (embedding.weight is head.weight) == tied == head.is_tied
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoded(name, tied)(ids).logits, rtol=1e-4, atol=1e-5)


@BOTH
def test_off_by_default(name, tied):
    model = qlora.quantize_model(tiny_model(name, tie_word_embeddings=tied, **SIZES), NF4Config())
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear


@BOTH
def test_loading_saving_and_reloading(name, tied, tmp_path):
    save_tiny(name, tmp_path / "float", tie_word_embeddings=tied, **SIZES)
    model = qlora.load_pretrained_4bit(tmp_path / "float", quantize_embeddings=True, dtype=torch.float32)
    embedding, head = ends(model)
    assert (embedding.weight is head.weight) == tied
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(quantized(name, tied)(ids).logits, expected)
    model.save_pretrained(tmp_path / "4bit")
    stored = load_file(tmp_path / "4bit" / "model.safetensors")
    assert any(key.startswith("lm_head.") for key in stored) != tied
    assert any(key.endswith(("embeddings.weight.absmax", "embed_tokens.weight.absmax")) for key in stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit", dtype=torch.float32)
    embedding, head = ends(again)
    assert (embedding.weight is head.weight) == tied == head.is_tied
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    again.save_pretrained(tmp_path / "again")
    assert stored.keys() == load_file(tmp_path / "again" / "model.safetensors").keys()


@BOTH
def test_state_dict_goes_back_and_forth(name, tied, tmp_path):
    model, other = quantized(name, tied), quantized(name, tied)
    for module in other.modules():
        if isinstance(module, qlora.Linear4bit | Embedding4bit):
            module.weight.data.zero_()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)
    embedding, head = ends(other)
    assert (embedding.weight is head.weight) == tied


@BOTH
def test_dequantized_model_is_an_ordinary_one(name, tied, tmp_path):
    model = decoded(name, tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(embedding), type(head)) == (nn.Embedding, nn.Linear)
    assert (embedding.weight is head.weight) == tied
    model.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@BOTH
def test_generates_the_same_text(name, tied):
    ids = tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ours = qlora.optimize_model(quantized(name, tied, made=writing_model)).generate(ids, **options)
    decoded_one = qlora.dequantize_model(quantized(name, tied, made=writing_model))
    assert torch.equal(ours, decoded_one.generate(ids, **options))
    assert ours[:, ids.shape[1] :].unique().numel() > 3


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_of_trl_and_its_gradients(name, tied, dtype, monkeypatch):
    """The fused loss on the 4-bit output layer is that on its decoded weight, and decodes a tile at a time."""
    tile = 256
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tile)

    def loss_and_grads(model, spied):
        qlora.optimize_model(qlora.prepare_model_for_training(model))
        torch.manual_seed(4)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS[name], init_lora_weights=False)
        model = get_peft_model(model, config).train()
        trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
        ids = tokens(3, 33)
        spy = Spy(monkeypatch) if spied else None
        loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        loss.backward()
        if spy is not None:
            assert max(spy.sizes) == max(tile * 64, 4 * 64 * 64)
        return loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    float_model = decoded(name, tied).to(dtype)
    loss, grads = loss_and_grads(quantized(name, tied, dtype), spied=True)
    expected, expected_grads = loss_and_grads(float_model, spied=False)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2e-3}
    torch.testing.assert_close(loss, expected, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], **tolerance)


def test_adapters_stay_off_the_output_layer():
    model = get_peft_model(quantized("llama", False), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(model.get_base_model().lm_head, OutputLayer4bit)


def test_a_named_end_stays_float_and_so_does_what_is_tied_to_it():
    tied = quantized("bloom", True, modules_to_not_convert=["lm_head"])
    assert type(tied.get_input_embeddings()) is nn.Embedding
    assert type(tied.get_output_embeddings()) is nn.Linear
    untied = quantized("llama", False, modules_to_not_convert=["lm_head"])
    assert isinstance(untied.get_input_embeddings(), Embedding4bit)
    assert type(untied.get_output_embeddings()) is nn.Linear


def test_merging_onto_a_base_whose_embeddings_were_4_bit(tmp_path):
    save_tiny("bloom", tmp_path / "float", **SIZES)
    config = LoraConfig(target_modules=TARGETS["bloom"], init_lora_weights=False)
    model = get_peft_model(quantized("bloom", True), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = str(tmp_path / "float")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    ids = tokens()
    for onto in ("dequantized", "4bit"):
        folder = tmp_path / onto
        folder.mkdir()
        how = NF4Config(quantize_embeddings=True)
        arguments = (tmp_path / "float", tmp_path / "adapter", folder)
        qlora.merge_adapter(*arguments, onto=onto, dtype=torch.float32, config=how)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert isinstance(merged.get_output_embeddings(), OutputLayer4bit) == (onto == "4bit")
        if onto == "dequantized":
            with torch.no_grad():
                torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 700])
def test_on_the_gpu_rows_and_products_are_those_of_the_decoded_weight(small_rows, count):
    head = layer(1000, 1024).to("cuda")
    weight = head.dequantize(torch.float16)
    rows = DecodedRows(head.weight, torch.float16)
    assert torch.equal(rows[256:1000], weight[256:1000])
    x = torch.randn(count, 1024, dtype=torch.float16, device="cuda", requires_grad=True)
    y, expected = head(x), x @ weight.t()
    torch.testing.assert_close(y, expected, rtol=5e-3, atol=5e-3)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(ours, grad @ weight, rtol=1e-2, atol=2e-2)


def test_messages(tmp_path):
    with pytest.raises(UserError, match=r"quantize_embeddings: .* multiples of 64, got rows of 48"):
        qlora.quantize_model(tiny_model("bloom"), NF4Config(quantize_embeddings=True))
    with pytest.raises(UserError, match=r"quantize_embeddings: expected one of False, True, got 'yes'"):
        NF4Config(quantize_embeddings="yes")
    model = quantized("bloom", True)
    with pytest.raises(UserError, match=r"model: expected a float embedding and output layer, as bitsandbytes'"):
        qlora.as_bitsandbytes(model)
    with pytest.raises(UserError, match=r"expected a float output layer for sharding"):
        qlora.prepare_for_fsdp(model)
    save_tiny("bloom", tmp_path, **SIZES)
    qlora.load_pretrained_4bit(tmp_path).save_pretrained(tmp_path / "4bit")
    with pytest.raises(UserError, match=r"quantize_embeddings: expected False, as .* was saved with, got True"):
        qlora.load_pretrained_4bit(tmp_path / "4bit", quantize_embeddings=True)


def test_an_older_trl_is_refused(monkeypatch):
    from qlora.integrations.trl import join_trl

    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    join_trl.cache_clear()
    with pytest.raises(UserError, match=r"quantize_embeddings: expected TRL 1.16"):
        quantized("bloom", True)
    join_trl.cache_clear()
