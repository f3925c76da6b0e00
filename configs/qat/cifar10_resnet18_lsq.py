"""ResNet-18 on CIFAR-10 with learned scales (LSQ): the recipe of `lsq_openvino_resnet18_8xb32_10e_in1k.py`.

    halfeven train configs/qat/cifar10_resnet18_lsq.py --data.root CIFAR10 --model.weights FLOAT.safetensors

Data, model and rate are those of `cifar10_resnet18.py`.
"""

import dataclasses

from cifar10_resnet18 import experiment as base
from lsq_openvino_resnet18_8xb32_10e_in1k import experiment as lsq

experiment = dataclasses.replace(base, quantization=lsq.quantization, schedule=lsq.schedule)
