"""What each runtime's row of the table makes of the same graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.errors import PlacementError
from halfeven.placement.requests import OWN_KERNEL
from placement.parts import Attention, Residual, conv, places, plan

TOKENS = (2, 6, 16)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.last = conv(3), conv(8, 8, 1), conv()

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))


def left(planned):
    return {one.name: one.reason for one in planned.left}


def test_onnx_runtime_wants_the_results_of_convolutions_whoever_reads_them():
    planned = plan(nn.Sequential(conv(3), nn.SiLU(), conv(), nn.ReLU6(), conv()), target="onnxruntime")
    assert places(planned) == [("input",), ("0",), ("1.silu",), ("3.hardtanh",), ("4",)]
    readers = {tensor.places[0]: tensor.consumers for tensor in planned.tensors}
    assert readers["0"] == readers["4"] == (OWN_KERNEL,)
    assert readers["1.silu"] == ("2",)
    assert OWN_KERNEL in str(planned.table())


def test_onnx_runtime_adds_integers_on_both_sides():
    planned = plan(Residual(), target="onnxruntime")
    assert places(planned) == [("x",), ("relu",), ("relu_1",), ("norm",), ("relu_2",), ("last",)]
    (branch,) = [tensor for tensor in planned.tensors if tensor.places == ("norm",)]
    assert branch.consumers == ("add",)
    assert ("norm",) not in places(plan(Residual()))


def test_onnx_runtime_multiplies_gates_in_integers():
    assert [place for (place,) in places(plan(Gate(), target="onnxruntime"))] == [
        *("x", "relu", "mean", "gate", "sigmoid", "mul", "last")
    ]
    assert ("sigmoid",) not in places(plan(Gate()))


def test_additions_of_a_transformer_stay_in_float():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention, self.last = nn.LayerNorm(16), Attention(), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(self.norm(x + self.attention(self.norm(x))))

    for target in ("onnxruntime", "openvino", "tensorrt"):
        assert not any("add" in place for group in places(plan(Block(), TOKENS, target=target)) for place in group)


def test_matrix_products_take_zero_points_where_the_runtime_does():
    schemes = {
        target: {str(t.scheme) for t in plan(Attention(), TOKENS, target=target).tensors if "qkv" in t.places}
        for target in ("openvino", "onnxruntime", "tensorrt")
    }
    assert schemes == {
        "openvino": {"s8 symmetric per tensor"},
        "onnxruntime": {"u8 asymmetric per tensor"},
        "tensorrt": {"s8 symmetric per tensor"},
    }


def test_tensorrt_has_signed_activations_everywhere():
    planned = plan(nn.Sequential(conv(3), nn.ReLU(), conv(), nn.SiLU(), conv()), target="tensorrt")
    assert {str(tensor.scheme) for tensor in planned.tensors} == {"s8 symmetric per tensor"}


def test_what_a_runtime_has_no_kernel_for_stays_in_float_and_is_named():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), conv())
    planned = plan(model, target="onnxruntime")
    assert [weight.name for weight in planned.weights] == ["0", "4"]
    assert left(planned)["2"] == "onnxruntime has no integer kernel for it"
    assert [weight.name for weight in plan(model).weights] == ["0", "2", "4"]


@pytest.mark.parametrize("scheme", ["w4a8", "w8a4"])
def test_a_scheme_that_a_target_cannot_do_is_refused(scheme):
    with pytest.raises(PlacementError, match="tensorrt cannot run"):
        plan(Residual(), target="tensorrt", scheme=scheme)
