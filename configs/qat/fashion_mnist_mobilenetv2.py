"""Fashion-MNIST, MobileNetV2: the recipe of `fashion_mnist_resnet18.py` on a network of depthwise convolutions."""

import dataclasses

from fashion_mnist_resnet18 import experiment as base

experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, name="mobilenetv2_100"))
