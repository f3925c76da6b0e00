"""What a model does in training alone: found by one run in both modes, and kept in Python, in the smallest module."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from halfeven.errors import CaptureError
from halfeven.graph.capture import capture
from halfeven.graph.rebuild import CapturedModule


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Rounded(torch.autograd.Function):
    """Its gradient passes straight through; the operators have none."""

    @staticmethod
    def forward(x):
        return torch.round(x * 4) / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Squared(torch.autograd.Function):
    """Its gradient is that of its operators."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Does(nn.Module):
    """A module with parts whose forward is a function of it and its input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=3, outputs=4):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def around(middle):
    return nn.Sequential(conv(), middle, nn.Conv2d(4, 2, 1))


def follow(m, x):
    if m.training:
        m.centre.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return x - m.centre[:, None, None]


def enqueue(m, x):
    scores = torch.einsum("bchw,ck->bkhw", x, m.queue.clone())
    if m.training:
        place = int(m.place)
        m.queue[:, place : place + len(x)] = x.detach().mean((2, 3)).T
        m.place.add_(len(x)).remainder_(4)
    return scores


def normalize(m, x):
    mean, variance = (x.mean((0, 2, 3)), x.var((0, 2, 3))) if m.training else (m.mean, m.variance)
    if m.training:
        m.mean = torch.lerp(m.mean, mean.detach(), 0.1)
        m.variance = torch.lerp(m.variance, variance.detach(), 0.1)
    return m.factor[:, None, None] * (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()


def drop_branches(m, x):
    y = m.branch(x)
    return x + (y * (torch.rand(len(x), 1, 1, 1) > 0.2) if m.training else y)


def mix(m, x):
    share = random.random() if m.training else 1.0
    return m.head(share * x + (1 - share) * x.flip(0))


def raw_maps(m, x):
    raw = m.head(x)
    return [raw] if m.training else (raw.sigmoid().flatten(1), [raw])


def with_auxiliary(m, x):
    y = m.body(x)
    outputs = {"out": m.head(y)}
    if m.training:
        outputs["aux"] = m.aux(y)
    return outputs


def teach(m, x):
    y = m.student(x)
    if m.training:
        with torch.no_grad():
            for old, new in zip(m.teacher.parameters(), m.student.parameters(), strict=True):
                old.lerp_(new, 0.1)
        return y, m.teacher(x)
    return y


def codes(m, x):
    distance = torch.cdist(x.movedim(1, -1).flatten(0, 2), m.book.weight)
    found = m.book(distance.argmin(1)).unflatten(0, (x.shape[0], x.shape[2], x.shape[3])).movedim(-1, 1)
    y = x + (found - x).detach()
    return (y, (found.detach() - x).square().mean()) if m.training else y


def through_codes(m, x):
    y = m.codes(m.body(x))
    return (m.head(y[0]), y[1]) if m.training else m.head(y)


def sample(m, x):
    mean, spread = m.mean(x), m.spread(x)
    if not m.training:
        return mean
    m.divergence = (mean**2 + spread.exp() - spread).mean()
    return mean + torch.randn_like(mean) * spread.exp()


def save_memory(m, x):
    for block in m.blocks:
        x = checkpoint(block, x, use_reentrant=False) if m.training else block(x)
    return m.head(x)


def save_memory_in_two(m, x):
    return m.head(checkpoint_sequential(m.blocks, 2, x, use_reentrant=False) if m.training else m.blocks(x))


def save_memory_reentrantly(m, x):
    x = m.stem(x)
    return m.head(checkpoint(m.block, x, use_reentrant=True) if m.training else m.block(x))


def turn_by_hook(m, x):
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda gradient: -gradient)
    return y


class InHalves(nn.BatchNorm2d):
    """Normalizes each half of a batch by itself in training, and as torch's in eval mode."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([super(InHalves, self).forward(half) for half in x.chunk(2)])


def in_halves(m, x):
    """Of two samples a half is one, which a BatchNorm without positions refuses in training."""
    return torch.cat([m.norm(half) for half in x.chunk(2 if m.training else 1)])


