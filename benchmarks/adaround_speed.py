"""Time of AdaRound on resnet18, against aimet-torch on the same job, in interleaved runs on one machine.

    python3 -m venv AIMET && AIMET/bin/pip install aimet-torch timm safetensors
    python benchmarks/adaround_speed.py WEIGHTS.safetensors --peer-python AIMET/bin/python [--iterations 500]

The model is timm's resnet18 with in_chans=1 and num_classes=10; its weights come by a path. Both libraries round the
same weights to 4 bits per channel, on the same Fashion-MNIST training images, with as many steps a layer, 32 images a
step, and the same number of threads; each run is a process of its own. What they do not share are their defaults: the
learning rate (aimet-torch 0.001, halfeven 0.01) and the search of the weights' ranges. How near the logits of 512 test
images come to the float ones is printed beside the time. The ratio means something, the seconds little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

JOB = Path(__file__).with_name("adaround_job.py")
TEST_IMAGES = 512


def write_images(path: Path, count: int, root: str) -> None:
    """Calibration images (a seeded part of the training images) and test images, for both interpreters."""
    data = load_datasets(DataOptions(source="fashion_mnist", root=root, calibration_samples=count))
    parts = {"calibration": (data.calibration, count), "test": (data.validation, TEST_IMAGES)}
    save_file({name: torch.stack([images[i][0] for i in range(n)]) for name, (images, n) in parts.items()}, path)


def run(python: str, library: str, job: Path, threads: int) -> dict[str, Any]:
    """One job in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [python, str(JOB), library, str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"The job failed in {library}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the float model's .safetensors")
    parser.add_argument("--peer-python", default="", help="interpreter that has aimet-torch; not given: halfeven alone")
    parser.add_argument("--root", default="", help="folder of the IDX files; not given: Debian's")
    parser.add_argument("--iterations", type=int, default=500, help="steps a layer")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    interpreters = {"halfeven": sys.executable} | ({"aimet": options.peer_python} if options.peer_python else {})
    results: dict[str, list[dict[str, Any]]] = {library: [] for library in interpreters}
    with tempfile.TemporaryDirectory() as folder:
        images, job = Path(folder) / "images.safetensors", Path(folder) / "job.json"
        write_images(images, options.images, options.root)
        numbers = {name: getattr(options, name) for name in ("iterations", "bits", "threads")}
        job.write_text(json.dumps({"weights": str(options.weights.resolve()), "images": str(images), **numbers}))
        for _ in range(options.repeats):
            for library, python in interpreters.items():
                results[library].append(run(python, library, job, options.threads))
                print(f"{library:9} {results[library][-1]}", flush=True)
    report: dict[str, Any] = {**numbers, "images": options.images, **results}
    if options.peer_python:
        pairs = zip(results["aimet"], results["halfeven"], strict=True)
        report["ratio"] = statistics.median(peer["seconds"] / ours["seconds"] for peer, ours in pairs)
        print(f"aimet-torch takes {report['ratio']:.2f} times as long")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
