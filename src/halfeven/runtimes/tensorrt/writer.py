"""ONNX for TensorRT: in float32, or with float16 in place of it, which a strongly typed network computes in."""

from pathlib import Path

import torch

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.file_interface import FLOAT_PRECISION
from halfeven.runtimes.onnx import writer
from halfeven.runtimes.onnx.half import in_half


def write(program: torch.export.ExportedProgram, deployed: Deployed, path: Path) -> None:
    """Write the program of a deployed model as an ONNX file for TensorRT, with a free batch size."""
    model = writer.named_model(program, deployed)
    if deployed.interface is not None and deployed.interface.metadata.get(FLOAT_PRECISION) == "runtime":
        model = in_half(model)
    writer.write_model(model, path)
