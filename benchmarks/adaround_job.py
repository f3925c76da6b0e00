"""One AdaRound job, in halfeven or in aimet-torch: `adaround_speed.py` runs it in an interpreter that has the library.

    python benchmarks/adaround_job.py LIBRARY JOB.json

JOB.json names the float weights of timm's resnet18 (in_chans=1, num_classes=10), a safetensors file with the tensors
`calibration` and `test` (images), and the numbers of iterations, bits and threads. The last line printed is JSON: the
seconds from the float model with BatchNorm folded to the one with rounded weights, and how near its logits are to the
float ones on the test images (activations stay in float in both libraries).
"""

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

BATCH = 32
"""Images in a step: aimet-torch has it as a constant."""


def in_aimet(model: nn.Module, images: Tensor, iterations: int, bits: int) -> tuple[nn.Module, float]:
    """The model with rounded weights (per channel by default), and the seconds that AdaRound took."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    fold_all_batch_norms(model, input_shapes=(1, *images.shape[1:]))
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH)
    parameters = AdaroundParameters(loader, num_batches=len(loader), default_num_iterations=iterations)
    with tempfile.TemporaryDirectory() as folder:  # for a file of scales that nothing reads
        start = time.perf_counter()
        rounded = Adaround.apply_adaround(
            model,
            images[:1],
            parameters,
            path=folder,
            filename_prefix="job",
            default_param_bw=bits,
        )
        return rounded, time.perf_counter() - start


def in_halfeven(model: nn.Module, images: Tensor, iterations: int, bits: int) -> tuple[nn.Module, float]:
    """The model with rounded weights, and the seconds that capturing, ranges and AdaRound took."""
    import halfeven as he
    from halfeven.ptq.options import PTQOptions
    from halfeven.ptq.reconstruction.reconstruct import adaround
    from halfeven.quantization.model_quantizers import quantizers
    from halfeven.quantization.quantizer import Mode

    options = PTQOptions(iterations=iterations, batch_size=BATCH)
    start = time.perf_counter()
    qmodel = he.prepare(model, images[:2], scheme=f"w{bits}a8", batchnorm="fold", weight_observer="mse")
    batches = list(images.split(BATCH))
    he.calibrate(qmodel, batches, 1)
    for name, quantizer in quantizers(qmodel).items():
        if name.startswith("quantizers."):  # activations stay in float
            quantizer.mode = Mode.FLOAT
    adaround(qmodel, batches, options=options)
    return qmodel, time.perf_counter() - start


LIBRARIES: dict[str, Callable[[nn.Module, Tensor, int, int], tuple[nn.Module, float]]] = {
    "aimet": in_aimet,
    "halfeven": in_halfeven,
}


@torch.no_grad()
def nearness(model: nn.Module, rounded: nn.Module, images: Tensor) -> dict[str, float]:
    """SQNR of the logits in dB, and the share of images with the same top-1, in percent."""
    expected = torch.cat([model(x) for x in images.split(250)])
    found = torch.cat([rounded.eval()(x) for x in images.split(250)])
    ratio = expected.square().sum() / (found - expected).square().sum()
    same = (found.argmax(1) == expected.argmax(1)).float().mean()
    return {"sqnr_db": round(float(10 * torch.log10(ratio)), 2), "same_top1": round(100 * float(same), 2)}


def main() -> None:
    library, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = timm.create_model("resnet18", in_chans=1, num_classes=10)
    model.load_state_dict(load_file(job["weights"]))
    model.eval()
    images = load_file(job["images"])
    rounded, seconds = LIBRARIES[library](copy.deepcopy(model), images["calibration"], job["iterations"], job["bits"])
    result: dict[str, Any] = {"seconds": round(seconds, 2), **nearness(model, rounded, images["test"])}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
