"""Placement on the real runtimes where it was silent or wrong: several results, shared layers, masks and embeddings."""

import pytest
import torch
from torch import nn

import halfeven as he
from runtimes.parity import deployed, quantized
from sweeps import crossed

RUNTIMES = [("openvino", "model.xml"), ("onnxruntime", "model.onnx")]


class Net(nn.Module):
    """Parts by name, and a forward function that is given them."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def assert_all_in_integers(report, layers):
    assert report.integer_match == 1.0, report.first_difference
    assert report.weights_match
    assert report.float_layers == []
    assert report.integer_layers == report.quantizable_layers == layers


# Operators with several results

BEHIND = {
    "max": (lambda m, y: y.max(1).values, 8),
    "topk": (lambda m, y: y.topk(2, 1)[0].flatten(1), 16),
    "sort": (lambda m, y: y.sort(1).values[:, 2], 8),
    "std_mean": (lambda m, y: torch.cat(torch.std_mean(y, 1), 1), 16),
    "lstm": (lambda m, y: m.cells(y)[0][:, -1], 6),
    "split": (lambda m, y: torch.split(y, [2, 4], 1)[1].flatten(1), 32),
}


def behind(name):
    function, width = BEHIND[name]
    parts = {"first": nn.Linear(5, 8), "last": nn.Linear(width, 3)}
    if name == "lstm":
        parts["cells"] = nn.LSTM(8, 6, batch_first=True)
    return Net(lambda m, x: m.last(function(m, m.first(x).relu())), **parts)


@pytest.mark.parametrize(("name", "target", "file"), crossed(BEHIND, RUNTIMES))
def test_a_layer_behind_an_operator_with_several_results_reads_integers(name, target, file, tmp_path):
    report = deployed(behind(name), (4, 6, 5), tmp_path / file, target=target)
    assert_all_in_integers(report, layers=2)


# Layers that are called several times


def normalized(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def frames(m, x):
    """A backbone on each frame of a clip."""
    return m.head(torch.stack([m.body(x[:, i]).mean((2, 3)) for i in range(3)], 1).mean(1))


def triplet(m, x):
    """Rows of linear layers, normalized; three branches."""
    return m.head(torch.cat([m.body(part) for part in x.unbind(1)], 1))


def levels(m, x):
    """A head that is shared, with a factor for each level, one of them a vector and one a divisor."""
    found = []
    for down, scale in zip(
        (m.a, m.b, m.c), (lambda y: y * m.first, lambda y: m.second * y, lambda y: y / 3), strict=True
    ):
        x = down(x).relu()
        found.append(scale(m.box(x)).flatten(2))
    return torch.cat(found, 2)


def leveled():
    net = Net(levels, a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.Conv2d(8, 8, 3, 2, 1), c=nn.Conv2d(8, 8, 3, 2, 1))
    net.box = nn.Conv2d(8, 4, 3, padding=1)
    net.first = nn.Parameter(torch.tensor(1.3))
    net.second = nn.Parameter(torch.randn(4, 1, 1))
    return net


def by_hand(m, x):
    """A normalization in arithmetic with constants of each channel, and a bias between a convolution and its norm."""
    y = ((m.first(x) - m.mean) / m.spread * m.gain + m.shift).relu()
    return m.last(m.norm(m.second(y) + m.shift).relu())


def normalized_by_hand():
    net = Net(by_hand, first=nn.Conv2d(3, 6, 3, bias=False), second=nn.Conv2d(6, 6, 3), last=nn.Conv2d(6, 4, 1))
    net.norm = batchnorm_of(6)
    for name in ("mean", "spread", "gain", "shift"):
        setattr(net, name, nn.Parameter(torch.rand(6, 1, 1) + 0.5))
    return net


def batchnorm_of(features, factory=nn.BatchNorm2d, **options):
    norm = factory(features, **options)
    if norm.affine:
        nn.init.normal_(norm.weight)
    return norm


SHARED = {
    "frames": (
        lambda: Net(frames, body=nn.Sequential(normalized(3, 6), normalized(6, 6)), head=nn.Linear(6, 2)),
        (2, 3, 3, 8, 8),
        7,
    ),
    "triplet": (
        lambda: Net(triplet, body=nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()), head=nn.Linear(18, 2)),
        (4, 3, 5),
        4,
    ),
    "levels": (leveled, (2, 3, 16, 16), 6),
    "two norms": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), batchnorm_of(6), batchnorm_of(6), nn.ReLU()),
            *(nn.Conv2d(6, 4, 3), batchnorm_of(4)),
        ),
        (2, 3, 8, 8),
        2,
    ),
    "normalization by hand": (normalized_by_hand, (2, 3, 8, 8), 3),
    "a norm, a factor, a norm": (
        lambda: Net(
            lambda m, x: m.last(m.outer(m.inner(m.first(x)) * 0.7).relu()),
            first=nn.Conv2d(3, 6, 3),
            inner=batchnorm_of(6),
            outer=batchnorm_of(6),
            last=nn.Conv2d(6, 4, 3),
        ),
        (2, 3, 8, 8),
        2,
    ),
}


CALLED = [(name, "keep") for name in SHARED]
CALLED += [("frames", "fold live"), ("two norms", "fold live"), ("triplet", "fold")]


@pytest.mark.parametrize(("name", "batchnorm", "target", "file"), crossed(CALLED, RUNTIMES))
def test_each_call_of_a_layer_takes_in_what_follows_it(name, batchnorm, target, file, tmp_path):
    build, shape, calls = SHARED[name]
    report = deployed_as_trained(build(), shape, tmp_path / file, target=target, batchnorm=batchnorm)
    assert_all_in_integers(report, calls)


def deployed_as_trained(model, shape, path, **options):
    """The report of a model that has made a step of training after it was quantized."""
    qmodel, batches = quantized(model, shape, **options)
    qmodel.train()(batches[0]).square().mean().backward()
    he.export(qmodel.eval(), path)
    return he.verify(qmodel, path, batches, timed=False)


# Masks, biases and embeddings


class Masked(nn.Module):
    """A weighted sum over the positions that a mask leaves."""

    def __init__(self, make_mask):
        super().__init__()
        self.make_mask = make_mask
        self.stem, self.score = nn.Conv1d(6, 16, 3, padding=1), nn.Conv1d(16, 1, 1)
        self.value = nn.Conv1d(16, 4, 1)

    def forward(self, x, mask):
        y = self.stem(x).relu()
        return (self.value(y) * (self.score(y) + self.make_mask(mask, y)).softmax(-1)).sum(-1)


MASKS = {
    "of an input": lambda mask, y: (1 - mask[:, None]) * -10000.0,
    "the input itself": lambda mask, y: mask[:, None] * 1e4,
    "of lengths": lambda mask, y: (torch.arange(24) >= mask.sum(1, keepdim=True)).float()[:, None] * -1e4,
    "of a comparison with features": lambda mask, y: (y.mean(1, keepdim=True) < 0.4).float() * -1e4,
    "of distances": lambda mask, y: -200.0 * (torch.arange(24.0) - mask.sum(1, keepdim=True)).abs()[:, None],
}


@pytest.mark.parametrize(("name", "target"), crossed(MASKS, ["openvino", "onnxruntime"]))
def test_a_mask_keeps_the_resolution_of_what_it_is_added_to(name, target):
    model = Masked(MASKS[name]).eval()
    mask = (torch.arange(24) < 16).float().expand(4, 24)
    batches = [{"x": 3 * torch.randn(4, 6, 24), "mask": mask} for _ in range(3)]
    qmodel = he.calibrate(he.prepare(model, batches[0], target=target), batches).eval()
    assert sqnr(model, qmodel, batches[0]) > 30


def sqnr(model, qmodel, batch):
    with torch.no_grad():
        right = model(**batch)
        return float(10 * torch.log10(right.square().sum() / (right - qmodel(**batch)).square().sum()))


def embedded(embedding):
    def forward(m, x):
        y = m.patches(x)
        y = (y + embedding(m, y)).flatten(2).transpose(1, 2)
        return m.last((y + m.inner(m.norm(y))).mean(1))

    net = Net(forward, patches=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), inner=nn.Linear(8, 8), last=nn.Linear(8, 5))
    net.position = nn.Parameter(torch.randn(1, 8, 4, 4) * 10)
    return net


@pytest.mark.parametrize(
    "embedding",
    [
        lambda m, y: m.position,
        lambda m, y: m.position.to(torch.float64).to(torch.float32),
        lambda m, y: torch.nn.functional.interpolate(m.position, size=y.shape[2:], mode="bicubic"),
        lambda m, y: m.position[:, :, : y.shape[2]].flip(3).expand(y.shape[0], -1, -1, -1),
        lambda m, y: torch.cos(torch.arange(8.0)).reshape(1, 8, 1, 1).expand_as(y),
    ],
    ids=["parameter", "cast", "resized", "cut", "of nothing"],
)
def test_a_position_embedding_is_no_skip_connection(embedding):
    plan = he.plan(embedded(embedding).eval(), torch.randn(2, 3, 16, 16), target="onnxruntime")
    (added,) = [tensor for tensor in plan.tensors if "patches" in tensor.places]
    assert added.consumers == ("its own kernel alone",)
    places = {place for tensor in plan.tensors for place in tensor.places}
    assert places == {"inputs_0", "patches", "norm", "add_1", "mean"}


def test_sums_of_feature_maps_are_still_integers():
    def forward(m, x):
        y = m.down(x)
        y = y + nn.functional.avg_pool2d(x, 2).repeat(1, 2, 1, 1)
        return m.last(y + nn.functional.interpolate(x * 2 - 1, scale_factor=0.5).repeat(1, 2, 1, 1) + y.flip(1))

    net = Net(forward, down=nn.Conv2d(4, 8, 2, 2), last=nn.Conv2d(8, 4, 3)).eval()
    plan = he.plan(net, torch.randn(2, 4, 8, 8), target="onnxruntime")
    places = [place for tensor in plan.tensors for place in tensor.places]
    assert {"add", "avg_pool2d"} <= set(places)


@pytest.mark.parametrize(("target", "file"), RUNTIMES)
def test_a_clip_that_stays_in_float_leaves_its_layer_in_integers(target, file, tmp_path):
    """ONNX Runtime makes a float kernel of Gemm and Relu, or Gemm and Clip, where no quantizer follows."""

    def forward(self, x):
        sums = self.a(x).relu() + 5 * self.b(x)
        return self.d(sums + nn.functional.relu6(self.c(x))).relu().softmax(1)

    net = Net(forward, a=nn.Linear(8, 16), b=nn.Linear(8, 16), c=nn.Linear(8, 16), d=nn.Linear(16, 3))
    assert_all_in_integers(deployed(net, (4, 8), tmp_path / file, target=target), layers=4)
