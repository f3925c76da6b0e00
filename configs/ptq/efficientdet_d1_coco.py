"""EfficientDet-D1 on COCO, 8 bits for OpenVINO, without training.

    pip install 'halfeven[detection]'
    halfeven ptq configs/ptq/efficientdet_d1_coco.py --data.root COCO

COCO is a folder with train2017, val2017 and annotations. Network and float weights are those of the package effdet;
backbone, feature pyramid and heads are quantized, and its own anchors and post-processing follow. The white paper
reports 40.08 mAP in float, 38.29 with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TaskOptions

experiment = Experiment(
    task=TaskOptions(kind="detection"),
    model=ModelOptions(source="effdet", name="tf_efficientdet_d1", weights="pretrained", num_classes=91),
    data=DataOptions(
        source="coco_detection",
        root="data/coco",
        image_size=640,
        calibration_samples=256,
        evaluation_batch_size=8,
        workers=4,
    ),
    quantization=QuantizationOptions(target="openvino", scheme="w8a8"),
)
