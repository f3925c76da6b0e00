"""The graph that is run: fewer passes over memory, the same numbers, and the plan's graph as it was."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.graph.view import Op, module_of
from halfeven.placement.execution_graph import as_planned, fused_graph
from halfeven.placement.make_plan import regions
from halfeven.quantization.model_quantizers import quantizers, set_mode
from halfeven.quantization.quantizer import Mode, Quantizer
from placement.parts import IMAGE, Attention, Residual, conv
from sweeps import crossed, sweep

INF = float("inf")


class Concatenated(nn.Module):
    """One quantizer at two places, an activation before each."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3), conv(3, 4), conv(12)

    def forward(self, x):
        return self.c(torch.cat([F.relu(self.a(x)), F.relu6(self.b(x))], 1))


class PooledAndNot(nn.Module):
    """A quantized tensor that a max pool and a convolution read."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(), conv()

    def forward(self, x):
        y = F.relu(self.stem(x))
        return self.a(F.max_pool2d(y, 2)), self.b(y)


class Passed(nn.Conv2d):
    """A convolution that changes nothing, on the grid too."""

    def __init__(self):
        super().__init__(3, 3, 1, bias=False)
        self.weight.data = torch.eye(3).reshape(3, 3, 1, 1)


def chain(*layers):
    return lambda: nn.Sequential(conv(3), *copy.deepcopy(layers), conv(8, 4))


NETS = {
    "relu": (chain(nn.ReLU()), IMAGE),
    "relu6": (chain(nn.BatchNorm2d(8), nn.ReLU6()), IMAGE),
    "hardtanh": (chain(nn.Hardtanh(-0.2, 0.3)), IMAGE),
    "relu, max pool": (chain(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), IMAGE),
    "relu6, overlapping max pool": (chain(nn.ReLU6(), nn.MaxPool2d(3, 2, 1)), IMAGE),
    "relu, max pools": (chain(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2)), IMAGE),
    "max pool": (chain(nn.MaxPool2d(3, 2, 1)), IMAGE),
    "gelu, max pool": (chain(nn.GELU(), nn.MaxPool2d(2)), IMAGE),
    "max pool, relu": (chain(nn.MaxPool2d(2), nn.ReLU()), IMAGE),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3)),
        (2, 3, 20),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)), (4, 5)),
    "residual": (Residual, IMAGE),
    "concatenated": (Concatenated, IMAGE),
    "pooled and not": (PooledAndNot, IMAGE),
    "attention": (Attention, (2, 5, 16)),
}
"""Name -> what makes the network, and the shape of its input."""


@functools.cache
def prepared_once(name, **options):
    build, shape = NETS[name]
    qmodel = he.prepare(build(), torch.randn(shape), **options)
    return he.calibrate(qmodel, [torch.randn(shape) for _ in range(2)])


def prepared(name, **options):
    """A calibrated model and an input."""
    return copy.deepcopy(prepared_once(name, **options)), torch.randn(NETS[name][1])


def unfused(qmodel):
    """A copy that runs the graph as it is."""
    plain = copy.deepcopy(qmodel)
    for region in regions(plain).values():
        region.execution_graph = None
        region.recompile()
    return plain


def outputs(qmodel, x):
    result = qmodel(x)
    return result if isinstance(result, tuple) else (result,)


def assert_equal(some, others):
    for mine, other in zip(some, others, strict=True):
        assert torch.equal(mine, other)


def order(graph):
    """What a graph runs: names of operators, a quantizer with its clip where it has one, a layer without its number."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(module_of(node), Quantizer):
            found.append(("quantizer", *node.args[1]) if len(node.args) > 1 else "quantizer")
        elif node.op in ("call_module", "call_function"):
            found.append(Op(node).name.removeprefix("Quantized"))
    return found


def calls(qmodel, name, x):
    """The arguments that a quantizer is called with, tensors as their shapes."""
    seen = []
    hook = qmodel.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: seen.append([tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments])
    )
    qmodel(x)
    hook.remove()
    return seen


def gradients(qmodel, x):
    """The outputs, and the gradients of the input and of all parameters, for one upstream gradient."""
    x = x.clone().requires_grad_()
    results = outputs(qmodel, x)
    sum((y * torch.linspace(-1, 2, y.numel()).cos().reshape(y.shape)).sum() for y in results).backward()
    return results, {"input": x.grad} | {name: p.grad for name, p in qmodel.named_parameters()}


