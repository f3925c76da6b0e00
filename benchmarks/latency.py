"""Latency of deployed files beside the float model's and other libraries' files, and the kernels that it is spent in.

    python benchmarks/latency.py [resnet18 keywords ...] [--runtimes openvino onnxruntime] [--batches 1 8]
        [--scheme w8a8] [--rounds 15] [--threads 1] [--quantize-gates] [--json FILE]
    python benchmarks/latency.py --verify [--small] [--scheme w7a8]

Each network is random, quantized after calibration alone and written for both runtimes. The float file is that of the
runtime's own converter, and runs in float32 and, where the runtime then computes otherwise, in its default precision.
NNCF's and ONNX Runtime's own static quantization of the same float file stand beside it where they are installed. All
files of a network run in turn, in one process; a ratio is the median over those rounds of a file's time over the float
file's, with the interval that holds half of the rounds. The profile is the runtime's own: time by kernel and precision,
and the slowest kernels in float.

`--quantize-gates` puts the gates of SiLU and hard-swish into integers too, where a network has them and the runtime is
ONNX Runtime: rows say in `gates` whether it did.

`--verify` times nothing: it says how many integers of each file equal the exact simulation's, and which layers ran in
float. `--small` gives images of 64 pixels and half of the text, except where a network's own size is fixed.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from brought_models import KeywordNet, SuperResolution, Tagger, Unet, Video, Vocoder, Yolo
from torch import Tensor, nn

import halfeven as he
from halfeven.runtimes.layer_execution import KernelTime, slowest
from halfeven.runtimes.openvino import session as openvino_session
from halfeven.runtimes.runtime import runtime_named

ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}
SLOWEST = 3
"""Kernels in float that a profile names."""


class MiniLM(nn.Module):
    """The encoder of all-MiniLM-L6: 6 layers, 384 features, 12 heads, with its own mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        self.encoder = BertModel(BertConfig(**sizes, attn_implementation="eager"), add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(ids)[0]
        return tokens.mean(1)


def pictures(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


def of_timm(name: str, size: int = 224) -> tuple[Callable[[], nn.Module], Callable[[int], Tensor]]:
    return lambda: timm.create_model(name), pictures(size)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet18": of_timm("resnet18"),
    "resnet50": of_timm("resnet50"),
    "mobilenetv2": of_timm("mobilenetv2_100"),
    "mobilenetv3": of_timm("mobilenetv3_large_100"),
    "efficientnet_b0": of_timm("efficientnet_b0"),
    "unet": (Unet, pictures(128)),
    "yolo": (Yolo, pictures(256)),
    "super_resolution": (SuperResolution, pictures(64)),
    "vit_tiny": of_timm("vit_tiny_patch16_224"),
    "swin_tiny": of_timm("swin_tiny_patch4_window7_224"),
    "minilm": (MiniLM, lambda batch: torch.randint(1000, (batch, 128))),
    "keywords": (KeywordNet, lambda batch: torch.randn(batch, 8000)),
    "vocoder": (Vocoder, lambda batch: torch.randn(batch, 20, 64)),
}
"""Name -> what makes the network, and what makes a batch of its inputs."""

FURTHER: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convnext_tiny": of_timm("convnext_tiny"),
    "mobilenetv3_small": of_timm("mobilenetv3_small_100"),
    "gru": (lambda: Tagger(nn.GRU, 128), lambda batch: torch.randint(60, (batch, 64))),
    "lstm": (lambda: Tagger(nn.LSTM, 128), lambda batch: torch.randint(60, (batch, 64))),
    "video": (Video, lambda batch: torch.randn(batch, 3, 8, 64, 64)),
}
"""Networks that run where they are named alone."""

HALF_AS_LONG = {"minilm": 64, "keywords": 4000, "vocoder": 32}
"""Positions of a small input that is no image."""
GATED = ("mobilenetv3", "efficientnet_b0", "yolo")
"""Networks of SiLU or hard-swish, whose gates `--quantize-gates` puts into integers in ONNX Runtime."""
TRANSFORMERS = ("vit_tiny", "swin_tiny", "minilm")
"""Networks that NNCF is told to be transformers, as its documentation asks."""
FIXED = ("vit_tiny", "swin_tiny")
"""Networks whose images have one size."""


