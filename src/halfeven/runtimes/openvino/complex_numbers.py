"""Name the operators on complex numbers that OpenVINO's converter does not know, Fourier transforms above all."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from halfeven.errors import ExportError, named
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op, operations
from halfeven.placement.make_plan import regions


@contextmanager
def complex_numbers_named(model: nn.Module) -> Iterator[None]:
    """Turn the converter's errors on a model with complex numbers into one that names the operators.

    Args:
        model: the model that is converted within the context.

    Raises:
        ExportError: the conversion failed, and the model computes with complex numbers.
    """
    try:
        yield
    except Exception as error:
        graphs = [region.graph for region in regions(model).values()]
        makers = [op for graph in graphs for op in operations(graph) if _makes_complex(op)]
        if not makers:
            raise
        names = list(dict.fromkeys(op.tensor_name for op in makers))
        raise ExportError(
            f"OpenVINO's converter does not know operators on complex numbers ({named(names)}), so the file cannot be "
            "written. Compute them outside of the model, as a part of the preprocessing; write a Fourier transform as "
            "a product with a matrix of cosines and sines; or deploy for ONNX Runtime, which has them: "
            'target="onnxruntime".'
        ) from error


def _makes_complex(op: Op) -> bool:
    values = pytree.tree_leaves(op.value)
    return not op.is_constant and any(isinstance(value, Tensor) and value.is_complex() for value in values)
