"""Sizes: named axes stay free in capture, and any other size than the example's is a clear error."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CaptureError, ConfigError, ExportError, InputError
from halfeven.graph.capture import capture
from halfeven.placement.plan import Plan

SIDES = {"x": {2: "height", 3: "width"}}
TOKENS = {"ids": {1: "tokens"}, "mask": {1: "tokens"}}


class Made(nn.Module):
    """Parts by name, and a forward that is given them."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Texts(nn.Module):
    """Self-attention over texts with a padding mask, and learned positions."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(24, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, mask):
        y = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return {"scores": self.head(self.layer(y, src_key_padding_mask=mask == 0)[:, 0])}


def convolution(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def mean_by_division(m, x):
    y = m.c(x).relu()
    return m.h(y.sum((2, 3)) / (y.shape[2] * y.shape[3]))


def pool_of_shape(m, x):
    y = m.c(x).relu()
    return F.avg_pool2d(y, y.shape[2:]).flatten(1) + F.max_pool2d(y, kernel_size=y.size()[2:]).view(y.shape[0], -1)


def resized_to_input(m, x):
    return F.interpolate(m.c(x).relu(), size=x.shape[2:], mode="bilinear")


def resized_to_skip(m, x):
    a = m.c(x).relu()
    return torch.cat([a, F.interpolate(m.d(a).relu(), size=a.shape[2:])], 1)


def softmax_over_positions(m, x):
    y = m.c(x)
    shares = y.view(y.shape[0], y.shape[1], -1).softmax(-1).view_as(y)
    return (shares * y).sum((2, 3))


def broadcast_grid(m, x):
    y = m.c(x)
    rows = (torch.arange(y.shape[2]) / (y.shape[2] - 1))[:, None].expand(y.shape[2], y.shape[3])
    return y * rows


SIZED = {
    "mean by division": Made(mean_by_division, c=convolution(3, 8), h=nn.Linear(8, 4)),
    "pool of shape": Made(pool_of_shape, c=convolution(3, 8)),
    "resized to input": Made(resized_to_input, c=convolution(3, 8, 2)),
    "resized to skip": Made(resized_to_skip, c=convolution(3, 8), d=convolution(8, 8, 2)),
    "softmax over positions": Made(softmax_over_positions, c=convolution(3, 8)),
    "broadcast grid": Made(broadcast_grid, c=convolution(3, 8)),
}


def text(samples, length):
    mask = (torch.arange(length) < torch.randint(2, length + 1, (samples, 1))).long()
    return {"ids": torch.randint(1, 50, (samples, length)), "mask": mask}


@pytest.mark.parametrize("name", SIZED)
def test_free_axes_compute_as_the_model_does(name):
    model = SIZED[name].eval()
    captured, report = capture(model, torch.randn(2, 3, 16, 16), dynamic_shapes=SIDES)
    assert report.regions == [""]
    for shape in ((1, 3, 21, 27), (5, 3, 40, 8)):
        x = torch.randn(shape)
        assert torch.allclose(captured(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["mean by division", "pool of shape", "resized to input"])
def test_another_size_says_which_axis_and_how_to_free_it(name):
    qmodel = he.prepare(SIZED[name], torch.randn(2, 3, 16, 16)).train()
    with pytest.raises(InputError, match=r"input x has 24 at axis 3, .* prepared with 16[\s\S]*\{'x': \{3: 'name'\}\}"):
        qmodel(torch.randn(2, 3, 16, 24))
    with pytest.raises(InputError, match="has 3 axes"):
        qmodel.eval()(torch.randn(3, 16, 16))


def test_another_size_is_refused_in_calibration_and_by_copies():
    qmodel = he.prepare(SIZED["pool of shape"], torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="axis 2"):
        he.calibrate(qmodel, [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 16)])
    he.calibrate(qmodel, [torch.randn(2, 3, 16, 16)])
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), he.exact(qmodel)):
        with pytest.raises(InputError, match="axis 2"):
            other(torch.randn(2, 3, 32, 16))


def test_texts_of_several_lengths():
    model = Texts().eval()
    qmodel = he.prepare(model, text(2, 10), dynamic_shapes=TOKENS)
    he.calibrate(qmodel, [text(3, 10), text(1, 7), text(2, 17)])
    qmodel.train()
    qmodel(**text(4, 5))["scores"].sum().backward()
    assert qmodel.words.weight.grad is not None
    with pytest.raises(InputError, match=r'"tokens" of one call must be equal, and ids has 5 .* mask 6'):
        qmodel(ids=text(2, 5)["ids"], mask=text(2, 6)["mask"])
    fixed = he.prepare(model, text(2, 10))
    with pytest.raises(InputError, match=r"input ids has 7 at axis 1, .* prepared with 10[\s\S]*'ids': \{1"):
        he.calibrate(fixed, [text(2, 7)])


def test_a_checkpoint_keeps_free_axes(tmp_path):
    model = Texts().eval()
    qmodel = he.calibrate(he.prepare(model, text(2, 10), dynamic_shapes=TOKENS), [text(3, 10)]).eval()
    he.save(qmodel, tmp_path / "model.safetensors")
    loaded = he.load(tmp_path / "model.safetensors", model, text(2, 10))
    batch = text(3, 6)
    assert torch.equal(loaded(**batch)["scores"], qmodel(**batch)["scores"])
    assert he.plan_of(loaded).options.dynamic_shapes == TOKENS
    again = he.prepare(model, text(2, 10), plan=he.plan(model, text(2, 10), dynamic_shapes=TOKENS))
    he.calibrate(again, [text(3, 6)])
    old = he.plan_of(qmodel).to_dict()
    del old["options"]["dynamic_shapes"]
    assert Plan.from_dict(old).options.dynamic_shapes == {}


def baked_loop(m, x):
    y = m.c(x)
    return sum(y[:, :, row] for row in range(y.shape[2]))


def baked_table(m, x):
    return m.c(x) + m.table


def pool_of_half(m, x):
    return F.avg_pool2d(m.c(x), (x.shape[2] // 2, 2))


def fixed_layer(m, x):
    return m.h(m.c(x).flatten(1))


def only_multiples(m, x):
    if x.shape[2] % 4:
        raise ValueError("multiples of 4 alone")
    return m.c(x)


def another_way_when_small(m, x):
    return m.c(x) if x.shape[2] > 10 else m.c(x) * 2


def another_way_when_square(m, x):
    return m.c(x) if x.shape[2] == x.shape[3] else m.c(x) * 2


TABLE = Made(baked_table, c=convolution(3, 8))
TABLE.table = nn.Parameter(torch.zeros(8, 16, 16))


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Made(baked_loop, c=convolution(3, 8)), r"return sum\(y"),
        (TABLE, r"return m.c\(x\) \+ m.table"),
    ],
    ids=["loop", "table"],
)
def test_code_that_makes_a_free_axis_a_constant_is_named(model, line):
    with pytest.raises(
        CaptureError, match=rf'axis 2 of "x" \(height\)[\s\S]*16[\s\S]*test_dynamic_shapes.py[\s\S]*{line}'
    ):
        he.prepare(model, torch.randn(2, 3, 16, 16), dynamic_shapes=SIDES)


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (Made(fixed_layer, c=convolution(3, 8), h=nn.Linear(2048, 4)), (2, 3, 16, 24), r"8\*width\*height.* == 2048"),
        (Made(only_multiples, c=convolution(3, 8)), (2, 3, 18, 16), r"height % 4\) == 0.* height is 18"),
    ],
    ids=["fixed layer", "multiples"],
)
def test_sizes_that_a_captured_graph_cannot_compute_are_refused(model, shape, words):
    qmodel = he.prepare(model, torch.randn(2, 3, 16, 16), dynamic_shapes=SIDES)
    for refuses in (qmodel, copy.deepcopy(qmodel)):
        with pytest.raises(InputError, match=words):
            refuses(torch.randn(shape))


@pytest.mark.parametrize("function", [another_way_when_small, another_way_when_square, pool_of_half])
def test_code_that_decides_by_a_free_size_is_found(function):
    model = Made(function, c=convolution(3, 8))
    with pytest.raises(CaptureError, match=r"does not run on inputs whose height is 8, and the original does.*height"):
        he.prepare(model, torch.randn(2, 3, 16, 16), dynamic_shapes=SIDES)


@pytest.mark.parametrize(
    ("dynamic_shapes", "words"),
    [
        ({"y": {2: "height"}}, 'input "y".*no such input.*There are x'),
        ({"x": {4: "depth"}}, "axis 4 .* has 4 axes"),
        ({"x": {2: "in between"}}, "letters, digits"),
        ({"x": {1: "side", 2: "side"}}, '"side".* 3 and 16'),
    ],
)
def test_axes_that_cannot_be_freed(dynamic_shapes, words):
    with pytest.raises(ConfigError, match=words):
        he.prepare(SIZED["pool of shape"], torch.randn(2, 3, 16, 16), dynamic_shapes=dynamic_shapes)
    with pytest.raises(ConfigError, match="size there is 1"):
        he.prepare(SIZED["pool of shape"], torch.randn(2, 3, 1, 16), dynamic_shapes={"x": {2: "height"}})


def best_of_each(m, x):
    tokens = m.c(x).flatten(2).transpose(1, 2)
    best = m.h(tokens).amax(-1).topk(3, 1)[1]
    return torch.cat([tokens[i][best[i]] for i in range(len(tokens))]).reshape(len(tokens), 3, 8)


def pairs_of_samples(m, x):
    y = m.c(x).mean((2, 3))
    return torch.stack([y[i] * y[i - 1] for i in range(int(y.shape[0]))])


@pytest.mark.parametrize("function", [best_of_each, pairs_of_samples])
@pytest.mark.parametrize("samples", [1, 4])
def test_a_batch_that_the_code_makes_a_constant_is_kept_and_said(function, samples):
    model = Made(function, c=convolution(3, 8), h=nn.Linear(8, 2)).eval()
    x = torch.randn(samples, 3, 8, 8)
    qmodel = he.prepare(model, x).eval()
    (note,) = [note for note in he.plan_of(qmodel).notes if "batch is fixed" in note]
    assert f"at {samples}" in note
    assert "test_dynamic_shapes.py" in note
    he.calibrate(qmodel, [x, x])
    assert qmodel(x).shape == model(x).shape
    with pytest.raises(InputError, match=f"has {samples + 1} at axis 0, .* prepared with {samples}.*drop_last"):
        he.calibrate(qmodel, [torch.randn(samples + 1, 3, 8, 8)])


class Branching(nn.Module):
    """Python that cannot be captured, around parts that can."""

    def __init__(self):
        super().__init__()
        self.stem = Made(mean_by_division, c=convolution(3, 8), h=nn.Linear(8, 4))
        self.resize = Made(resized_to_input, c=convolution(3, 3, 2))

    def forward(self, x):
        y = self.resize(x)
        return self.stem(y * 2 if float(y.sum()) > 0 else y)


def test_models_captured_in_parts_keep_free_axes_and_check_the_others():
    model = Branching().eval()
    qmodel, report = capture(model, torch.randn(2, 3, 16, 16), dynamic_shapes=SIDES)
    assert report.regions == ["stem", "resize"]
    x = torch.randn(3, 3, 24, 10)
    assert torch.allclose(qmodel(x), model(x), atol=1e-5)
    fixed, _ = capture(model, torch.randn(2, 3, 16, 16))
    y = torch.randn(5, 3, 16, 16)
    assert torch.allclose(fixed(y), model(y), atol=1e-5)
    with pytest.raises(InputError, match="input x of resize has 24 at axis 2"):
        fixed(x)


class Shifted(nn.Module):
    """A shift by half of a free size, to either side."""

    def __init__(self):
        super().__init__()
        self.first, self.second = convolution(3, 4), convolution(4, 2)

    def forward(self, x):
        y = self.first(x).relu()
        return self.second(torch.roll(y, (y.shape[2] // 2, -(y.shape[3] // 3)), (2, 3)))


def test_shifts_by_a_part_of_a_free_size_in_a_file(tmp_path):
    batches = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 12, 10)]
    shapes = {"x": {2: "h", 3: "w"}}
    qmodel = he.prepare(Shifted(), batches[0], target="onnxruntime", scheme="w7a8", dynamic_shapes=shapes)
    he.calibrate(qmodel, batches).eval()
    deployed = he.load_deployed(he.export(qmodel, tmp_path / "m.onnx"), "onnxruntime")
    exact = he.exact(qmodel)
    assert all(torch.allclose(deployed(x), exact(x), atol=1e-5) for x in batches)


class SharedHead(nn.Module):
    """Python that cannot be captured, around a head that is called at two sizes."""

    def __init__(self):
        super().__init__()
        self.head = convolution(3, 4)

    def forward(self, x):
        y = x * 2 if float(x.sum()) > 0 else x
        return self.head(y), self.head(y[:, :, ::2, ::2])


def test_a_part_that_is_called_at_several_sizes_takes_them_all():
    model = SharedHead().eval()
    captured, report = capture(model, torch.randn(2, 3, 16, 16))
    assert report.regions == ["head"]
    x = torch.randn(3, 3, 16, 16)
    assert all(map(torch.equal, captured(x), model(x)))


class EachSample(nn.Module):
    """Stays Python, and makes the batch a constant of whatever is traced through it."""

    def forward(self, x):
        return torch.stack([sample * 2 for sample in x])


def test_a_loop_between_parts_fixes_the_batch_of_the_file_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), EachSample(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(5, 3, 8, 8)
    qmodel = he.calibrate(he.prepare(model, x, scheme="w7a8", leave_out=("2",)), [x]).eval()
    (note,) = (note for note in he.plan_of(qmodel).notes if "batch" in note)
    assert "The batch of the file is fixed at 5" in note
    assert "for sample in x" in note
    assert qmodel(x[:3]).shape == (3, 2, 4, 4)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.integer_match == 1.0


class Enlarged(nn.Module):
    """Its sizes are computed in floats, so that conditions on them need functions of `math`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2, mode="bicubic")


