"""Embedding4bit: look-ups equal to the dequantized table's, rows decoded alone, saving, padding, the messages."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

import qlora.embedding4bit
from qkernels.errors import UserError
from qlora.embedding4bit import Embedding4bit, EmbeddingFP4, EmbeddingNF4

ROWS = 50
FORMATS = [
    pytest.param(dim, nested, storage, id=f"{dim}-{'nested' if nested else 'plain'}-{storage}")
    for dim in (64, 128, 100, 33)
    for nested in (False, True)
    for storage in (torch.uint8, torch.bfloat16)
]


def embedding(dim: int = 64, **options) -> nn.Embedding:
    return nn.Embedding(ROWS, dim, **options)


@pytest.mark.parametrize(("dim", "nested", "storage"), FORMATS)
def test_look_up_is_that_of_the_dequantized_table(dim, nested, storage):
    layer = EmbeddingNF4.from_embedding(embedding(dim), compress_statistics=nested, quant_storage=storage)
    table = layer.dequantize()
    for rows in (torch.randint(0, ROWS, (2, 5)), torch.tensor(7), torch.empty(0, 3, dtype=torch.int64)):
        assert torch.equal(layer(rows), table[rows])
    assert torch.equal(layer(torch.arange(ROWS, dtype=torch.int32)), table)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_bitsandbytes(quant_type):
    bnb = pytest.importorskip("bitsandbytes")
    source = embedding(128)
    theirs = bnb.nn.Embedding4bit(ROWS, 128, quant_type=quant_type)
    theirs.load_state_dict(source.state_dict())
    ours = Embedding4bit(ROWS, 128, quant_type=quant_type)
    ours.load_state_dict(source.state_dict())
    rows = torch.randint(0, ROWS, (3, 4))
    assert torch.equal(ours.to("cpu")(rows), theirs.to("cpu")(rows))


@pytest.mark.parametrize(("dim", "expected"), [(64, 5 * 64), (100, ROWS * 100)])
def test_only_the_rows_asked_for_are_decoded_where_rows_are_whole_blocks(monkeypatch, dim, expected):
    layer = EmbeddingNF4.from_embedding(embedding(dim))
    decoded = []
    for module in (qlora.embedding4bit, qlora.module4bit):
        original = module.dequantize_4bit
        spy = lambda A, state, original=original: decoded.append(state.shape.numel()) or original(A, state)  # noqa: E731
        monkeypatch.setattr(module, "dequantize_4bit", spy)
    layer(torch.tensor([3, 3, 0, 49, 1]))
    assert decoded == [expected]


@pytest.mark.parametrize(("dim", "nested", "storage"), FORMATS)
def test_can_be_saved_and_loaded(tmp_path, dim, nested, storage):
    layer = EmbeddingNF4.from_embedding(embedding(dim), compress_statistics=nested, quant_storage=storage)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "table.safetensors")
    state = safetensors.torch.load_file(tmp_path / "table.safetensors")
    rows = torch.arange(ROWS)
    for loaded in (EmbeddingFP4(ROWS, dim), EmbeddingFP4(ROWS, dim).to("cpu"), EmbeddingNF4(ROWS, dim, device="meta")):
        assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(loaded(rows), layer(rows))


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("nested", [False, True])
def test_padding_row_stays_exactly_zero(dim, nested):
    layer = EmbeddingNF4.from_embedding(embedding(dim, padding_idx=3), compress_statistics=nested)
    assert layer.padding_idx == 3
    assert "padding_idx=3" in repr(layer)
    assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, dim))
    made_here = EmbeddingNF4(ROWS, dim, padding_idx=-1, compress_statistics=nested).to("cpu")
    assert torch.equal(made_here(torch.tensor([ROWS - 1])), torch.zeros(1, dim))


@pytest.mark.parametrize("dim", [64, 100])
def test_dtype_of_the_output_follows_casts_and_the_codes_do_not(dim):
    source = embedding(dim)
    layer = EmbeddingNF4.from_embedding(source, quant_storage=torch.float16)
    before = copy.deepcopy(layer.state_dict())
    rows = torch.arange(ROWS)
    for cast, dtype in ((layer.half, torch.float16), (layer.bfloat16, torch.bfloat16), (layer.float, torch.float32)):
        cast()
        assert layer(rows).dtype == dtype
        # Rounded once from the exact value, not from the last dtype's.
        assert torch.equal(layer(rows), layer.dequantize(dtype))
    layer.to("meta").to_empty(device="cpu").load_state_dict(before)
    assert torch.equal(layer(rows), EmbeddingNF4.from_embedding(source)(rows))
    assert EmbeddingNF4.from_embedding(source.half())(rows).dtype == torch.float16


def test_the_source_is_left_as_it_is():
    source = embedding().eval()
    before = source.weight.detach().clone()
    layer = Embedding4bit.from_embedding(source, blocksize=32)
    assert torch.equal(source.weight, before)
    assert (layer.training, layer.weight.blocksize, layer.weight.quant_type) == (False, 32, "nf4")
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_compiles_without_graph_breaks():
    layer = EmbeddingNF4.from_embedding(embedding())
    rows = torch.randint(0, ROWS, (2, 5))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(rows), layer(rows))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "nested", "storage"), FORMATS)
def test_on_the_gpu(dim, nested, storage):
    layer = EmbeddingNF4.from_embedding(
        embedding(dim), compress_statistics=nested, quant_storage=storage, device="cuda"
    )
    rows = torch.randint(0, ROWS, (2, 5), device="cuda")
    assert torch.equal(layer(rows), layer.dequantize()[rows])
    assert torch.equal(layer(rows).cpu(), layer.cpu()(rows.cpu()))


def test_messages():
    with pytest.raises(UserError, match=r"embedding: expected a float torch.nn.Embedding .* got Linear"):
        Embedding4bit.from_embedding(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"got Embedding with max_norm=1.0"):
        Embedding4bit.from_embedding(embedding(max_norm=1.0))
    with pytest.raises(UserError, match=r"quant_type: expected 'fp4' for EmbeddingFP4, got 'nf4'"):
        EmbeddingFP4.from_embedding(embedding(), quant_type="nf4")
    with pytest.raises(UserError, match=r"weight of EmbeddingNF4: expected a quantized weight, got torch.float32"):
        EmbeddingNF4(ROWS, 64)(torch.tensor([0]))
    source = embedding()
    source.weight.data[4, :2] = torch.nan
    with pytest.raises(UserError, match=r"^weight of EmbeddingNF4: .*\b2\b"):
        EmbeddingNF4.from_embedding(source)
    with pytest.raises(IndexError):
        EmbeddingNF4.from_embedding(embedding())(torch.tensor([ROWS]))
