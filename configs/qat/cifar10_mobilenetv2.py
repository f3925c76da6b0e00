"""MobileNetV2 on CIFAR-10, 8 bits for OpenVINO: ten epochs of QAT as in `cifar10_resnet18.py`.

halfeven train configs/qat/cifar10_mobilenetv2.py --data.root CIFAR10 --model.weights FLOAT.safetensors
"""

import dataclasses

from cifar10_resnet18 import experiment as base

experiment = dataclasses.replace(base, model=dataclasses.replace(base.model, name="mobilenetv2_100"))
