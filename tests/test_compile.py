"""torch.compile of 4-bit models with adapters, plain and optimized: one graph, whatever the length, the same numbers.

On the CPU with the "aot_eager" backend: what is traced, and how often, is the same as with the default one.
"""

from __future__ import annotations

import pytest
import torch
from models import TARGETS, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from qlora import NF4Config, optimize_model, quantize_model

LENGTHS = (9, 13)
ONE_BLOCK = {"llama": {"num_hidden_layers": 1}, "bloom": {"n_layer": 1}}  # tracing takes its time for each


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kinds(*quick: str) -> pytest.MarkDecorator:
    """The models of a test; tracing takes long, so only `quick` ones are in every run."""
    names = [f"{kind} {name}" for name in ("llama", "bloom") for kind in ("plain", "optimized")]
    marked = [pytest.param(name, marks=() if name in quick else pytest.mark.slow, id=name) for name in names]
    return pytest.mark.parametrize("model", marked, indirect=True)


@pytest.fixture
def model(request):
    kind, name = request.param.split()
    model = quantize_model(tiny_model(name, **ONE_BLOCK[name]), NF4Config())
    if kind == "optimized":
        optimize_model(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[name]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, forward, length):
    """Logits, and the gradients of the adapters."""
    model.zero_grad()
    logits = forward(input_ids=tokens(2, length), use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@kinds("optimized llama", "plain bloom")
def test_the_whole_model_is_one_graph_for_every_length(model):
    expected = [step(model, model, length) for length in LENGTHS]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length, (logits, gradients) in zip(LENGTHS, expected, strict=True):
        found, found_gradients = step(model, compiled, length)
        counts.append(counter.frame_count)
        torch.testing.assert_close(found, logits)
        torch.testing.assert_close(found_gradients, gradients)
    assert len(set(counts)) == 1, counts  # compiled at the first length and never again


@kinds()
def test_after_the_second_length_nothing_is_compiled_again(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    counts = []
    for length in (*LENGTHS, 30):
        step(model, compiled, length)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2], counts


@kinds("plain llama", "optimized bloom")
def test_a_block_alone_is_one_graph(model):
    core = model.get_base_model()
    block = core.model.layers[0] if hasattr(core, "model") else core.transformer.h[0]
    counter = CompileCounterWithBackend("aot_eager")
    expected = [step(model, model, length)[0] for length in LENGTHS]
    block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=True)
    found, counts = [], []
    for length in LENGTHS:
        found.append(step(model, model, length)[0])
        counts.append(counter.frame_count)
    torch.testing.assert_close(found, expected)
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@kinds("plain llama", "optimized bloom")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_the_gpu_with_the_default_backend(model, dtype):
    model = model.cuda()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        ids = tokens(2, length).cuda()
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits, rtol=2e-2, atol=2e-2)