def samples(name: str, batch: int, *, small: bool) -> Tensor:
    """A batch of a network's inputs; a small one has fewer positions."""
    x = (NETWORKS | FURTHER)[name][1](batch)
    if not small or name in FIXED:
        return x
    return x[..., : HALF_AS_LONG[name]] if name in HALF_AS_LONG else x[..., :64, :64]


Run = Callable[[], object]
"""Computes one batch."""
Opener = Callable[[Tensor], Run]
"""Makes a function that computes a batch, of a file that was made once for all batch sizes."""


def openvino_run(model: Any, x: np.ndarray[Any, Any], threads: int, precision: str = "f32") -> Run:
    """A file, or a converted model, as a function that computes one batch."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if precision == "f32":
        settings["EXECUTION_MODE_HINT"] = "ACCURACY"
    request = openvino_session.compile_model(model, settings).create_infer_request()
    request.set_input_tensor(0, openvino.Tensor(x.copy()))
    return lambda: request.infer(share_inputs=True, share_outputs=True)


def onnxruntime_run(path: Path, x: np.ndarray[Any, Any], threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    how = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["WeightBiasQuantization"]}
    session = onnxruntime.InferenceSession(str(path), options, **how)
    fed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, fed)


def openvino_files(job: "Job") -> dict[str, Opener]:
    """Our file, and the float model in both precisions."""
    import openvino

    converted = openvino.convert_model(job.model, example_input=job.batches[0])
    converted.reshape(openvino.PartialShape([-1, *job.batches[0].shape[1:]]))
    ours = openvino_session.read(job.file)
    job.converted = converted
    return {
        "halfeven": lambda x: openvino_run(ours, x.numpy(), job.threads),
        "float": lambda x: openvino_run(converted, x.numpy(), job.threads),
        "float, default precision": lambda x: openvino_run(converted, x.numpy(), job.threads, "default"),
    }


def nncf_file(job: "Job") -> Opener:
    """NNCF's post-training quantization of the float model."""
    import nncf

    dataset = nncf.Dataset([batch.numpy() for batch in job.batches])
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if job.name in TRANSFORMERS else {}
    quantized = nncf.quantize(job.converted, dataset, subset_size=len(job.batches), **kind)
    return lambda x: openvino_run(quantized, x.numpy(), job.threads)


def onnxruntime_files(job: "Job") -> dict[str, Opener]:
    """Our file, and the float model, whose BatchNorms the exporter folds."""
    floats = job.converted = job.file.with_name("float.onnx")
    free = ({0: torch.export.Dim("batch")},)
    # In one file: the runtime's quantizer finds no tensors beside it.
    how = {"dynamo": True, "dynamic_shapes": free, "verbose": False, "external_data": False}
    torch.onnx.export(job.model, (job.batches[0],), floats, **how)
    return {
        "halfeven": lambda x: onnxruntime_run(job.file, x.numpy(), job.threads),
        "float": lambda x: onnxruntime_run(floats, x.numpy(), job.threads),
    }


def static_file(job: "Job") -> Opener:
    """ONNX Runtime's own static quantization of the float model."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    floats = job.converted

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.left = iter([{name: batch.numpy()} for batch in job.batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    import onnx

    name = onnx.load(floats, load_external_data=False).graph.input[0].name
    prepared = floats.with_name("prepared.onnx")
    static = floats.with_name("static.onnx")
    quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(str(prepared), str(static), Reader(name), **types)
    return lambda x: onnxruntime_run(static, x.numpy(), job.threads)


@dataclass
class Job:
    """One network in one runtime."""

    name: str
    model: nn.Module
    file: Path
    """Ours."""
    batches: list[Tensor]
    """The calibration's."""
    threads: int
    converted: Any = None
    """The float model as the runtime has it."""


FILES = {"openvino": openvino_files, "onnxruntime": onnxruntime_files}
OTHERS = {"openvino": {"nncf": nncf_file}, "onnxruntime": {"onnxruntime static": static_file}}
"""Runtime -> other libraries' files by name."""


def opened(job: Job, target: str) -> tuple[dict[str, Opener], dict[str, str]]:
    """All files of a network, and the reasons why other libraries made none."""
    files = FILES[target](job)
    failed = {}
    for name, make in OTHERS[target].items():
        if name == "nncf" and importlib.util.find_spec("nncf") is None:
            continue
        try:
            files[name] = make(job)
        except Exception as error:  # other libraries raise what they like; our file is measured all the same
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    return files, failed


