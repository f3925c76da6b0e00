"""Attention, written out so that its products can be quantized."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.graph.capture import capture
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import lower_attention, lower_stacked_sums, merge_duplicates
from halfeven.graph.view import kind_of

aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self, width=16, heads=2, **options):
        super().__init__()
        self.heads, self.options = heads, options
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.options)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def targets(captured):
    return [node.target for node in captured.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("mask", [None, "float", "boolean"])
def test_the_same_result(options, mask):
    masks = {
        None: None,
        "float": torch.randn(1, 1, 5, 5).expand(3, 2, 5, 5).contiguous(),
        "boolean": torch.ones(3, 2, 5, 5, dtype=torch.bool).tril(),
    }
    example = (torch.randn(3, 5, 16),) if mask is None else (torch.randn(3, 5, 16), masks[mask])
    captured, report = capture(Attention(**options).eval(), example)
    assert report.regions == [""]
    expected = captured(*example)
    assert lower_attention(captured) == 1
    torch.testing.assert_close(captured(*example), expected, rtol=1e-5, atol=1e-6)
    assert aten.scaled_dot_product_attention.default not in targets(captured)
    assert targets(captured).count(aten.matmul.default) == 2
    kinds = [kind_of(node) for node in captured.graph.nodes]
    assert kinds.count(OperatorKind.MATMUL) == 2
    assert kinds.count(OperatorKind.SOFTMAX) == 1


def test_any_batch_after_lowering():
    model = Attention().eval()
    captured, _ = capture(model, torch.randn(2, 5, 16))
    lower_attention(captured)
    x = torch.randn(7, 5, 16)
    torch.testing.assert_close(captured(x), model(x), rtol=1e-5, atol=1e-6)


def test_new_nodes_know_their_shapes_and_where_they_come_from():
    captured, _ = capture(Attention().eval(), torch.randn(2, 5, 16))
    lower_attention(captured)
    for node in captured.graph.nodes:
        if node.target in (aten.matmul.default, aten.softmax.int):
            assert node.meta["val"].ndim == 4
            assert node.meta["nn_module_stack"]


def test_a_causal_mask_stays_whole():
    model = Attention(is_causal=True).eval()
    captured, _ = capture(model, torch.randn(2, 5, 16))
    assert lower_attention(captured) == 0
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(captured(x), model(x), rtol=1e-5, atol=1e-6)


def test_nothing_to_lower():
    captured, _ = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    assert lower_attention(captured) == 0


def test_torchs_own_attention():
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    captured, _ = capture(model.eval(), (x, x, x))
    assert targets(captured).count(aten.scaled_dot_product_attention.default) + targets(captured).count(
        aten.bmm.default
    )
    lower_attention(captured)
    torch.testing.assert_close(captured(x, x, x)[0], model(x, x, x)[0], rtol=1e-5, atol=1e-6)


class Stacked(nn.Module):
    """EfficientDet's way to add feature maps, and sums that are something else."""

    def forward(self, x):
        three = torch.stack([x, x * 2, x.neg()], dim=-1)
        return three.sum(-1), torch.stack([x, x + 1], 1).sum(1), three, torch.stack([x, x * 3]).sum(2)


def test_sums_of_stacks_are_additions():
    model, x = Stacked().eval(), torch.randn(2, 3, 4)
    captured, _ = capture(model, x)
    expected = captured(x)
    assert lower_stacked_sums(captured) == 1, "one stack is returned too, one is summed over another axis"
    for found, wanted in zip(captured(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert targets(captured).count(aten.sum.dim_IntList) == 2
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(captured(x)[1], model(x)[1])


class Alike(nn.Module):
    def forward(self, x):
        a, b, c = F.relu(x), F.relu(x), F.hardtanh(x, 0, 6)
        return F.pad(a, (1, 1)) + F.pad(b, (1, 1)) * 2, c + F.hardtanh(x, 0, 5)


def test_equal_operators_are_one():
    x = torch.randn(2, 3, 4)
    captured, _ = capture(Alike().eval(), x)
    expected = captured(x)
    assert merge_duplicates(captured) == 2, "a ReLU and a pad; not clips at other bounds"
    for found, wanted in zip(captured(x), expected, strict=True):
        assert torch.equal(found, wanted)
    assert targets(captured).count(aten.relu.default) == 1


def test_random_numbers_and_changes_in_place_are_never_merged():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    random = [graph.call_function(aten.rand_like.default, (x,)) for _ in range(2)]
    changed = [graph.call_function(aten.add_.Tensor, (x, 1)) for _ in range(2)]
    graph.output((*random, *changed))
    region = CapturedModule(nn.Module(), graph)
    assert merge_duplicates(region) == 0
