"""Other libraries' quantization-aware training of the models that ours is compared with.

`qat.py` runs this file, and `step_ratio.py` imports it, under the Python of an environment that has such a library,
timm and safetensors, and need not have halfeven:

    NNCF_ENV/bin/python benchmarks/peers.py JOB.pt

JOB.pt is what `qat.py` writes: the model's name, weights, the bits, and images. The last line printed is JSON: top-1 in
percent before and after the training.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fashion_mnist import float_model, top1
from torch import Tensor, nn
from torch.nn import functional as F


def by_nncf(model: nn.Module, calibration: Sequence[Tensor], bits: tuple[int, int]) -> nn.Module:
    """NNCF's `quantize` with its defaults.

    Raises:
        ValueError: other bits than 8: its descriptions of devices allow no fewer for every layer.
    """
    if bits != (8, 8):
        raise ValueError(f"NNCF has no form for weights of {bits[0]} and activations of {bits[1]} bits everywhere.")
    nncf = importlib.import_module("nncf")
    quantized: nn.Module = nncf.quantize(model.eval(), nncf.Dataset(calibration), subset_size=len(calibration))
    return quantized


def by_torchao(model: nn.Module, calibration: Sequence[Tensor], bits: tuple[int, int]) -> nn.Module:
    """torchao's PT2E with the configuration for x86, weights per channel; it starts from the first batches' ranges."""
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    if bits != (8, 8):
        config = dataclasses.replace(
            config,
            weight=_of_bits(config.weight, bits[0], signed=True),
            input_activation=_of_bits(config.input_activation, bits[1], signed=False),
            output_activation=_of_bits(config.output_activation, bits[1], signed=False),
        )
    free = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model.train(), (calibration[0],), dynamic_shapes=free)
    prepared: nn.Module = steps.prepare_qat_pt2e(exported.module(), x86.X86InductorQuantizer().set_global(config))
    # An exported model has no train() and eval() of its own.
    prepared.train = lambda mode=True: pt2e.move_exported_model_to_train(prepared)  # type: ignore[method-assign]
    prepared.eval = lambda: pt2e.move_exported_model_to_eval(prepared)  # type: ignore[method-assign]
    prepared.eval()
    with torch.no_grad():
        for images in calibration:
            prepared(images)
    return prepared


def _of_bits(spec: Any, bits: int, *, signed: bool) -> Any:
    """A specification with another grid."""
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return spec and dataclasses.replace(spec, quant_min=low, quant_max=high)


PEERS: dict[str, Callable[[nn.Module, Sequence[Tensor], tuple[int, int]], nn.Module]] = {
    "nncf": by_nncf,
    "torchao": by_torchao,
}


def descend(model: nn.Module, job: dict[str, Any]) -> None:
    """The training of `qat.py`, without what accompanies it there."""
    optimizer = torch.optim.SGD(model.parameters(), lr=job["rate"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(job["order"]))
    model.train()
    for index in job["order"]:
        optimizer.zero_grad()
        F.cross_entropy(model(job["images"][index]), job["labels"][index]).backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    job = torch.load(sys.argv[1])
    model = float_model(job["model"], job["weights"])
    qmodel = PEERS[job["peer"]](model, job["calibration"], tuple(job["bits"]))
    result = {"start": top1(qmodel, *job["test"])}
    descend(qmodel, job)
    print(json.dumps(result | {"end": top1(qmodel, *job["test"])}))


if __name__ == "__main__":
    main()