def blocks(count=4):
    return [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(count)]


reverse = Reverse.apply
KEPT = {
    "raw maps": (lambda: nn.Sequential(conv(), Does(raw_maps, head=nn.Conv2d(4, 2, 1))), {"1"}),
    "auxiliary head": (
        lambda: Does(with_auxiliary, body=conv(), head=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 2, 1)),
        {""},
    ),
    "gradient reversal": (lambda: around(Does(lambda m, x: reverse(x))), {"1"}),
    "gradient reversal in the model itself": (
        lambda: Does(lambda m, x: m.head(Reverse.apply(m.body(x))), body=conv(), head=nn.Conv2d(4, 2, 1)),
        {""},
    ),
    "gradient turned by a hook": (lambda: around(Does(turn_by_hook)), {"1"}),
    "straight-through rounding": (lambda: around(Does(lambda m, x: Rounded.apply(x))), {"1"}),
    "centre": (lambda: around(Does(follow, centre=torch.zeros(4))), {"1"}),
    "queue": (lambda: around(Does(enqueue, queue=torch.randn(4, 4), place=torch.zeros((), dtype=torch.long))), {"1"}),
    "own normalization": (
        lambda: around(
            Does(normalize, mean=torch.zeros(4), variance=torch.ones(4), factor=nn.Parameter(torch.ones(4)))
        ),
        {"1"},
    ),
    "own BatchNorm": (lambda: around(InHalves(4)), {"1"}),
    "BatchNorm of halves": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 8), Does(in_halves, norm=nn.BatchNorm1d(8))),
        {"2"},
    ),
    "own stochastic depth": (lambda: around(Does(drop_branches, branch=conv(4))), {"1"}),
    "noise": (
        lambda: around(nn.Sequential(Does(lambda m, x: x + torch.randn_like(x) if m.training else x))),
        {"1.0"},
    ),
    "mixed samples": (lambda: nn.Sequential(conv(), Does(mix, head=nn.Conv2d(4, 2, 1))), {"1"}),
    "spectral norm": (
        lambda: around(parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))),
        {"1.parametrizations.weight.0"},
    ),
    "old spectral norm": (lambda: around(nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))), {"1"}),
    "teacher": (lambda: nn.Sequential(conv(), Does(teach, student=conv(4), teacher=conv(4))), {"1"}),
    "codebook with a loss": (
        lambda: Does(through_codes, body=conv(), codes=Does(codes, book=nn.Embedding(8, 4)), head=nn.Conv2d(4, 2, 1)),
        {"codes"},
    ),
    "a loss as an attribute": (
        lambda: nn.Sequential(conv(), Does(sample, mean=nn.Conv2d(4, 2, 1), spread=nn.Conv2d(4, 2, 1))),
        {"1"},
    ),
    "checkpointing": (lambda: Does(save_memory, blocks=nn.ModuleList(blocks()), head=nn.Conv2d(3, 2, 1)), {""}),
    "checkpointing of a sequence": (
        lambda: Does(save_memory_in_two, blocks=nn.Sequential(*blocks()), head=nn.Conv2d(3, 2, 1)),
        {"", "blocks"},
    ),
    "reentrant checkpointing": (
        lambda: Does(save_memory_reentrantly, stem=conv(3, 3), block=conv(3, 3), head=nn.Conv2d(3, 2, 1)),
        {""},
    ),
}


