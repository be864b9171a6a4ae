"""The loss is TRL's, joined with the output layer: held to what this project relies on, sizes and float16 included."""

from __future__ import annotations

import pytest
import torch
from models import TARGETS, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qkernels import aot
from qkernels.tuning import LaunchConfig
from qlora import NF4Config, optimize_model, prepare_model_for_training, quantize_model
from qlora.integrations import trl as trl_integration

VOCABULARY = 1000
TILE = 64
ROWS, LENGTH = 3, 33


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                # A transposed or expanded view of the weight is no memory of its own.
                self.elements = max(
                    self.elements, min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.itemsize)
                )
        return out


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE)


def tuned(name: str, dtype: torch.dtype):
    model = quantize_model(tiny_model(name, vocab_size=VOCABULARY).to(dtype), NF4Config())
    optimize_model(prepare_model_for_training(model))
    torch.manual_seed(4)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS[name], init_lora_weights=False)
    model = get_peft_model(model, config).train()
    trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = tokens(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, loss, scale=1.0):
    model.zero_grad()
    (loss * scale).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_it_is_the_loss_over_all_logits(name):
    model = tuned(name, torch.float32)
    fused = model(**batch(), fused_lm_head=True).loss
    whole = model(**batch()).loss
    torch.testing.assert_close(fused, whole)
    ours, theirs = gradients(model, fused), gradients(model, whole)
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bloom", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_under_a_loss_scale(name, dtype):
    """The tied 16-bit embedding as it is; the gradients of a float32 model, within the dtype."""
    expected = tuned(name, torch.float32)
    grads = gradients(expected, expected(**batch(), fused_lm_head=True).loss)
    model = tuned(name, dtype)
    assert model.get_output_embeddings().weight.dtype == dtype
    with torch.autocast("cpu", dtype):
        loss = model(**batch(), fused_lm_head=True).loss
    assert loss.dtype == torch.float32
    for key, grad in gradients(model, loss, scale=2.0**16 if dtype == torch.float16 else 1.0).items():
        assert grad.dtype == torch.float32
        assert F.cosine_similarity(grad.flatten(), grads[key].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_no_tensor_of_all_logits_exists(name):
    model = tuned(name, torch.float16)
    with Largest() as largest, torch.autocast("cpu", torch.float16):
        model(**batch(), fused_lm_head=True).loss.backward()
    assert 0 < largest.elements < ROWS * LENGTH * VOCABULARY
    with Largest() as largest, torch.autocast("cpu", torch.float16):
        model(**batch()).loss.backward()
    assert largest.elements >= ROWS * LENGTH * VOCABULARY


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_its_kernels_are_code_for_a_t4(direction):
    """In float16 with the outputs that `SFTTrainer` asks for: no spills, no bfloat16, no product of their own."""
    kernel = getattr(chunked_logprob, f"_{direction}_kernel")
    kinds = {"mm_ptr": "*fp16", "targets_ptr": "*i64"} | dict.fromkeys(("logit_scale", "softcap", "inv_t"), "fp32")
    kinds |= dict.fromkeys(("mm_stride", "vocab_start", "n_cols"), "i32")
    flags = {"HAS_ENTROPY": True, "HAS_IS_TOP1": True, "HAS_LOGPROB_GRAD": True, "BLOCK_SIZE": 1024}
    constants = {name: flags.get(name, False) for name in kernel.arg_names if name.isupper()}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if not name.isupper()}
    config = LaunchConfig(rows=1, num_warps=4)  # Triton's default, which TRL leaves as it is
    resources = aot.inspect(aot.Variant(f"TRL's {direction}", kernel, signature, constants, config), "sm_75")
    assert resources.faults() == []
    assert not resources.has_dot


@pytest.mark.parametrize(("words", "lent", "tiles"), [(TILE, TILE, 16), (TILE, 2 * TILE, 16), (900, 700, 2)])
def test_a_tile_lies_in_memory_that_is_lent(words, lent, tiles, monkeypatch):
    """Which may be smaller than TRL's tile, and then there are more of them."""
    rows = ROWS * (LENGTH - 1)  # without Triton those without a label too
    memory = torch.zeros(rows * lent * 4 + 1, dtype=torch.uint8)
    products = []
    fold = chunked_logprob._forward_tile

    def counted(tile, *arguments, **kwargs):
        products.append(tile.data_ptr() == memory.data_ptr())
        fold(tile, *arguments, **kwargs)

    monkeypatch.setattr(chunked_logprob, "_forward_tile", counted)
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", words)
    monkeypatch.setattr(trl_integration, "LEAST_WORDS", 256)
    model = tuned("bloom", torch.float32)
    expected = model(**batch(), fused_lm_head=True).loss
    expected = expected, gradients(model, expected)
    assert not any(products)
    products.clear()
    monkeypatch.setattr(trl_integration, "idle_memory", lambda device: memory)
    loss = model(**batch(), fused_lm_head=True).loss
    assert products == [True] * tiles
    memory.fill_(255)  # not a number: nothing is expected to be there still
    grads = gradients(model, loss)
    assert not memory[: rows * TILE * 4].eq(255).all()
    torch.testing.assert_close(loss, expected[0], rtol=0.0 if words == TILE else 1e-6, atol=0.0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-5, atol=1e-7)


def test_memory_that_is_too_small_is_left_alone(monkeypatch):
    memory = torch.full((1000,), 7, dtype=torch.uint8)
    monkeypatch.setattr(trl_integration, "idle_memory", lambda device: memory)
    model = tuned("bloom", torch.float32)
    gradients(model, model(**batch(), fused_lm_head=True).loss)
    assert memory.eq(7).all()
