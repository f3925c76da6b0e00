"""Fashion-MNIST, MobileNetV2, all layers with 4 bits: 2,000 steps with all that the recipe for 4 bits chooses.

Learned ranges (LSQ) from calibration, BatchNorm live to the end and re-estimated, and the better of the last weights
and their average is kept.
"""

import dataclasses

from fashion_mnist_mobilenetv2 import experiment as base

experiment = dataclasses.replace(
    base,
    quantization=dataclasses.replace(base.quantization, scheme="w4a4", ranges="learned"),
    training=dataclasses.replace(base.training, epochs=3, max_steps=2000),
)
