"""DeepLabV3 with MobileNetV3 on Pascal VOC, 8 bits for OpenVINO, 80 epochs of QAT with Adam as in the white paper.

    halfeven train configs/qat/deeplabv3_voc.py --data.root VOC

VOC is the folder that holds VOCdevkit/VOC2012; the training images are its 1,464. The white paper's row of this kind is
DeepLabV3 with MobileNetV2: 72.94 % mIoU in float, 73.99 % with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TaskOptions, TrainingOptions

experiment = Experiment(
    task=TaskOptions(kind="segmentation"),
    model=ModelOptions(source="torchvision", name="deeplabv3_mobilenet_v3_large", weights="pretrained", num_classes=21),
    data=DataOptions(
        source="voc_segmentation",
        root="data/voc",
        image_size=513,
        calibration_samples=256,
        evaluation_batch_size=16,
        workers=4,
    ),
    quantization=QuantizationOptions(target="openvino", scheme="w8a8"),
    training=TrainingOptions(
        epochs=80, batch_size=16, optimizer="adamw", learning_rate=1e-5, weight_decay=1e-4, base_batch_size=16
    ),
)
