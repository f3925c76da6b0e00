"""A process that quantizes model after model does not grow by what torch keeps of their graphs."""

import gc

import pytest
from torch import nn
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import halfeven as he
from faults.mutations import IMAGES, Net
from sweeps import crossed


def kept():
    """Return how many exported programs and sources of graphs this process holds."""
    gc.collect()
    return sum(type(o) is ShapeEnv for o in gc.get_objects()), len(graph_module._loader.eval_cache)


class Tokens(nn.Module):
    """Operators that a runtime computes for the simulation, each as a program of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(nn.functional.gelu(self.norm(self.conv(x).flatten(2).transpose(1, 2))))


@pytest.mark.parametrize(("net", "ending"), crossed([Net, Tokens], [".xml", ".onnx"]))
def test_nothing_is_kept_of_models_that_are_gone(tmp_path, ending, net):
    def quantize():
        target = "openvino" if ending == ".xml" else "onnxruntime"
        qmodel = he.calibrate(he.prepare(net(), IMAGES, target=target), [IMAGES])
        path = he.export(qmodel, tmp_path / f"model{ending}")
        he.verify(qmodel, path, [IMAGES], timed=False)

    quantize()
    before = kept()
    quantize()
    programs, graphs = kept()
    assert programs <= before[0]  # fewer where what other tests have left went in between
    assert graphs <= before[1]


def test_a_failing_graph_still_shows_its_source():
    def fail(*_):
        raise RuntimeError("no")

    qmodel = he.calibrate(he.prepare(Net(), IMAGES), [IMAGES])
    layer = next(module for module in qmodel.modules() if isinstance(module, nn.Conv2d))
    layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no") as failed:
        qmodel(IMAGES)
    shown = [str(entry.statement) for entry in failed.traceback if "eval_with_key" in str(entry.path)]
    assert any("self." in statement for statement in shown)
