"""ResNet-18 on ImageNet with learned scales (LSQ): ten epochs, otherwise as
`qat_openvino_resnet18_10e_8xb32_in1k.py`.

The recipe is MMRazor's config of the same name: BatchNorm frozen from the first step, a scale of its own for
every weight channel and every activation, LSQ's gradient scale 1 / sqrt(elements * quant_max).

It departs from it where that is known to cost accuracy:

- Scales start from calibration. MMRazor starts at 2 mean|x| / sqrt(quant_max) of one batch, at 8 bits about
  five times too coarse, and does so again at every resumption.
- Scales do not decay with the weights, and their gradients are averaged over the processes; in MMRazor they
  drift apart.
- The elements in the gradient scale are those of one channel, or of one sample, not of the whole batch.
- Unsigned activations have zero point 0.
"""

import dataclasses

from qat_openvino_resnet18_10e_8xb32_in1k import experiment as base

experiment = dataclasses.replace(
    base,
    quantization=dataclasses.replace(base.quantization, ranges="learned", activation_observer="mse"),
    schedule=dataclasses.replace(base.schedule, freeze_batchnorm_after=0.0),
)