# What runs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", ["quantizer", "Conv2d", ("quantizer", 0, INF), "Conv2d"]),
        ("relu6", ["quantizer", "Conv2d", "BatchNorm2d", ("quantizer", 0, 6), "Conv2d"]),
        ("hardtanh", ["quantizer", "Conv2d", ("quantizer", -0.2, 0.3), "Conv2d"]),
        ("relu, max pool", ["quantizer", "Conv2d", "BatchNorm2d", "max_pool2d", ("quantizer", 0, INF), "Conv2d"]),
        ("relu6, overlapping max pool", ["quantizer", "Conv2d", "max_pool2d", ("quantizer", 0, 6), "Conv2d"]),
        ("relu, max pools", ["quantizer", "Conv2d", "max_pool2d", "max_pool2d", ("quantizer", 0, INF), "Conv2d"]),
        ("max pool", ["quantizer", "Conv2d", "max_pool2d", "quantizer", "Conv2d"]),
        ("gelu, max pool", ["quantizer", "Conv2d", "gelu", "max_pool2d", "quantizer", "Conv2d"]),
        ("max pool, relu", ["quantizer", "Conv2d", "max_pool2d", ("quantizer", 0, INF), "Conv2d"]),
        ("one dimension", ["quantizer", "Conv1d", "max_pool1d", ("quantizer", 0, INF), "Conv1d"]),
        (
            "pooled and not",
            ["quantizer", "Conv2d", ("quantizer", 0, INF), "max_pool2d", "Conv2d", "Conv2d"],
        ),
    ],
)
def test_quantizers_follow_max_pools_and_do_the_clipping_before_them(name, expected):
    qmodel, _ = prepared(name)
    assert order(fused_graph(qmodel)) == expected


def test_the_fused_graph_is_what_runs_and_a_copy_runs_it_too():
    qmodel, x = prepared("relu, max pool")
    for model in (qmodel, copy.deepcopy(qmodel), copy.deepcopy(copy.deepcopy(qmodel))):
        assert calls(model, "quantizers.2_relu", x) == [[(2, 8, 4, 4), (0, INF)]]
    assert calls(unfused(qmodel), "quantizers.2_relu", x) == [[(2, 8, 8, 8)]]
    assert calls(qmodel, "quantizers.2_relu", x) == [[(2, 8, 4, 4), (0, INF)]]


def test_the_graph_that_algorithms_and_exporters_read_stays():
    qmodel, x = prepared("relu, max pool")
    before = [(node.op, str(node.target), str(node.args)) for node in qmodel.graph.nodes]
    fused_graph(qmodel)
    qmodel(x)
    other = copy.deepcopy(qmodel)
    for model in (qmodel, other):
        assert [(node.op, str(node.target), str(node.args)) for node in model.graph.nodes] == before
        assert order(model.graph) == ["quantizer", "Conv2d", "BatchNorm2d", "relu", "quantizer", "max_pool2d", "Conv2d"]


def test_what_runs_follows_a_change_of_the_graph():
    qmodel, x = prepared("relu, max pool")
    (relu,) = [node for node in qmodel.graph.nodes if Op(node).name == "relu"]
    relu.target = torch.ops.aten.relu6.default
    qmodel.recompile()
    assert calls(qmodel, "quantizers.2_relu", x) == [[(2, 8, 4, 4), (0, 6)]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", ["quantizer", "Conv2d", "relu", "quantizer", "Conv2d", "sum"]),
        ("relu, max pool", ["quantizer", "Conv2d", "BatchNorm2d", "relu", "max_pool2d", "quantizer", "Conv2d", "sum"]),
    ],
)
def test_an_activation_that_another_operator_reads_stays(name, expected):
    qmodel, x = prepared(name)
    plain = qmodel.eval()(x)
    (relu,) = [node for node in qmodel.graph.nodes if Op(node).name == "relu"]
    (output,) = [node for node in qmodel.graph.nodes if node.op == "output"]
    (result,) = output.all_input_nodes
    with qmodel.graph.inserting_before(output):
        total = qmodel.graph.call_function(torch.ops.aten.sum.default, (relu,))
        both = qmodel.graph.call_function(torch.ops.aten.add.Tensor, (result, total))
    result.replace_all_uses_with(both, delete_user_cb=lambda user: user is output)
    qmodel.recompile()
    assert order(fused_graph(qmodel)) == [*expected, "add"]
    assert torch.equal(qmodel(x), unfused(qmodel)(x))
    assert bool((qmodel(x) > plain + 1).all())


