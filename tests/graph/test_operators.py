"""The table of operators, and what a new row in it changes."""

import math

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.graph import operators
from halfeven.graph.operators import OPERATORS, Operator, OperatorKind
from halfeven.graph.view import Op, operations
from halfeven.placement.execution_graph import fused_graph

K = OperatorKind


@torch.library.custom_op("madeup::halve_axis", mutates_args=())
def halve_axis(x: torch.Tensor) -> torch.Tensor:
    """Every second column: values move, none changes."""
    return x[..., ::2].clone()


@halve_axis.register_fake
def _(x):
    return torch.empty_like(x[..., ::2])


@torch.library.custom_op("madeup::fence", mutates_args=())
def fence(x: torch.Tensor, low: float, high: float = 2.0) -> torch.Tensor:
    """A clip under another name."""
    return torch.clamp(x, low, high)


@fence.register_fake
def _(x, low, high=2.0):
    return torch.empty_like(x)


class Moved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(torch.ops.madeup.halve_axis(self.first(x)))


class Fenced(Moved):
    def forward(self, x):
        return self.second(torch.ops.madeup.fence(self.first(x), 0.0))


X = torch.linspace(-3, 3, 2 * 3 * 9 * 13).reshape(2, 3, 9, 13)


def calibrated(net):
    torch.manual_seed(0)
    qmodel = he.prepare(net.eval(), X, activation_observer="minmax").eval()
    he.calibrate(qmodel, [X])
    return qmodel


def places(plan):
    return {tensor.places: tensor.scheme for tensor in plan.tensors}


def unread(plan):
    return {left.name: left.reason for left in plan.left}


def test_without_a_row_an_operator_runs_in_float():
    plan = he.plan_of(calibrated(Moved()))
    assert unread(plan)["first"] == "its readers compute in float (halve_axis)"
    assert ("first",) not in places(plan)
    assert ("halve_axis",) in places(plan)


def test_a_row_that_keeps_the_scale_lets_a_quantizer_pass(monkeypatch):
    row = Operator(target=torch.ops.madeup.halve_axis.default, kind=K.SAME_SCALE)
    monkeypatch.setitem(operators.ROWS, row.target, row)
    qmodel = calibrated(Moved())
    plan = he.plan_of(qmodel)
    assert ("first",) in places(plan)
    assert ("halve_axis",) not in places(plan)
    assert "halve_axis" not in unread(plan)
    # The values that the second layer reads lie on the grid of the first one's quantizer.
    quantizer = qmodel.get_submodule("quantizers.first")
    with torch.no_grad():
        moved = torch.ops.madeup.halve_axis(quantizer(qmodel.first(qmodel.quantizers.x(X))))
    steps = moved / quantizer.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_a_row_of_an_activation_that_clips(monkeypatch):
    assert ("fence",) in places(he.plan_of(calibrated(Fenced())))
    assert not places(he.plan_of(calibrated(Fenced())))[("fence",)].symmetric

    row = Operator(target=torch.ops.madeup.fence.default, kind=K.ACTIVATION, bounds=lambda a: (a["low"], a["high"]))
    monkeypatch.setitem(operators.ROWS, row.target, row)
    qmodel = calibrated(Fenced())
    scheme = places(he.plan_of(qmodel))[("fence",)]
    assert not scheme.signed  # its bounds say that it is never negative
    assert scheme.symmetric
    assert "fence" not in [op.name for op in operations(fused_graph(qmodel))]  # the quantizer clips in its place
    (node,) = [op.node for op in operations(qmodel.graph) if op.name == "fence"]
    assert Op(node).bounds == (0.0, 2.0)
    assert float(qmodel.quantizers.fence.scale) * 255 == pytest.approx(2.0, rel=1e-2)
    with torch.no_grad():
        y = qmodel(X)
    assert torch.isfinite(y).all()


def test_every_row_has_a_target_of_its_own_and_cautious_facts():
    assert len(operators.ROWS) == len(OPERATORS)
    assert Operator(target=None, kind=K.FLOAT).results == (-math.inf, math.inf)
    for row in OPERATORS:
        if row.takes_maximum:
            assert row.kind is K.SAME_SCALE, "quantizers pass a maximum, so it must keep the scale"
        if row.bounds is not None:
            assert row.kind is K.ACTIVATION


def test_operators_that_are_rounded_once_need_no_kernel():
    aten = torch.ops.aten
    exact = (aten.relu.default, aten.leaky_relu.default, aten.clamp.default, aten.add.Tensor, aten.max_pool2d.default)
    of_kernels = (aten.gelu.default, aten.softmax.int, aten.exp.default, aten.mean.dim, aten.matmul.default)
    assert not any(operators.row_of(target).has_kernel_rounding for target in exact)
    assert all(operators.row_of(target).has_kernel_rounding for target in of_kernels)