LEAST_SECONDS = 3.0
"""Time that the rounds of small networks fill, whose single runs say little."""
MOST_ROUNDS = 300


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each file in each round, of which small networks have more; two before do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for turn in range(2 + max(rounds, MOST_ROUNDS)):
        if turn >= 2 + rounds and time.perf_counter() - begun > LEAST_SECONDS:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def compared(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each file, and its ratio to float over the rounds with its quartiles."""
    found = {}
    for name, own in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(own, times["float"], strict=True)], n=4)
        found[name] = {
            "ms": round(statistics.median(own), 3),
            "rounds": len(own),
            "over float": round(middle, 3),
            "from": round(low, 3),
            "to": round(high, 3),
        }
    return found


def profile(times: Sequence[KernelTime]) -> dict[str, Any]:
    """Share of the time by kernel and precision, and the slowest kernels in float."""
    total = sum(one.milliseconds for one in times) or 1.0
    shares: dict[str, float] = defaultdict(float)
    for one in times:
        shares[" ".join(filter(None, (one.kind, one.kernel, one.precision)))] += one.milliseconds / total
    in_float = slowest([one for one in times if not one.integer], SLOWEST)
    return {
        "kernels": {kind: round(share, 3) for kind, share in sorted(shares.items(), key=lambda item: -item[1])[:8]},
        "float share": round(sum(one.milliseconds for one in times if not one.integer) / total, 3),
        "slowest in float": [f"{one.name} ({one.kind}): {one.milliseconds / total:.1%}" for one in in_float],
    }


def verified(qmodel: nn.Module, file: Path, batches: list[Tensor]) -> dict[str, Any]:
    """What `verify` says of a file's integers and kernels."""
    report = he.verify(qmodel, file, batches, timed=False)
    return {
        "integers equal": report.integer_match,
        "each layer alone": report.alone_match,
        "layers in integers": f"{report.integer_layers} of {report.quantizable_layers}",
        "in float": report.float_layers,
        "findings": report.findings,
    }


def measured(name: str, target: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch size."""
    torch.manual_seed(0)
    model = (NETWORKS | FURTHER)[name][0]().eval()
    batches = [samples(name, 2, small=options.small) for _ in range(4)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        gates = options.quantize_gates and target == "onnxruntime" and name in GATED
        about = {"network": name, "runtime": target, "gates": gates}
        prepared = he.prepare(model, batches[0], target=target, scheme=options.scheme, quantize_gates=gates)
        file = he.export(he.calibrate(prepared, batches), Path(folder) / f"model{ENDINGS[target]}")
        if options.verify:
            return [{**about, **verified(prepared, file, batches[:1])}]
        files, failed = opened(Job(name, model, file, batches, options.threads), target)
        about |= {"failed": failed} if failed else {}
        for size in options.batches:
            x = samples(name, size, small=options.small)
            times = timed({name: run(x) for name, run in files.items()}, options.rounds)
            kernels = runtime_named(target).open_file(file, ()).kernel_times([x])
            rows.append({**about, "batch": size, **compared(times), "profile": profile(kernels)})
    return rows


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "openvino", "onnxruntime")}
    return {
        "date": date.today().isoformat(),
        "processor": cpu,
        "capabilities": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "scheme": options.scheme,
        "small": options.small,
        "rounds": options.rounds,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", help=f"of {', '.join(NETWORKS)}, which run if none is given, and {', '.join(FURTHER)}"
    )
    parser.add_argument("--runtimes", nargs="+", choices=tuple(ENDINGS), default=list(ENDINGS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--quantize-gates", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.networks) - set(NETWORKS | FURTHER):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS | FURTHER)}")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.networks or NETWORKS:
        for target in options.runtimes:
            try:
                found = measured(name, target, options)
            except (
                Exception
            ) as error:  # of a converter or another library: the other networks are measured all the same
                found = [{"network": name, "runtime": target, "error": f"{type(error).__name__}: {error}"}]
            for row in found:
                print(json.dumps(row), flush=True)
            rows += found
            if options.json:
                options.json.write_text(json.dumps({"machine": machine(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
