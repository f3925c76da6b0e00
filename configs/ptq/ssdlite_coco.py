"""SSDlite with MobileNetV3 on COCO, 8 bits for OpenVINO, without training.

    pip install 'halfeven[detection]'
    halfeven ptq configs/ptq/ssdlite_coco.py --data.root COCO

COCO is a folder with train2017, val2017 and annotations. Network and float weights (21.3 mAP, says torchvision) are
torchvision's; backbone and heads are quantized, and its own anchors and post-processing follow. Images are stretched to
320 x 320 and their colours brought to -1..1, as it was trained.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TaskOptions

experiment = Experiment(
    task=TaskOptions(kind="detection"),
    model=ModelOptions(
        source="torchvision", name="ssdlite320_mobilenet_v3_large", weights="pretrained", num_classes=91
    ),
    data=DataOptions(
        source="coco_detection",
        root="data/coco",
        image_size=320,
        keep_aspect=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        calibration_samples=512,
        evaluation_batch_size=32,
        workers=4,
    ),
    quantization=QuantizationOptions(target="openvino", scheme="w8a8"),
)
