"""DeepLabV3 with MobileNetV3 on Pascal VOC, 8 bits for OpenVINO, without training.

    halfeven ptq configs/ptq/deeplabv3_voc.py --data.root VOC

VOC is the folder that holds VOCdevkit/VOC2012. The float weights are torchvision's, trained on the images of COCO that
show Pascal VOC's classes. Images are scaled to fit into 513 x 513. The white paper's row of this kind is DeepLabV3 with
MobileNetV2: 72.94 % mIoU in float, 72.44 % with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TaskOptions

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
)
