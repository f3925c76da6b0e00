"""Units cover the graph in order, and blocks are what a reader of the model would call a block."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.layerwise.activations import run
from halfeven.layerwise.blocks import MAX_BLOCK_LAYERS, computed_nodes, find_blocks
from nets import IMAGE, Branches, Residual, prepared


class Block(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Bottleneck(nn.Module):
    """An inverted residual without its residual."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(inputs, 12, 1), nn.Conv2d(12, 12, 3, groups=12)
        self.project = nn.Conv2d(12, outputs, 1)

    def forward(self, x):
        return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class Masked(nn.Module):
    """Attention with a mask that every block reads."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, x, mask):
        bias = (1 - mask[:, None, None, :]) * -1e4
        for block in self.blocks:
            x = block.norm1(x + block.linear2(F.gelu(block.linear1(x))) + bias.sum() * 0)
        return x


def names(model, granularity, shape=IMAGE):
    return [block.name for block in find_blocks(prepared(model.eval(), shape), granularity)]


RESNET = nn.Sequential(
    nn.Conv2d(3, 6, 3), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
)


def test_a_layer_each():
    assert names(RESNET, "layers") == ["0", "2.conv1", "2.conv2", "3.conv1", "3.conv2", "6"]


def test_blocks_of_a_residual_network():
    assert names(RESNET, "blocks") == ["0", "2", "3", "6"]


def test_chains_of_one_module_are_one_block():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Bottleneck(6, 8), Bottleneck(8, 4))
    assert names(net, "blocks") == ["0", "2", "3"]


def test_layers_side_by_side_in_the_model_itself_are_not_one_block():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    assert names(net, "blocks") == ["0", "2", "4"]


def test_masks_do_not_keep_blocks_together():
    qmodel = he.prepare(Masked().eval(), (torch.randn(2, 5, 8), torch.ones(2, 5)))
    assert [block.name for block in find_blocks(qmodel, "blocks")] == ["blocks.0", "blocks.1"]


def test_a_long_block_is_taken_layer_by_layer():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(MAX_BLOCK_LAYERS + 1))

        def forward(self, x):
            y = x
            for layer in self.layers:
                y = y + F.relu(layer(y))
            return y + self.layers[0].bias.sum() * y

    found = find_blocks(prepared(Dense().eval()), "blocks")
    assert all(len(block.layers) <= MAX_BLOCK_LAYERS for block in found)
    assert sum(len(block.layers) for block in found) == MAX_BLOCK_LAYERS + 1


def test_blocks_of_a_vision_transformer():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    found = find_blocks(prepared(model.eval(), (2, 3, 32, 32)), "blocks")
    assert [(u.name, len(u.layers)) for u in found] == [
        ("patch_embed.proj", 1), ("blocks.0.attn", 2), ("blocks.0.mlp", 2), ("blocks.1.attn", 2), ("blocks.1.mlp", 2),
        ("head", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("granularity", ["layers", "blocks"])
@pytest.mark.parametrize("model", [RESNET, Residual(), Branches()], ids=["resnet", "residual", "branches"])
def test_units_one_after_the_other_are_the_model(model, granularity):
    qmodel = prepared(model.eval())
    found = find_blocks(qmodel, granularity)
    nodes = [node for block in found for node in block.nodes]
    assert nodes == computed_nodes(qmodel)
    x = torch.randn(4, 3, 8, 8)
    he.calibrate(qmodel, [x])
    (placeholder,) = (node for node in qmodel.graph.nodes if node.op == "placeholder")
    known = {placeholder: x}
    for block in found:
        assert set(block.inputs) <= set(known)
        known |= run(block, {node: known[node] for node in block.inputs})
    (output,) = (node for node in qmodel.graph.nodes if node.op == "output")
    expected = qmodel(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert all(torch.equal(known[n], value) for n, value in zip(output.all_input_nodes, expected, strict=True))