def test_bicubic_upsampling_of_a_free_size():
    model, sizes = Enlarged().eval(), {"x": {2: "height", 3: "width"}}
    captured, _ = capture(model, torch.randn(2, 3, 16, 16), dynamic_shapes=sizes)
    for shape in ((2, 3, 17, 23), (3, 3, 8, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(captured(x), model(x))


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        pools = [F.adaptive_avg_pool2d(y, positions) for positions in (1, 2)]
        return self.last(torch.cat([y, *(F.interpolate(p, y.shape[2:], mode="bilinear") for p in pools)], 1))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_adaptive_pools_of_free_sizes_are_right_or_refused(target, tmp_path):
    """OpenVINO has the operator; ONNX has not, and the windows of the example's size would be wrong at others."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    options = {"scheme": "w7a8", "target": target, "dynamic_shapes": {"x": {2: "height", 3: "width"}}}
    qmodel = he.calibrate(he.prepare(Pyramid().eval(), x, **options), [x]).eval()
    if target == "onnxruntime":
        with pytest.raises(ExportError, match=r"A pool to 2 x 2 positions .* ONNX has no operator for it"):
            he.export(qmodel, tmp_path / "model.onnx")
        return
    exact, run = he.exact(qmodel), he.load_deployed(he.export(qmodel, tmp_path / "model.xml"), target)
    for size in ((12, 12), (18, 24), (13, 17)):
        y = torch.randn(2, 3, *size)
        assert torch.equal(exact(y), run(y)), size
