"""ResNet-18 on ImageNet with learned scales (LSQ): a hundred epochs under a cosine.

The recipe is MMRazor's config of the same name: as `lsq_openvino_resnet18_8xb32_10e_in1k.py`, with a learning
rate that falls to 0 by a cosine that moves between epochs.
"""

import dataclasses

from lsq_openvino_resnet18_8xb32_10e_in1k import experiment as base

experiment = dataclasses.replace(
    base, training=dataclasses.replace(base.training, epochs=100, schedule="cosine", schedule_by="epoch")
)
