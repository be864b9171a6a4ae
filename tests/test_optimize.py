"""optimize_model against the model as it was: logits and gradients, padding, packing, caches, dtypes, recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tokens, writing_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from qkernels.errors import UserError
from qlora import NF4Config, optimize_model, prepare_model_for_training, quantize_model
from qlora.optimize import can_optimize
from qlora.optimize.alibi import alibi_attention, alibi_bias, alibi_slopes
from qlora.optimize.cache import CACHE
from qlora.optimize.recompute import RECOMPUTE

# The tolerance for float32: a few roundings of sums over tens of terms.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
FAMILIES = ["bloom", "llama", "mistral"]


def stirred(model):
    """Norms, biases and all: fresh ones are constants, which hide errors."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def pair(family: str, made=tiny_model, **options):
    plain = stirred(made(family))
    return plain, optimize_model(copy.deepcopy(plain), **options)


def gradients(model, inputs, real=None, **kwargs):
    """Loss over the real tokens, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(inputs, **kwargs).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten(), reduction="none"
    )
    if real is not None:
        losses = losses[(real[:, 1:] * real[:, :-1]).flatten().bool()]
    losses.mean().backward()
    return losses.mean().detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, **tolerance):
    loss, grads = first
    other_loss, other_grads = second
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(loss, other_loss, **tolerance)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def padded_mask(side: str) -> torch.Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    if side == "right":
        mask[1, 6:] = 0
    else:
        mask[1, :3] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_models(family):
    plain, optimized = pair(family)
    assert_same(gradients(plain, tokens()), gradients(optimized, tokens()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    plain, optimized = pair(family)
    mask = padded_mask(side)
    arguments = {"real": mask, "attention_mask": mask}
    assert_same(gradients(plain, tokens(), **arguments), gradients(optimized, tokens(), **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_do_not_see_each_other(family):
    plain, optimized = pair(family)
    lengths = (4, 1, 7)
    texts = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = optimized(texts, position_ids=positions, use_cache=False).logits
    apart = torch.cat([plain(text).logits for text in texts.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, **CLOSE)
    packed.square().mean().backward()
    apart.square().mean().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(optimized.get_parameter(name).grad, parameter.grad, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(family, cache):
    plain, optimized = pair(family, writing_model)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": padded_mask("left"), "pad_token_id": 0}
    expected = plain.generate(tokens(), **settings)
    implementation = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    assert optimized.generate(tokens(), **settings, **implementation).tolist() == expected.tolist()
    assert expected.shape == (2, 17)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_in_two_helpings(family):
    """A cache that is not empty, and more than one token after it."""
    plain, optimized = pair(family)
    with torch.no_grad():
        first = optimized(tokens()[:, :4], use_cache=True)
        cache = {name: value for name, value in first.items() if name in ("cache", "past_key_values")}
        second = optimized(tokens()[:, 4:], use_cache=True, **cache)
        expected = plain(tokens()).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_err_no_more_than_the_model_did(family, dtype):
    plain, optimized = pair(family)
    ids = tokens(3, 40)
    truth = plain.double()(ids).logits
    plain, optimized = plain.to(dtype), optimized.to(dtype)
    theirs, ours = ((model(ids).logits.double() - truth) for model in (plain, optimized))
    for measure in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
        assert measure(ours) <= 1.25 * measure(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "is_on"), [(torch.bfloat16, False), (torch.float32, True)])
def test_autocast_is_off_where_it_would_only_cast(family, dtype, is_on):
    """Off inside a bfloat16 model where it is to bfloat16; another dtype than the model's is the user's wish."""
    _, optimized = pair(family)
    optimized.to(dtype)
    found = []
    for linear in (module for module in optimized.base_model.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = optimized(tokens(), output_hidden_states=True)
    assert set(found) == {is_on}
    assert is_on or {state.dtype for state in outputs.hidden_states} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("offload", [False, True])
def test_recomputation_changes_nothing(family, recompute, offload):
    plain, optimized = pair(family, recompute=recompute, offload=offload)
    optimized.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(plain.train(), tokens()), gradients(optimized, tokens()))


def quantized(family: str, **options):
    model = quantize_model(stirred(tiny_model(family)), NF4Config())
    optimize_model(prepare_model_for_training(model), **options)
    targets = "all-linear" if family != "bloom" else ["query_key_value"]
    torch.manual_seed(4)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    )


@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_adapters_on_four_bits(family, recompute):
    plain = quantized(family).merge_and_unload()  # the float model that they stand for
    ours = quantized(family, recompute=recompute, kept_blocks=1).train()
    torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, **CLOSE)
    _, grads = gradients(ours, tokens())
    assert grads
    assert all("lora_" in name for name in grads)
    _, all_kept = gradients(quantized(family, recompute="nothing").train(), tokens())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, all_kept[name], **CLOSE)


class Products(TorchDispatchMode):
    """Counts the products with 4-bit weights; with an adapter they are an operator of their own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.qkernels.gemm_4bit.default, torch.ops.qkernels.lora_4bit.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked_first", [True, False])
def test_the_first_block_computes_no_gradient_of_the_embedding(family, asked_first):
    """Though trainers ask for one, for another form of checkpointing; the adapters' are the same."""
    plain = stirred(tiny_model(family))
    tuned = copy.deepcopy(plain)
    for model in (plain, tuned) if asked_first else (plain,):
        prepare_model_for_training(model)
    optimize_model(tuned)
    if not asked_first:
        prepare_model_for_training(tuned)
    seen = []
    found = []
    for model in (plain, tuned):
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
        torch.manual_seed(4)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config).train()
        adapted.enable_input_require_grads()
        found.append(gradients(adapted, tokens()))
    assert seen == [True, False]
    assert len(found[0][1]) >= 16
    assert_same(*found)


