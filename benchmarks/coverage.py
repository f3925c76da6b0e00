"""Coverage of models: from capture over a training step to the verified files.

    python benchmarks/coverage.py [--suite others|brought] [--models MODEL ...] [--targets openvino onnxruntime]
        [--scheme w7a7] [--json FILE]

"timm" is the smallest model of each of its families; "others" are models of torchvision and, where it is installed,
transformers (`coverage_models.py`); "brought" are small models with the habits of those that people bring: several
inputs and outputs, tied weights, recurrence, heads that return something else in training (`brought_models.py`).
Weights are random, inputs are noise of the model's own size, two samples, from
which BatchNorm's statistics are set. "eval" and "train" say whether the captured model's outputs equal the original's
bit for bit in that mode. A model is walked in a process of its own, so that a crash or a hang of one (there is a time
limit) costs one row. Failures come with their reasons. Without VNNI 8-bit products overflow; of 7 bits they do not.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from brought_models import BROUGHT
from coverage_models import FAMILIES, OTHERS, create
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import halfeven as he
from halfeven.graph.capture import capture

SECONDS = 900
"""Limit for one model."""

SUITES = {"timm": list(FAMILIES), "others": list(OTHERS), "brought": list(BROUGHT)}
"""Names of the models of each suite."""


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def same(model: nn.Module, captured: nn.Module, x: Any, *, training: bool) -> bool:
    """Whether both models give the same, bit for bit, in one mode and from one seed."""
    outputs = []
    for one in (model, captured):
        one = copy.deepcopy(one).train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(pytree.tree_leaves(call(one, x)))
    first, second = ([leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in outputs)
    return len(first) == len(second) and all(map(torch.equal, first, second))


def call(model: nn.Module, x: Any) -> Any:
    """A model's result on its example."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def step(qmodel: nn.Module, x: Any) -> str:
    """One training step with the sum of squares as the loss; what is wrong with its gradients, or ""."""
    qmodel = copy.deepcopy(qmodel).train()
    first(call(qmodel, x)).square().mean().backward()
    gradients = [p.grad for p in qmodel.parameters() if p.grad is not None]
    if not gradients:
        return "no gradient"
    return "" if all(bool(torch.isfinite(g).all()) for g in gradients) else "a gradient that is not finite"


def walk(name: str, targets: list[str], scheme: str) -> dict[str, Any]:
    """The row of one model."""
    row: dict[str, Any] = {"model": name}

    def attempt(what: str, act: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return act()
        except Exception as error:  # whatever it is, it is this row's finding
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row.setdefault("failures", {})[what] = f"{type(error).__name__}: {lines[0][:300]}"
            return None
        finally:
            row[f"{what}, s"] = round(time.perf_counter() - started, 1)

    torch.manual_seed(0)
    model, x = BROUGHT[name]() if name in BROUGHT else create(name)
    model.eval()
    _give_statistics(model, x)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    found = attempt("capture", lambda: capture(copy.deepcopy(model), x))
    if found is None:
        return row
    captured, report = found
    row["whole"] = report.regions == [""]
    row["left in Python"] = [str(left)[:300] for left in report.left]
    row["eval"] = attempt("eval", lambda: same(model, captured, x, training=False))
    row["train"] = attempt("train", lambda: same(model, captured, x, training=True))
    for target in targets:
        row[target] = attempt(target, lambda target=target: deploy(model, x, target, scheme, row))
    return row


def _give_statistics(model: nn.Module, x: Any) -> None:
    """Set BatchNorms' statistics from the example: as initialized, they let activations vanish down to 1e-9, where no
    runtime keeps a scale."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def deploy(model: nn.Module, x: Any, target: str, scheme: str, row: dict[str, Any]) -> dict[str, Any]:
    """Quantize for a target, take a step, export and verify."""
    qmodel = he.calibrate(he.prepare(model, x, scheme=scheme, target=target), [x])
    if problem := step(qmodel, x):
        row.setdefault("failures", {})[f"step, {target}"] = problem
    row["step"] = not problem
    with tempfile.TemporaryDirectory() as folder:
        path = he.export(qmodel.eval(), Path(folder) / ("model.xml" if target == "openvino" else "model.onnx"))
        found = he.verify(qmodel, path, [x], timed=False).to_dict()
    found.pop("tensors")
    return found


def in_own_process(name: str, targets: list[str], scheme: str) -> dict[str, Any]:
    """The row of one model, walked by a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--scheme", scheme, "--targets", *targets]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"model": name, "failures": {"time": f"longer than {SECONDS} s"}}
    try:
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"model": name, "failures": {"process": said[0][:300]}}
    return row


def line(row: dict[str, Any], targets: list[str]) -> str:
    """A row of the table."""
    cells = ["whole" if row.get("whole") else "parts" if "whole" in row else "-"]
    cells += ["yes" if row.get(key) else "no" for key in ("eval", "train", "step")]
    for target in targets:
        found = row.get(target)
        cells += _cells(found) if found else ["-"] * 4
    reasons = "; ".join(f"{what}: {why}" for what, why in row.get("failures", {}).items())
    return f"{row['model']:38} " + " ".join(f"{cell:>9}" for cell in cells) + (f"  {reasons}" if reasons else "")


def _cells(found: dict[str, Any]) -> list[str]:
    """Layers, share of the work in integers, and shares of equal integers, which a file without integers lacks."""
    shares = [found["integer_match"], found["alone_match"]]
    equal = ["-" if share is None else f"{100 * share:.4f}" for share in shares]
    return [f"{found['integer_layers']}/{found['quantizable_layers']}", f"{100 * found['integer_macs']:.1f}", *equal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=tuple(SUITES), default="timm")
    parser.add_argument("--models", nargs="+", help="names; not given: all of the suite")
    parser.add_argument("--targets", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(walk(options.one, options.targets, options.scheme)))
        return

    heads = [
        "captured",
        "eval",
        "train",
        "step",
        *(h for _ in options.targets for h in ("layers", "% MACs", "% equal", "% alone")),
    ]
    print(f"{'':38} " + " ".join(f"{head:>9}" for head in heads) + f"  ({', '.join(options.targets)})")
    rows = []
    for name in options.models or SUITES[options.suite]:
        rows.append(in_own_process(name, options.targets, options.scheme))
        print(line(rows[-1], options.targets), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    for what in ("eval", "train", "step", *options.targets):
        print(f"{what}: {sum(bool(row.get(what)) for row in rows)} of {len(rows)}")
    for target in options.targets:
        shares = [100 * row[target]["integer_macs"] for row in rows if row.get(target)]
        if shares:
            print(f"multiply-accumulates in integers, {target}: median {statistics.median(shares):.1f} %")


if __name__ == "__main__":
    main()
