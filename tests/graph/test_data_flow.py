"""Which tensors depend on the inputs."""

import torch
from torch import nn

from halfeven.graph.capture import capture
from halfeven.graph.data_flow import computed_from_inputs
from halfeven.graph.view import Op


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, 4, 4))

    def forward(self, x):
        zeros = torch.zeros_like(x) + x.new_ones(x.shape)
        angles = torch.cos(torch.arange(x.shape[0])[:, None, None, None] * 0.1)
        position = nn.functional.interpolate(self.position.exp(), size=x.shape[2:]).expand_as(x)
        return x.sin() * (angles + position) + zeros.expm1() + x.max().tanh()


def test_sizes_of_inputs_and_constants_carry_no_values():
    captured, _ = capture(Net().eval(), torch.randn(2, 3, 8, 8))
    found = {Op(node).name for node in computed_from_inputs(captured.graph)}
    everything = {Op(node).name for node in captured.graph.nodes}
    assert {"cos", "exp", "expm1", "zeros_like", "arange", "expand_as"} <= everything - found
    assert {"x", "sin", "max", "tanh", "mul"} <= found