class Frozen(nn.Sequential):
    """A model whose own train() leaves its first block in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


NOT_KEPT = {
    "dropout": lambda: around(nn.Dropout(0.3)),
    "dropout of attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(36, 2, 8, dropout=0.1, batch_first=True)
    ),
    "functional dropout": lambda: around(Does(lambda m, x: F.dropout2d(x, 0.3, m.training))),
    "a gradient that is the operators'": lambda: around(Does(lambda m, x: Squared.apply(x))),
    "weight standardization": lambda: around(
        Does(lambda m, x: F.conv2d(x, m.weight - m.weight.mean(), None), weight=nn.Parameter(torch.randn(4, 4, 1, 1)))
    ),
    "instance norm with running statistics": lambda: around(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "frozen BatchNorm": lambda: Frozen(conv(), conv(4)),
    "detached": lambda: around(Does(lambda m, x: x + (x.round() - x).detach())),
}


def trained(model, x):
    """Outputs, changed tensors and gradients of a step, with dropout and under the same random numbers."""
    random.seed(3)
    torch.manual_seed(3)
    model.train()
    model.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = torch.utils._pytree.tree_leaves(model(x))
    sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moved = {name: t.clone() for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    for name, tensor in model.state_dict().items():
        tensor.copy_(before[name])
    return outputs, moved, gradients


def assert_same_step(model, captured, x):
    (outputs, moved, gradients), (outputs_2, moved_2, gradients_2) = trained(model, x), trained(captured, x)
    assert [y.shape for y in outputs] == [y.shape for y in outputs_2]
    torch.testing.assert_close(outputs, outputs_2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, moved_2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, gradients_2, rtol=1e-3, atol=1e-4)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", KEPT)
def test_training_does_what_it_does_in_float(name):
    build, kept = KEPT[name]
    model, x = build(), torch.randn(4, 3, 6, 6)
    before = state_of(model)
    captured, report = capture(model, x)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert {k.name for k in report.kept} == kept
    assert all(k.reason for k in report.kept)
    assert_same_step(model, captured, x)
    regions = [m for m in captured.modules() if isinstance(m, CapturedModule)]
    assert regions, "the layers around it are captured"
    again, _ = capture(build(), x, kept=report.kept)
    assert sorted(captured.state_dict()) == sorted(again.state_dict())


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_the_captured_graph_does_as_well_is_not_kept(name):
    model, x = NOT_KEPT[name](), torch.randn(4, 3, 6, 6)
    captured, report = capture(model, x)
    assert isinstance(captured, CapturedModule)
    assert not report.kept
    assert not report.notes
    if "dropout" not in name:
        assert_same_step(model, captured, x)


def probabilities(m, x):
    y = m.fc(F.dropout(m.body(x).mean((2, 3)), 0.2, m.training))
    return y if m.training else y.softmax(1)


def logarithms(m, x):
    y = m.head(m.body(x))
    return {"log": F.log_softmax(y, 1), "scores": [y.flatten(2)]} if m.training else y.argmax(1)


def boxes(m, x):
    raw = [head(x).view(x.shape[0], 4, -1) for head in m.heads]
    return torch.cat([y.transpose(1, 2) for y in raw], 1) if m.training else torch.cat(raw, 2).sigmoid() * 8


def boxes_of_maps(m, maps):
    return [maps] if m.training else maps.sigmoid().flatten(1)


def with_features(m, x):
    """A layer that eval mode needs, too, stands before an operator that changes its result in place."""
    y = F.relu_(m.body(x))
    return (y, m.head(y)) if m.training else m.head(y)


def add_noise(m, x):
    return x + torch.randn_like(x) if m.training else x


def heads(count=2):
    return nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(count))


IN_GRAPH = {
    "raw maps": KEPT["raw maps"],
    "scores before their softmax": (lambda: Does(probabilities, body=conv(), fc=nn.Linear(4, 3)), {""}),
    "logarithms in a dict": (lambda: Does(logarithms, body=conv(), head=nn.Conv2d(4, 2, 1)), {""}),
    "raw boxes": (lambda: nn.Sequential(conv(), Does(boxes, heads=heads())), {"1"}),
    "code without layers": (lambda: nn.Sequential(conv(), nn.Conv2d(4, 4, 1), Does(boxes_of_maps)), {"2"}),
    "features before an operator in place": (
        lambda: Does(with_features, body=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1)), {""},
    ),
    "a head in a head, beside noise": (
        lambda: nn.Sequential(
            conv(), Does(add_noise),
            nn.Sequential(conv(4), Does(raw_maps, head=nn.Conv2d(4, 2, 1))),
        ),
        {"1", "2.1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_GRAPH)
def test_other_outputs_in_training_are_a_part_of_the_graph(name):
    build, kept = IN_GRAPH[name]
    model, x = build(), torch.randn(4, 3, 6, 6)
    captured, report = capture(model, x)
    assert isinstance(captured, CapturedModule)
    assert {k.name for k in report.kept} == kept
    assert sum(k.in_graph for k in report.kept) == 1
    assert_same_step(model, captured, x)
    again, _ = capture(model, x, kept=report.kept)
    larger = torch.randn(5, 3, 6, 6)
    for copied in (again, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert_same_step(captured, copied, larger)
        torch.testing.assert_close(copied.eval()(larger), captured.eval()(larger))
    assert set(captured.state_dict()) == set(model.state_dict())


def with_noise_before_its_head(m, x):
    return m.head(x + torch.randn_like(x)) if m.training else m.head(x)


def with_a_second_look(m, x):
    return (m.head(x), m.head(x.flip(3))) if m.training else m.head(x)


@pytest.mark.parametrize("function", [with_noise_before_its_head, with_a_second_look])
def test_a_layer_that_training_calls_otherwise_is_captured_with_its_module_kept(function):
    """In a graph of training outputs it would be trained in float, and deployed quantized."""
    model = nn.Sequential(conv(), Does(function, head=nn.Conv2d(4, 2, 1)))
    captured, report = capture(model, torch.randn(4, 3, 6, 6))
    assert [(k.name, k.in_graph) for k in report.kept] == [("1", False)]
    assert isinstance(captured.get_submodule("1.head"), CapturedModule)


def with_noise_before_a_computed_weight(m, x):
    weight = m.head.weight / m.head.weight.norm(dim=1, keepdim=True)
    return F.conv2d(x + torch.randn_like(x) if m.training else x, weight)


def test_a_weight_that_is_computed_is_not_trained_in_float_either():
    model = nn.Sequential(conv(), Does(with_noise_before_a_computed_weight, head=nn.Conv2d(4, 2, 1, bias=False)))
    _, report = capture(model, torch.randn(4, 3, 6, 6))
    assert [(k.name, k.in_graph) for k in report.kept] == [("1", False)]


def with_a_head_for_training(m, x):
    return (m.head(x), m.further(x)) if m.training else m.head(x)


def test_a_layer_for_training_alone_is_a_part_of_the_graph_of_training():
    model = nn.Sequential(conv(), Does(with_a_head_for_training, head=nn.Conv2d(4, 2, 1), further=nn.Conv2d(4, 3, 1)))
    x = torch.randn(4, 3, 6, 6)
    captured, report = capture(model, x)
    assert [(k.name, k.in_graph) for k in report.kept] == [("1", True)]
    assert_same_step(model, captured, x)


class DropsOut(nn.Module):
    """The usual form of a functional dropout: its probability has the name of the function."""

    def __init__(self):
        super().__init__()
        self.dropout = 0.5

    def forward(self, x):
        return F.dropout(x, self.dropout, self.training)


@pytest.mark.parametrize("place", ["inside", "whole"])
def test_a_dropout_and_its_probability_may_have_one_name(place):
    x = torch.randn(4, 3, 6, 6)
    captured, _ = capture(around(DropsOut()) if place == "inside" else DropsOut(), x)
    assert isinstance(captured, CapturedModule), "captured whole"
    assert captured.get_submodule("1" if place == "inside" else "").dropout == 0.5
    assert torch.equal(captured.eval()(x), captured(x))
    assert not torch.equal(captured.train()(x), captured(x))


def test_dropouts_that_eval_mode_calls_with_0_have_the_probabilities_of_training():
    """It is the form of transformers' attention."""
    drops = [Does(lambda m, x: F.dropout(x, 0.3 if m.training else 0.0, m.training)) for _ in range(2)]
    lasting = Does(lambda m, x: F.dropout(x, 0.4, m.training))
    model = nn.Sequential(conv(), *drops, lasting, nn.Dropout(0.2), conv(4))
    captured, report = capture(model, torch.randn(4, 3, 6, 6))
    assert not report.notes
    assert [m.p for m in captured.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3, 0.4, 0.2]