# The same numbers


@pytest.mark.parametrize(
    ("name", "scheme", "ranges"), crossed(NETS, itertools.product(["w8a8", "w4a4"], ["observed", "learned"]))
)
def test_values_are_those_of_the_graph_bit_for_bit(name, scheme, ranges):
    qmodel, x = prepared(name, scheme=scheme, ranges=ranges)
    x *= 3  # some are clipped
    assert_equal(outputs(qmodel.eval(), x), outputs(unfused(qmodel).eval(), x))


@pytest.mark.parametrize(
    ("name", "ranges", "domain"),
    crossed(
        [name for name in NETS if "pool" not in name and name != "one dimension"],
        itertools.product(["learned", "clipped"], ["linear", "log"]),
    ),
)
def test_gradients_are_those_of_the_graph(name, ranges, domain):
    qmodel, x = prepared(name, scheme="w4a4", ranges=ranges, scale_domain=domain, learn_zero_points=True)
    values, found = gradients(qmodel.train(), x)
    others, expected = gradients(unfused(qmodel), x)
    assert_equal(values, others)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


def distinct(shape):
    """Images whose pixels are far from one another, so that no two of a window share an integer of 8 bits."""
    pixels = shape[2] * shape[3]
    orders = torch.stack([torch.randperm(pixels) for _ in range(shape[0] * shape[1])])
    return (orders * (10 / pixels) - 2).reshape(shape)


POOLS = {
    "relu, max pool": ((nn.ReLU(), nn.MaxPool2d(2)), 4),
    "relu6, overlapping max pool": ((nn.ReLU6(), nn.MaxPool2d(3, 2, 1)), 4),
    "relu, max pools": ((nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2)), 4),
    "clamp, max pool": ((nn.Hardtanh(-1, 5), nn.MaxPool2d(2)), 4),
    "max pool": ((nn.MaxPool2d(4),), 16),
    "silu, max pool": ((nn.SiLU(), nn.MaxPool2d(2)), 4),
}
"""Name -> layers, and how many times fewer elements there are after them."""


@pytest.mark.parametrize("name", POOLS)
def test_gradients_through_a_max_pool_are_those_of_the_graph(name):
    layers, fewer = POOLS[name]
    x = distinct(IMAGE)
    model = nn.Sequential(Passed(), *copy.deepcopy(layers), conv(3, 4))
    qmodel = he.calibrate(he.prepare(model, x, ranges="learned", activation_observer="minmax"), [x]).train()
    values, found = gradients(qmodel, x)
    others, expected = gradients(unfused(qmodel), x)
    assert_equal(values, others)
    moved = [parameter for parameter in expected if parameter.startswith("quantizers.")]  # the input's is not learned
    for parameter, gradient in expected.items():
        # LSQ's factor is 1 / sqrt of the elements that a quantizer sees.
        factor = fewer**0.5 if parameter in moved else 1.0
        torch.testing.assert_close(found[parameter], gradient * factor, rtol=1e-4, atol=1e-6, msg=parameter)
    assert [bool(expected[parameter] != 0) for parameter in moved] == [True]


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "relu, max pool", "residual", "linear"])
def test_observed_ranges_follow_what_is_quantized(name):
    qmodel, x = prepared(name)
    plain = unfused(qmodel)
    values, found = gradients(qmodel.train(), x * 3)
    others, expected = gradients(plain.train(), x * 3)
    assert_equal(values, others)
    assert_equal(qmodel.state_dict().values(), plain.state_dict().values())
    if "pool" not in name:
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


# Other modes


