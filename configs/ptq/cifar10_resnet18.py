"""ResNet-18 on CIFAR-10, 8 bits for OpenVINO, without training: as `ptq_openvino_resnet18_8xb32_in1k_calib32xb32.py`.

    halfeven ptq configs/ptq/cifar10_resnet18.py --data.root CIFAR10 --model.weights FLOAT.safetensors

CIFAR10 is a folder of images, train/CLASS/IMAGE and val/CLASS/IMAGE, of 32x32 pixels. Only these settings differ from
the ImageNet recipe: folder, classes and weights; images of 32 pixels, scaled to 37 before the centre crop.
"""

import dataclasses

from ptq_openvino_resnet18_8xb32_in1k_calib32xb32 import experiment as base

experiment = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, name="resnet18", weights="", num_classes=10),
    data=dataclasses.replace(base.data, root="data/cifar10", image_size=32, resize=37, workers=2),
)