@pytest.mark.parametrize(
    ("recompute", "kept", "products"), [("block", 0, 6), ("parts", 0, 4), ("block", 1, 3), ("nothing", 0, 0)]
)
def test_what_the_backward_pass_computes_again(recompute, kept, products):
    """Of the eight products of two blocks; those at the end of a block or a part are spared."""
    model = quantized("bloom", recompute=recompute, kept_blocks=kept).train()
    loss = model(tokens(), labels=tokens()).loss
    with Products() as again:
        loss.backward()
    assert again.count == products


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_tuples(family):
    plain, optimized = pair(family)
    for ours, theirs in zip(
        optimized(tokens(), output_hidden_states=True, return_dict=False)[-1],
        plain(tokens(), output_hidden_states=True, return_dict=False)[-1],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_as_what_it_is(family, tmp_path):
    plain, optimized = pair(family)
    optimized.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert type(again) is type(plain)
    torch.testing.assert_close(again(tokens()).logits, plain(tokens()).logits)
    assert copy.deepcopy(optimized)(tokens()).logits.equal(optimized(tokens()).logits)


@pytest.mark.parametrize("off", ["norm", "activation", "autocast", "attention"])
def test_each_part_can_be_left_out(off):
    plain, optimized = pair("llama", **{off: False})
    torch.testing.assert_close(optimized(tokens()).logits, plain(tokens()).logits, **CLOSE)
    with torch.no_grad():
        classes = {type(module).__module__.split(".")[0] for module in optimized.modules()}
    assert "qlora" in classes
    _, bloom = pair("bloom", attention=False, autocast=False)
    assert type(bloom.transformer.h[0].self_attention).__module__.startswith("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_left_out_where_blocks_run_twice(family):
    plain, optimized = pair(family)
    optimized.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cache = DynamicCache(config=optimized.config)
    assert_same(gradients(plain, tokens()), gradients(optimized, tokens(), use_cache=True, **{CACHE: cache}))
    assert cache.get_seq_length() == 0


def test_residuals_after_the_normalization():
    plain = stirred(tiny_model("bloom", apply_residual_connection_post_layernorm=True))
    optimized = optimize_model(copy.deepcopy(plain))
    torch.testing.assert_close(optimized(tokens()).logits, plain(tokens()).logits, **CLOSE)


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 32])
def test_slopes_and_bias_are_transformers(heads):
    mask = padded_mask("left")
    theirs = build_alibi_tensor(mask, heads, torch.float32).view(2, heads, 9)
    bias = alibi_bias(heads, torch.float32, mask.device, queries=1, keys=9, past=8, attention_mask=mask).bias[:, :, 0]
    real = mask[:, None].expand_as(bias).bool()
    assert bias[real].equal(theirs[real])
    assert (bias[~real] == torch.finfo(torch.float32).min / 2).all()
    assert alibi_slopes(heads).shape == (heads,)


def test_rows_of_the_bias_are_aligned():
    bias = alibi_bias(4, torch.float16, torch.device("cpu"), queries=5, keys=5).bias
    assert bias.stride(-2) % 16 == 0
    assert alibi_attention(
        *torch.randn(3, 2, 4, 5, 8, dtype=torch.float16),
        bias=alibi_bias(4, torch.float16, torch.device("cpu"), queries=5, keys=5),
    ).shape == (2, 4, 5, 8)


def test_gelu_is_finite_where_blooms_is_not():
    """transformers' own derivative is 0 * inf in float16 where 0.1 x^2 overflows."""
    plain, optimized = pair("bloom")
    x = torch.tensor([1000.0], dtype=torch.float16, requires_grad=True)
    theirs, ours = (torch.autograd.grad(model.transformer.h[0].mlp.gelu_impl(x), x)[0] for model in (plain, optimized))
    assert theirs.isnan()
    assert ours == 1


def test_which_models_are_known():
    assert all(can_optimize(tiny_model(family)) for family in FAMILIES)
    assert not can_optimize(torch.nn.Linear(2, 2))


def test_refusals():
    with pytest.raises(UserError, match="Bloom, Llama"):
        optimize_model(torch.nn.Linear(2, 2))
    model = tiny_model("bloom")
    with pytest.raises(UserError, match="recompute: expected one of"):
        optimize_model(model, recompute="all")
    with pytest.raises(UserError, match="0 to 2"):
        optimize_model(model, kept_blocks=3)
    with pytest.raises(UserError, match="attention and autocast both on"):
        optimize_model(model, attention=False)
    with pytest.raises(UserError, match="not sliced"):
        optimize_model(tiny_model("bloom", pretraining_tp=2, slow_but_exact=True))
    optimize_model(model)
    with pytest.raises(UserError, match="output_attentions"):
        model(tokens(), output_attentions=True)
    cache = DynamicCache(config=model.config)
    with pytest.raises(UserError, match="position_ids"):
        model(tokens(), position_ids=torch.arange(9)[None], **{CACHE: cache})
    replaced = tiny_model("llama")
    replaced.model.layers[0].forward = lambda *args: None
    with pytest.raises(UserError, match="was replaced"):
        optimize_model(replaced)
