import pytest
import torch
from torch import nn

from halfeven.graph import torch_private
from halfeven.graph.capture import capture
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import module_calls, operations, replace_call

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.head = Head()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        y = torch.clamp(self.layer(x), -1.0, 3.0)
        return self.head(y * self.gain), y


class Head(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def ops():
    captured, _ = capture(Net(), torch.randn(2, 3, 8, 8))
    return {op.name if op.is_function or op.is_module else op.path: op for op in operations(captured.graph)}


def test_what_a_node_is(ops):
    assert ops["x"].is_input
    assert ops["gain"].is_constant
    assert ops["Conv2d"].is_module
    assert ops["mul"].is_function
    assert ops["output"].is_output
    assert ops["Conv2d"].kind is OperatorKind.CONVOLUTION
    assert ops["clamp"].function is aten.clamp.default
    assert ops["Conv2d"].function is None


def test_modules_and_constants_are_those_of_the_model(ops):
    layer = ops["Conv2d"].module
    assert isinstance(layer, nn.Conv2d)
    assert ops["mul"].module is None
    assert ops["gain"].constant is ops["gain"].node.graph.owning_module.gain
    with pytest.raises(AttributeError, match="reads no constant"):
        _ = ops["mul"].constant


def test_names_and_paths(ops):
    assert (ops["Conv2d"].path, ops["Conv2d"].parent_path, ops["Conv2d"].last_name) == ("layer", "", "layer")
    assert ops["mean"].path == "head"
    assert ops["mul"].path == ""


def test_arguments_by_name_with_defaults(ops):
    assert ops["clamp"].argument("min") == -1.0
    assert ops["mean"].argument("dim") == [2, 3]
    assert ops["mean"].argument("keepdim") is False
    with pytest.raises(KeyError):
        ops["mean"].argument("axis")


def test_results_as_capture_recorded_them(ops):
    assert ops["mean"].shape[1] == 4
    assert ops["mean"].ndim == 2
    assert ops["clamp"].value.dtype is torch.float32
    assert ops["clamp"].is_float_tensor
    assert not ops["output"].is_tensor


def test_inputs_and_readers_of_a_node(ops):
    assert ops["clamp"].inputs == (ops["Conv2d"],)
    assert ops["Conv2d"].only_reader == ops["clamp"]
    assert ops["clamp"].only_reader is None
    assert [reader.name for reader in ops["clamp"].readers] == ["mul", "output"]


def test_a_module_called_twice_stands_there_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    captured, _ = capture(Twice(), torch.randn(2, 4))
    assert [op.path for op in module_calls(captured.graph)] == ["layer", "layer"]
    first, second = module_calls(captured.graph)
    replace_call(second.node, aten.relu.default, (first.node,))
    captured.recompile()
    x = torch.randn(3, 4)
    assert torch.equal(captured(x), torch.relu(captured.layer(x)))


def test_in_place_operators_and_their_functional_forms():
    assert torch_private.functional_form(aten.add_.Tensor) is aten.add.Tensor
    assert torch_private.functional_form(aten.add.Tensor) is None
    assert torch_private.is_pure(aten.relu.default)
    assert not torch_private.is_pure(aten.bernoulli.default)
    assert torch_private.short_name(aten.add.Tensor) == "add"


def test_foreach_wrappers_copy_and_blend():
    into = [torch.zeros(2), torch.ones(3)]
    torch_private.blend_all(into, [torch.ones(2), torch.zeros(3)], 0.25)
    assert torch.equal(into[0], torch.full((2,), 0.25))
    assert torch.equal(into[1], torch.full((3,), 0.75))
    torch_private.copy_all(into, [torch.ones(2), torch.zeros(3)])
    assert torch.equal(into[1], torch.zeros(3))