def test_the_modules_around_a_small_kept_module_stay_captured():
    captured, report = capture(KEPT["centre"][0](), torch.randn(4, 3, 6, 6))
    assert isinstance(captured, CapturedModule)
    assert report.kept[0].whole
    assert "centre" in str(report.kept[0])


@pytest.mark.parametrize("drop", [nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)], ids=lambda m: type(m).__name__)
def test_every_dropout_follows_the_mode(drop):
    functional = {nn.AlphaDropout: F.alpha_dropout, nn.FeatureAlphaDropout: F.feature_alpha_dropout}[type(drop)]
    model = nn.Sequential(conv(), drop, Does(lambda m, x: functional(x, 0.2, m.training)), nn.Conv2d(4, 2, 1))
    captured, report = capture(model, x := torch.randn(4, 3, 6, 6))
    assert not report.kept
    assert_same_step(model, captured, x)


def test_checkpointed_blocks_are_computed_twice():
    captured, _ = capture(KEPT["checkpointing"][0](), torch.randn(4, 3, 6, 6))
    calls = []
    for block in captured.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    captured.train()(torch.randn(2, 3, 6, 6)).sum().backward()
    assert len(calls) == 8


def test_a_model_that_needs_labels_in_training_is_captured_with_a_note():
    def loss(m, x):
        if m.training:
            raise ValueError("targets should not be none")
        return m.body(x)

    _, report = capture(Does(loss, body=conv()), torch.randn(2, 3, 6, 6))
    assert "targets should not be none" in report.notes[0]


