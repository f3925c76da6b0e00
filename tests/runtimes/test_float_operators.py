"""What a runtime computes in float it is asked for, so that the integers behind it are the file's own."""

import importlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.graph.capture import capture
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.float_operators import needs_runtime_kernel
from halfeven.runtimes.onnxruntime.session import ONNXRuntimeFile
from halfeven.runtimes.openvino.layers import ZeroShare
from halfeven.runtimes.openvino.session import compile_model, read, run_compiled
from processes import in_a_process
from runtimes.parity import quantized
from sweeps import crossed, sweep

WIDTH = 96
TOKENS = (16, 64, WIDTH)
FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


class Net(nn.Module):
    """Layers and norms of one width, put together by a function of them and an input."""

    def __init__(self, function):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.layers, *self.norms)


def attention(x, query, key, value, out, norm, _):
    x = norm(x)
    scores = query(x) @ key(x).transpose(-1, -2) / WIDTH**0.5
    return out(scores.softmax(-1) @ value(x))


def heads(x, layer, _, __, out, norm, ___):
    """Attention of four heads, each with queries, keys and values from one layer, as timm writes it."""
    query, key, value = layer(norm(x)).reshape(*x.shape[:2], 3, 4, WIDTH // 12).permute(2, 0, 3, 1, 4).unbind(0)
    seen = (query @ key.transpose(-2, -1) * 0.3).softmax(-1) @ value
    return out(seen.transpose(1, 2).reshape(*x.shape[:2], WIDTH // 3).repeat(1, 1, 3))


def pre_norm(x, a, b, c, _, norm, other):
    x = x.abs()
    x = x + b(F.gelu(a(norm(x))))
    return c(other(x)) + x


ROWS = {
    "normalized": lambda x, a, b, c, d, n, m: b(n(a(x))),
    "integers normalized": lambda x, a, b, c, d, n, m: (lambda y: b(n(y)) + c(y))(F.relu(a(x))),
    "sum with a skip connection normalized": lambda x, a, b, c, d, n, m: b(n(a(x) + x)),
    "norms after sums": lambda x, a, b, c, d, n, m: (lambda y: c(m(b(y) + y)))(n(a(x) + x)),
    "norms before sums": pre_norm,
    "gelu": lambda x, a, b, c, d, n, m: b(F.gelu(a(x))),
    "gelu by tanh": lambda x, a, b, c, d, n, m: b(F.gelu(a(x), approximate="tanh")),
    "silu": lambda x, a, b, c, d, n, m: b(F.silu(a(x))),
    "softmax": lambda x, a, b, c, d, n, m: b(a(x).softmax(-1)),
    "attention": attention,
    "attention of heads": heads,
    "mean": lambda x, a, b, c, d, n, m: b(a(x).mean(1)),
}
BY_DEFAULT = {
    *itertools.product(("norms after sums", "attention of heads"), FILES),
    *itertools.product(("gelu", "softmax", "mean"), ["openvino"]),
    *itertools.product(
        ("norms before sums", "integers normalized", "sum with a skip connection normalized", "silu"), ["onnxruntime"]
    ),
}


@pytest.mark.parametrize(("name", "target"), sweep(itertools.product(ROWS, FILES), *BY_DEFAULT))
def test_integers_behind_a_function(name, target, tmp_path):
    """Where PyTorch computes these functions one integer in a thousand to a million is another, and all behind it."""
    torch.manual_seed(0)
    options = {"scheme": "w7a7"}  # products of activations overflow without VNNI if these have 8 bits
    qmodel, batches = quantized(Net(ROWS[name]), TOKENS, target=target, **options)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / FILES[target]), batches, timed=False)
    assert report.integer_layers == report.quantizable_layers >= 2
    count = sum(tensor.count for tensor in report.tensors)
    assert count > 100_000
    assert report.integer_macs == 1.0
    assert sum(tensor.different_alone for tensor in report.tensors) == 0
    assert report.integer_match == 1.0, report.first_difference
    assert report.output_difference <= 1e-6  # of the file as it runs, where attention may be one operator


@pytest.mark.parametrize(("target", "functions"), [("onnxruntime", 2), ("openvino", 3)])
def test_alike_operators_share_a_function(target, functions, monkeypatch):
    """Two GELUs are alike, and two norms but where a function has their constants in it: in another simulation too."""
    room, asked = importlib.import_module(f"halfeven.runtimes.{target}.exact"), []
    function_of = room.function_of
    monkeypatch.setattr(room, "function_of", lambda program: asked.append(program) or function_of(program))

    def function(x, a, b, c, d, norm, other):
        return d(F.gelu(c(other(b(F.gelu(a(norm(x))))))))

    qmodel, batches = quantized(Net(function), TOKENS, target=target)
    for exact in (he.exact(qmodel), he.exact(qmodel)):
        exact(batches[0])
        assert len(asked) == functions


@pytest.mark.parametrize(("number", "exponent"), crossed([0.1767766952966369, 0.3, 7.0], [-1, 1]))
def test_scores_are_scaled_as_the_plugin_scales_them(exponent, number, tmp_path):
    """To the last bit, which integers behind a softmax show once in three million: the scores of the file itself."""
    torch.manual_seed(0)

    def function(x, query, key, value, out, norm, _):
        scores = query(x) @ key(x).transpose(-1, -2)
        scores = scores * number if exponent == 1 else scores / number
        return out(scores.softmax(-1) @ value(x))

    qmodel, batches = quantized(Net(function), TOKENS, target="openvino", scheme="w7a7")
    model = read(he.export(qmodel, tmp_path / "model.xml"))
    (softmax,) = (node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax")
    softmax.input_value(0).get_tensor().set_names({"scores"})
    model.add_outputs("scores")
    exact, simulated = he.exact(qmodel, "openvino"), []
    for module in exact.modules():
        for interpreter in getattr(module, "interpreter", ()):
            compute = interpreter.float_operators.compute
            interpreter.float_operators.compute = lambda nodes, values, compute=compute: (
                simulated.append(next(iter(values.values()))) or compute(nodes, values)
            )
    exact(batches[0])
    scores = run_compiled(compile_model(model), [batches[0]])[1]
    torch.testing.assert_close(simulated[0], scores, rtol=0, atol=0)


def test_a_zero_point_that_is_no_integer_in_float32(tmp_path, monkeypatch):
    """Its products with the weights are subtracted in float32; one output in a hundred thousand shows it."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 4))
    qmodel, batches = quantized(layers, (8, 400, 512), target="openvino", scheme="w7a8")
    quantizer = quantizers(qmodel)["quantizers.input"]
    zero_point = quantizer.zero_point
    for scale in quantizer.scale * (1 + torch.arange(4096) / 4096):
        low, high = -zero_point * scale, (255 - zero_point) * scale
        found = -low * torch.full_like(low, 255) / (high - low)
        if (found - found.round()).abs() > 1e-5:
            break
    quantizer._store_range(scale, zero_point)
    path = he.export(qmodel, tmp_path / "model.xml")

    def different():
        return sum(tensor.different_alone for tensor in he.verify(qmodel, path, batches, timed=False).tensors)

    simulated = different()
    monkeypatch.setattr(ZeroShare, "taken", lambda self, sums: sums.float())
    assert simulated == 0 < different()


def test_other_sizes_are_asked_anew():
    qmodel, batches = quantized(Net(ROWS["attention"]), TOKENS, target="onnxruntime")
    exact = he.exact(qmodel)
    whole = exact(batches[0])
    parts = torch.cat([exact(part) for part in batches[0].split((3, 13))])
    assert torch.equal(whole, parts)


def test_what_the_standard_leaves_open_is_asked():
    def function(x):
        counts = (x > 0).to(torch.int64).pow(2)
        return F.gelu(x) + F.relu(x) * x.exp() - F.leaky_relu(x.softmax(-1), 0.1) * counts

    captured, _ = capture(torch.fx.symbolic_trace(function), torch.randn(2, 3))
    names = [str(node.target) for node in captured.graph.nodes if needs_runtime_kernel(node)]
    assert sorted(name.split(".")[1] for name in names) == ["exp", "gelu", "softmax"]


def heads(x, a, b, c, _, norm, __):
    x = x + a(x).reshape(-1, 64, 2, WIDTH // 2).transpose(1, 2).transpose(1, 2).reshape(-1, 64, WIDTH)
    return c(F.gelu(b(norm(x))))


def test_onnx_runtime_is_given_what_its_kernels_need(tmp_path):
    """It computes a sum and a normalization at once where it knows the shapes, which a reshape hides from it."""
    qmodel, _ = quantized(Net(heads), TOKENS, target="onnxruntime")
    he.export(qmodel, tmp_path / "model.onnx")
    kernels = [node.op_type for node in ONNXRuntimeFile(tmp_path / "model.onnx")._optimized()]
    assert "SkipLayerNormalization" in kernels
    assert {"Gelu", "BiasGelu"}.intersection(kernels)
    assert not {"LayerNormalization", "Erf"}.intersection(kernels)


def verified_at_ties(path):
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    qmodel = he.calibrate(he.prepare(nn.Sequential(nn.Linear(64, 64)).eval(), x, scheme="w7a8"), [x]).eval()
    (quantizer,) = (q for q in quantizers(qmodel).values() if not q.weight)
    quantizer._store_range(torch.tensor(2.0**-5), torch.tensor(128 + quantizer.scheme.quant_min))
    x = torch.randint(-256, 256, (64, 64)) * 2.0**-6 * (1 + torch.randint(-4, 5, (64, 64)) * 6e-8)
    return he.verify(qmodel, he.export(qmodel, path), [x], timed=False)


def test_a_quantizer_of_its_own_rounds_after_128_is_added(tmp_path):
    """It is told from one in a layer's kernel by numbers so near to a tie that adding 128 makes them one."""
    report = in_a_process(verified_at_ties, tmp_path / "model.xml", ONEDNN_MAX_CPU_ISA="AVX2")
    assert report.integer_match == 1.0
    assert sum(tensor.count for tensor in report.tensors) == 4096
