"""The blocks of a plan on a page."""

import torch
from torch import nn

import halfeven as he
from halfeven.reporting.plan_blocks import plan_blocks


class Part(nn.Module):
    def __init__(self, first, norm):
        super().__init__()
        self.conv = nn.Conv2d(first, 8, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x))


class Network(nn.Module):
    """Parts without weights stand between, before and behind those that have weights."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Part(8, nn.Softmax(1)) for _ in range(11)])
        self.between = nn.Sequential(nn.ReLU(), nn.ReLU6())
        self.pool = nn.ModuleDict({"mean": nn.AdaptiveAvgPool2d(1)})
        self.stem = Part(3, nn.Hardswish())
        self.scores = nn.ModuleDict({"softmax": nn.Softmax(1)})

    def forward(self, x):
        x = self.between(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        x = self.last(self.pool["mean"](x).flatten(1))
        return self.scores["softmax"](x)


def test_blocks_with_and_without_weights_stand_in_the_order_of_the_network():
    plan = he.plan(Network().eval(), torch.randn(2, 3, 8, 8))
    names = [block["name"] for block in plan_blocks(plan.to_dict())]
    inner = ["stem", "between.1", *(f"blocks.{number}" for number in range(11)), "pool", "scores"]
    assert [name for name in names if name != "(outside of blocks)"] == inner


def test_a_layer_in_integers_whose_result_is_in_float_does_not_count_as_float():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 4, 1)))
    plan = he.plan(network.eval(), torch.randn(2, 3, 8, 8))
    blocks = plan_blocks(plan.to_dict())
    assert sum(block["in_float"] for block in blocks) == 0
    assert sum(block["quantized"] for block in blocks) == len(plan.tensors) + len(plan.weights)
    lines = [line for block in blocks for line in block["lines"]]
    assert "1.0 (Conv2d), result in float: an output of the model" in lines


def test_a_page_without_a_plan_has_no_blocks():
    assert plan_blocks({}) == []