def test_what_cannot_be_kept_is_named():
    def turned(m, x):
        weight = m.weight * 1.0
        if m.training:
            return Reverse.apply(F.conv2d(x, weight))
        return F.conv2d(x, weight)

    with pytest.raises(CaptureError, match=r"the gradients of weight, input 0 are not those of its operators"):
        capture(Does(turned, weight=nn.Parameter(torch.randn(2, 3, 1, 1))), torch.randn(2, 3, 6, 6))


class Cached(nn.Module):
    """Adds a part of a table, which it keeps from call to call in eval mode, as LeViT does; train() forgets it."""

    def __init__(self):
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(8)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return x + self.table[2:6, None, None]
        if "biases" not in self.cache:
            self.cache["biases"] = self.table[2:6, None, None]
        return x + self.cache["biases"]


@pytest.mark.parametrize("called_before", [False, True])
def test_what_eval_mode_keeps_of_earlier_calls_is_no_constant_in_the_graph(called_before):
    model, x = around(Cached()), torch.randn(4, 3, 6, 6)
    if called_before:
        with torch.no_grad():
            model.eval()(x)
    captured, report = capture(model, x)
    assert not report.kept
    assert_same_step(model, captured, x)
    model.eval()(x)
    assert not isinstance(model[1].cache["biases"], torch._subclasses.FakeTensor)


def test_checkpointed_dropout_is_switched_off_where_it_is_computed_again():
    """Attention with dropout has another kernel than without: torch checks that both computations are of one form."""

    def attend(m, x):
        tokens = m.inner(x).flatten(2).transpose(1, 2)[:, None]
        y = F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.1 if m.training else 0.0)
        return F.dropout(y, 0.1, m.training)

    part = Does(attend, inner=nn.Conv2d(3, 4, 1))
    model = Does(lambda m, x: checkpoint(m.part, x, use_reentrant=False) if m.training else m.part(x), part=part)
    captured, report = capture(model, torch.randn(2, 3, 4, 4))
    assert not report.notes
    assert [k.name for k in report.kept] == [""]
    assert isinstance(captured.part, CapturedModule)