@pytest.mark.parametrize("name", [name for name in NETS if name != "attention"])  # which capture writes otherwise
def test_without_quantization_it_is_the_float_model(name):
    build, shape = NETS[name]
    model, x = build(), torch.randn(shape) * 3
    qmodel = he.prepare(model, x)
    set_mode(qmodel, Mode.FLOAT)
    for training in (False, True):
        assert_equal(outputs(qmodel.train(training), x), outputs(model.train(training), x))


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "relu, max pool", "one dimension", "residual"])
def test_calibration_sees_what_is_quantized(name):
    build, shape = NETS[name]
    x = torch.randn(shape) * 3
    qmodel = he.prepare(build(), x, activation_observer="minmax")
    plain = unfused(qmodel)
    for model in (qmodel.eval(), plain.eval()):
        for quantizer in quantizers(model).values():
            quantizer.start_calibration()
    assert_equal(outputs(qmodel, x), outputs(plain, x))
    for model in (qmodel, plain):
        for quantizer in quantizers(model).values():
            quantizer.finish_calibration()
    assert_equal(
        [q.scale for q in quantizers(qmodel).values()],
        [q.scale for q in quantizers(plain).values()],
    )
    bounds = {"relu6": (0, 6), "hardtanh": (-0.2, 0.3)}.get(name, (0, INF))
    for path, quantizer in quantizers(qmodel).items():
        if "relu" in path or "hardtanh" in path:
            assert bounds[0] - 1e-6 <= quantizer.low
            assert quantizer.high <= bounds[1] + 1e-6


# Compiled as a whole


@pytest.mark.parametrize(
    ("name", "ranges"),
    sweep(
        [
            *(("relu, max pool", ranges) for ranges in ("observed", "learned", "clipped")),
            *(("residual", ranges) for ranges in ("observed", "learned")),
            ("attention", "learned"),
            ("concatenated", "learned"),
        ],
        *(("relu, max pool", "observed"), ("attention", "learned")),
    ),
)
def test_a_compiled_model_is_one_graph_and_has_the_same_numbers(name, ranges):
    qmodel, x = prepared(name, scheme="w4a4", ranges=ranges)
    other = copy.deepcopy(qmodel)
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        values, found = gradients(compiled.train(training), x)
        others, expected = gradients(other.train(training), x)
        assert_equal(values, others)
        assert_equal(qmodel.state_dict().values(), other.state_dict().values())
        for parameter, gradient in expected.items():
            mine = found[parameter if parameter == "input" else f"_orig_mod.{parameter}"]
            torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5, msg=parameter)


def test_as_planned_hooks_see_the_tensors_of_the_plan():
    qmodel = he.calibrate(
        he.prepare(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)),
            torch.randn(2, 3, 8, 8),
        ),
        [torch.randn(2, 3, 8, 8)],
    ).eval()
    seen = []
    (quantizer,) = [q for name, q in quantizers(qmodel).items() if name.startswith("quantizers.1")]
    quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 8, 8)
    with as_planned(qmodel):
        inside = qmodel(x)
    outside = qmodel(x)
    assert torch.equal(inside, outside)
    assert [output.shape[-1] for output in seen] == [8, 4]
    assert torch.equal(torch.nn.functional.max_pool2d(seen[0], 2), seen[1])


class Recurrent(nn.Module):
    """Two layers of cells with dropout between them."""

    def __init__(self, cells):
        super().__init__()
        self.cells = cells(8, 8, 2, batch_first=True, dropout=0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.cells(x)[0])


@pytest.mark.parametrize("cells", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_cells_follow_the_mode(cells):
    """Their operators were recorded in eval mode, where cuDNN computes no gradients and nothing is dropped."""
    model, x = Recurrent(cells), torch.randn(4, 5, 8)
    qmodel = he.calibrate(he.prepare(model, x), [x])
    set_mode(qmodel, Mode.FLOAT)
    for training in (True, False):
        results = []
        for network in (model.train(training), qmodel.train(training), copy.deepcopy(qmodel)):
            torch.manual_seed(0)
            results.append(network(x))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_frozen_cells_drop_nothing():
    class Frozen(Recurrent):
        def train(self, mode=True):
            super().train(mode)
            self.cells.eval()
            return self

    model, x = Frozen(nn.LSTM), torch.randn(4, 5, 8)
    qmodel = he.calibrate(he.prepare(model, x), [x])
    set_mode(qmodel, Mode.FLOAT)
    assert torch.equal(model.train()(x), qmodel.train()(x))
