"""Small layers and a plan in one step, for the tests of placement."""

import torch
from torch import nn
from torch.nn import functional as F

from halfeven.graph.capture import capture
from halfeven.graph.rewrite import lower_attention
from halfeven.placement.make_plan import make_plan, regions
from halfeven.placement.plan import Plan, QuantizationOptions
from halfeven.runtimes.runtime import runtime_named

IMAGE = (2, 3, 8, 8)


def conv(inputs=8, outputs=8, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **({"padding": kernel // 2} | options))


def captured(model: nn.Module, shape=IMAGE, leave_out=()) -> nn.Module:
    result, _ = capture(model.eval(), torch.randn(shape), leave_out)
    for region in regions(result).values():
        lower_attention(region)
    return result


def plan(model: nn.Module, shape=IMAGE, **options) -> Plan:
    wanted = QuantizationOptions(**options)
    return make_plan(captured(model, shape, wanted.leave_out), wanted, runtime_named(wanted.target).target)


def places(planned: Plan) -> list[tuple[str, ...]]:
    return [tensor.places for tensor in planned.tensors]


class Residual(nn.Module):
    """A residual block; `skip_first` says how the addition is written, `down` puts a convolution on the skip."""

    def __init__(self, skip_first=False, down=False, act=F.relu):
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv(3), conv(), conv()
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8)) if down else nn.Identity()
        self.last = conv(8, 4)
        self.skip_first, self.act = skip_first, act

    def forward(self, x):
        x = F.relu(self.stem(x))
        y, skip = self.norm(self.conv2(F.relu(self.conv1(x)))), self.down(x)
        return self.last(self.act(skip + y if self.skip_first else y + skip))


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))
