"""ResNet-18 on CIFAR-10, 8 bits for OpenVINO: the recipe of `qat_openvino_resnet18_10e_8xb32_in1k.py`, ten epochs.

    halfeven train configs/qat/cifar10_resnet18.py --data.root CIFAR10 --model.weights FLOAT.safetensors

CIFAR10 is a folder of images of 32x32 pixels, train/CLASS/IMAGE and val/CLASS/IMAGE. Give weights of a float model,
or train it first: `--pretraining.epochs 30 --pretraining.batch-size 64 --pretraining.learning-rate 0.05`.

Only these settings differ from the ImageNet recipe: folder, classes and weights; images of 32 pixels, scaled to 37
before the centre crop (256 for 224); batches of 64 on one process, with the rate scaled from 256 images to 64.
"""

import dataclasses

from qat_openvino_resnet18_10e_8xb32_in1k import experiment as base

experiment = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, name="resnet18", weights="", num_classes=10),
    data=dataclasses.replace(base.data, root="data/cifar10", image_size=32, resize=37, workers=2),
    training=dataclasses.replace(base.training, batch_size=64, learning_rate=base.training.learning_rate * 64 / 256),
)
