"""What a product costs the host: how much Python runs at a call that has been made before, and that nothing is missed.

CPU tensors pass for a GPU's here, and a launch writes down what it was given.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import CudaLauncher

from qkernels import UserError, functional, known, matmul_4bit, ops, ops_cuda
from qkernels.kernels import _launch, matmul_skinny
from qkernels.kernels._launch import Launcher
from qlora import Linear4bit

K, N = 256, 128
# Python functions that a call of a layer enters, `nn.Module`'s two among them.
MOST_CALLS, MOST_CALLS_IN_TRAINING = 16, 17
# The kernel's arguments behind a launch's own nine.
X, PACKED, ABSMAX, ABSMAX_8BIT, CODE, OFFSET, BIAS, OUT, ROWS = range(9, 18)


class Compiled:
    """A compiled kernel that only writes down its arguments.

    Attributes:
        launched: the arguments of its launches.
        asked: of the launches that went through Triton, which returns the kernel.
    """

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launched, self.asked = [], []

    def run(self, *arguments):
        self.launched.append(arguments)

    def first(self, launcher, *arguments):
        self.asked.append(arguments)
        return self


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(torch.nn.Linear(K, N, dtype=torch.float16))
    return layer.requires_grad_(False)


@pytest.fixture
def compiled(monkeypatch, layer):
    compiled = Compiled()
    monkeypatch.setattr(Launcher, "_first", lambda *arguments: compiled.first(*arguments))
    for launcher in matmul_skinny._LAUNCHERS.values():
        monkeypatch.setattr(launcher, "_variants", {})
    monkeypatch.setattr(_launch, "_PASSES_SCRATCH", False)
    for module in (ops, functional):
        monkeypatch.setattr(
            module, "in_eager_mode", lambda x: type(x) in ops.PLAIN and not x.is_meta and ops.nothing_listens()
        )
    monkeypatch.setattr(ops_cuda, "capability_of", lambda index: (9, 0))
    monkeypatch.setattr(
        ops_cuda, "_empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # what a CPU tensor says
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    matmul_skinny.skinny_launch.cache_clear()
    yield compiled
    matmul_skinny.skinny_launch.cache_clear()


def given(*shape, dtype=torch.float16):
    return torch.randn(*shape, dtype=dtype)


def entered(call):
    """How often each Python function was entered during a call, by file and name."""
    counts = Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename != __file__:
            counts[frame.f_code.co_filename.rsplit("/", 1)[-1], frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_call_made_before_is_one_launch_and_little_else(layer, compiled, bias, training):
    if not bias:
        layer.bias = None
    x = given(1, K).requires_grad_(training)
    layer(x), layer(x)
    compiled.launched.clear()
    counts = entered(lambda: layer(x))
    assert len(compiled.launched) == 1
    assert not [name for name in counts if name[0] in ("checks.py", "dispatch.py", "skinny.py")]
    assert counts["ops.py", "nothing_listens"] == 1
    assert counts.total() <= (MOST_CALLS_IN_TRAINING if training else MOST_CALLS), counts


def test_a_launch_is_given_where_everything_lies_at_that_time(layer, compiled):
    x, state = given(1, K), layer.weight.quant_state
    layer(x), layer(x)
    other = given(2, 1, K)[1]
    layer.weight.data = layer.weight.data.clone()
    state.absmax.data = state.absmax.data.clone()
    state.state2.absmax = state.state2.absmax.clone()
    layer.bias.data = layer.bias.data.clone()
    y = layer(other)
    arguments = compiled.launched[-1]
    expected = {
        X: other,
        PACKED: layer.weight.data,
        ABSMAX: state.state2.absmax,
        ABSMAX_8BIT: state.absmax,
        CODE: state.state2.code,
        OFFSET: state.offset,
        BIAS: layer.bias.data,
        OUT: y,
    }
    assert {place: arguments[place] for place in expected} == {
        place: tensor.data_ptr() for place, tensor in expected.items()
    }
    assert arguments[ROWS] == 1
    assert arguments[3:6] == ("stream", "function", "metadata")


def test_another_weight_in_the_layer_s_place_is_used(layer, compiled):
    x = given(1, K)
    layer(x), layer(x)
    layer.weight = copy.deepcopy(layer.weight)
    layer(x)
    assert compiled.launched[-1][PACKED] == layer.weight.data.data_ptr()


def test_x_of_another_kind_is_another_launch(layer, compiled):
    for shape, rows in (((1, K), 1), ((K,), 1), ((2, 3, K), 6), ((6, K), 6)):
        for dtype in (torch.float16, torch.bfloat16):
            for _ in range(3):
                y = layer(given(*shape, dtype=dtype))
            assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)
            assert compiled.launched[-1][ROWS] == rows


def test_x_that_is_not_contiguous_or_aligned_is_copied(layer, compiled):
    whole = given(3, K + 1)
    layer(given(3, K)), layer(given(3, K))
    for count, x in enumerate((whole[:, 1:], whole.view(-1)[1 : 1 + 3 * K].view(3, K)), start=2):
        layer(x)
        assert len(compiled.launched) == count
        assert compiled.launched[-1][X] not in (x.data_ptr(), 0)
        assert compiled.launched[-1][X] % 16 == 0


def test_scales_that_are_not_aligned_are_launched_by_another_variant(layer, compiled):
    x, state = given(1, K), layer.weight.quant_state
    layer(x), layer(x)
    asked = len(compiled.asked)
    aligned = state.state2.absmax
    state.state2.absmax = aligned.new_empty(aligned.numel() + 1)[1:].copy_(aligned)
    layer(x)
    assert len(compiled.asked) == asked + 1
    state.state2.absmax = aligned
    layer(x)
    assert len(compiled.asked) == asked + 1


def test_what_is_wrong_is_said_at_any_call(layer, compiled):
    packed, state = layer.weight, layer.weight.quant_state
    for bias in (layer.bias, layer.bias, None, None):
        matmul_4bit(given(1, K), packed, state, bias=bias)
        with pytest.raises(UserError, match="last dimension of K = 256"):
            matmul_4bit(given(1, K + 64), packed, state)
        with pytest.raises(UserError, match=r"A\.dtype: expected torch\.float32"):
            matmul_4bit(given(1, K).int(), packed, state)
        with pytest.raises(UserError, match="A: expected the device of B, cpu, got meta"):
            matmul_4bit(given(1, K).to("meta"), packed, state, bias=bias)
        with pytest.raises(UserError, match="bias: expected shape"):
            matmul_4bit(given(1, K), packed, state, bias=given(1, N))
        with pytest.raises(UserError, match=r"A: expected a torch\.Tensor"):
            matmul_4bit([1.0], packed, state)


def test_the_dispatcher_is_asked_while_something_listens(layer, compiled):
    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    x, heard = given(1, K), []
    layer(x), layer(x)
    compiled.launched.clear()
    with Listen():
        layer(x)
    assert torch.ops.qkernels.gemm_4bit.default in heard


def test_a_gradient_is_asked_for_by_x_or_by_the_bias(layer, compiled):
    x = given(1, K)
    assert layer(x).grad_fn is None
    assert layer(x.requires_grad_()).grad_fn is not None
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.bias.requires_grad_()
    y = layer(x.detach())
    (grad,) = torch.autograd.grad(y, layer.bias, torch.ones_like(y))
    assert torch.equal(grad, torch.ones(N, dtype=torch.float16))


def test_as_many_kinds_of_x_as_there_are_lengths_are_not_kept(layer, compiled):
    for rows in range(1, 31):
        for shape in ((rows,), (rows, 1), (1, rows), (1, rows, 1)):
            layer(given(*shape, K))
    assert len(layer.weight.quant_state.checked.plans) <= known._MOST_PLANS


def test_several_threads_launch_their_own(layer, compiled):
    inputs = [given(1, K) for _ in range(8)]
    results = [[] for _ in inputs]

    def work(x, results):
        results.extend(layer(x) for _ in range(50))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = {(arguments[X], arguments[OUT]) for arguments in compiled.launched}
    for x, ys in zip(inputs, results, strict=True):
        assert len(ys) == 50
        assert all((x.data_ptr(), y.data_ptr()) in pairs for y in ys[8:])


def test_a_thread_enters_a_device_s_context_once(monkeypatch):
    entered, in_use = [], [False]
    monkeypatch.setattr(torch.cuda, "mem_get_info", entered.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use[0])

    def work():
        for device in (0, 0, 1, 1, 0):
            _launch._enter_context(device)

    for in_use[0] in (False, True, True):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert entered == [0, 1, 0] * 2


def test_a_launch_with_descriptors_enters_the_context_before_triton_makes_them(monkeypatch):
    happened = []
    monkeypatch.setattr(_launch, "_enter_context", happened.append)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    monkeypatch.setattr(Launcher, "_first", lambda *_: happened.append("launched"))
    launcher = Launcher(matmul_skinny._matmul_skinny_kernel)
    for descriptors in ((), ("descriptor",)):
        launcher((1, 1, 1), (torch.ones(1),), (), (), None, descriptors)
    assert happened == ["launched", 3, "launched"]


@pytest.mark.parametrize("scratch", [0, 128])
def test_triton_s_own_launch_is_left_out_only_where_it_adds_nothing(scratch):
    launched = []
    run = object.__new__(CudaLauncher)
    run.launch = lambda *arguments: launched.append(arguments)
    run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
    run.global_scratch_size, run.profile_scratch_size = scratch, 0
    run.global_scratch_align = run.profile_scratch_align = 1
    compiled = SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    start, between, _ = _launch._ready(compiled)
    if scratch or not triton.__version__.startswith("3.6."):
        assert start is run
        return
    start(1, 2, 3, "stream", *between, "x", "y")
    run(1, 2, 3, "stream", "function", "metadata", None, None, None, "x", "y")
    assert launched[0] == launched[1]


def test_autocast_of_the_cpu_is_asked_at_each_call(layer):
    x = torch.randn(2, K)
    plain = layer(x), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert plain[1].dtype == layer(x).dtype == torch.float32
