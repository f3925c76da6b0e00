"""What files of a run say about themselves, and which files are not replaced."""

import io
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info
from rich.console import Console
from torch import nn

import halfeven
from halfeven.cli.deliver import check_replaceable, preprocessing
from halfeven.cli.run import RunContext
from halfeven.config import DataOptions
from halfeven.errors import ConfigError

VALUES = "RGB from 0 to 1, minus [0.5, 0.5, 0.5], divided by [0.25, 0.25, 0.25]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"source": "image_folder", "resize": 36},
            f"short side scaled (bilinear, antialiased) to 36 pixels; the middle 32 x 32 pixels; {VALUES}",
        ),
        (
            {"source": "voc_segmentation"},
            f"scaled (bilinear, antialiased) to fit into 32 x 32 pixels; {VALUES}; zeros on the right and below",
        ),
        (
            {"source": "coco_detection", "keep_aspect": False},
            f"scaled (bilinear, antialiased) to fill 32 x 32 pixels; {VALUES}",
        ),
        ({"source": "shapes"}, f"32 x 32 pixels; {VALUES}"),
    ],
    ids=lambda value: value["source"] if isinstance(value, dict) else "",
)
def test_a_file_says_how_its_images_are_made(options, said):
    data = DataOptions(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), **options)
    assert preprocessing(data) == {"preprocessing": said}


def test_of_other_data_only_the_users_code_knows_it():
    assert preprocessing(DataOptions(source="callable", function="a:b")) == {}


def test_the_command_line_names_files_where_python_has_tables():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1))
    qmodel = halfeven.quantize(model, [torch.randn(2, 3, 6, 6)], scheme="w7a8")
    context = SimpleNamespace(console=Console(file=io.StringIO()))
    RunContext.log(context, str(halfeven.plan_of(qmodel)))
    said = context.console.file.getvalue()
    assert "plan.txt lists every tensor" in said
    assert "print(" not in said


def test_a_file_for_another_runtime_is_not_replaced(tmp_path):
    """Files for ONNX Runtime and for TensorRT have one name."""
    path = tmp_path / "model.onnx"
    check_replaceable([path], "tensorrt")
    ends = [make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = make_model(make_graph([make_node("Identity", ["x"], ["y"])], "graph", ends[:1], ends[1:]))
    onnx.helper.set_model_props(model, {"halfeven.target": "onnxruntime"})
    onnx.save(model, path)
    check_replaceable([path], "onnxruntime")
    with pytest.raises(ConfigError, match=r"for onnxruntime, and would be replaced by a file for tensorrt"):
        check_replaceable([path], "tensorrt")
    path.write_bytes(b"damaged")
    check_replaceable([path], "tensorrt")
