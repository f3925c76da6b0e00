"""Files for TensorRT, built and run where tensorrt is installed: types of layers, answers and latency."""

import importlib.util
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfeven as he
from gpu_parts.job import Job, images, network

RUNS = 30
LARGEST_DIFFERENCE = 0.1
"""Of the outputs in float32 from the quantized model, over its size: TensorRT reserves the order of its operations."""


def files(job: Job) -> bool:
    """Write each network in float32 and in float16, build both, and compare; True where none is installed."""
    agree = True
    for name in job.networks:
        batch = images(job, 8)
        qmodel = he.calibrate(he.prepare(network(job, name).eval(), batch, target="tensorrt"), [batch]).eval()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            expected = qmodel(batch)
            for precision in ("f32", "runtime"):
                path = he.export(qmodel, Path(folder) / f"{precision}.onnx", float_precision=precision)
                if not job.cuda or importlib.util.find_spec("tensorrt") is None:
                    why = "tensorrt is not installed" if job.cuda else "TensorRT needs CUDA"
                    job.report("TensorRT", network=name, precision=precision, bytes=path.stat().st_size, not_run=why)
                    continue
                agree &= _built_and_run(job, name, precision, path, batch, expected)
    return agree


def _built_and_run(job: Job, name: str, precision: str, path: Path, batch: Tensor, expected: Tensor) -> bool:
    engine = _engine(path, tuple(batch.shape))
    run, output = _runner(job, engine, batch)
    run()
    found = output.float().cpu()
    difference = float((found - expected).norm() / expected.norm())
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    close = difference <= LARGEST_DIFFERENCE
    kinds = dict(_types_of_outputs(engine).most_common(4))
    same = float((found.argmax(1) == expected.argmax(1)).float().mean())
    job.report(
        "TensorRT",
        network=name,
        precision=precision,
        agree=close,
        difference=difference,
        same_top1=same,
        ms=statistics.median(times),
        types=kinds,
    )
    return close


def _engine(path: Path, shape: tuple[int, ...]) -> Any:
    """Build a file as a strongly typed network.

    Raises:
        RuntimeError: the parser or the builder refuses it; the message is theirs.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # The only kind of network in TensorRT 11, where the flag may be gone.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network_ = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network_, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape(network_.get_input(0).name, (1, *shape[1:]), shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network_, config)
    if plan is None:
        raise RuntimeError(f"TensorRT could not build {path.name}; its log says why")
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


def _runner(job: Job, engine: Any, batch: Tensor) -> tuple[Any, Tensor]:
    """Return a function that computes the batch, and the tensor that it fills."""
    context = engine.create_execution_context()
    given = batch.to(job.device).contiguous()
    context.set_input_shape(engine.get_tensor_name(0), tuple(given.shape))
    context.set_tensor_address(engine.get_tensor_name(0), given.data_ptr())
    name = engine.get_tensor_name(1)
    output = torch.empty(tuple(context.get_tensor_shape(name)), device=job.device)  # files keep float32 at their ends
    context.set_tensor_address(name, output.data_ptr())
    stream = torch.cuda.Stream(job.device)

    def run(given: Tensor = given) -> None:  # TensorRT has only its address: held here, the batch is not freed
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()

    job.wait()
    return run, output


def _types_of_outputs(engine: Any) -> Counter[str]:
    """Count the engine's layers by the type of what they write."""
    import tensorrt as trt

    told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    layers = [layer for layer in told.get("Layers", []) if isinstance(layer, dict)]
    return Counter(layer["Outputs"][0].get("Format/Datatype", "?") for layer in layers if layer.get("Outputs"))
