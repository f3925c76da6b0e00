"""EfficientDet-D1 on COCO, 8 bits for OpenVINO, 20 epochs of QAT with Adam as in the white paper.

    pip install 'halfeven[detection]'
    halfeven train configs/qat/efficientdet_d1_coco.py --data.root COCO

COCO is a folder with train2017, val2017 and annotations. Network, loss and float weights are those of the package
effdet. The white paper reports 40.08 mAP in float, 38.94 with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TaskOptions, TrainingOptions

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
    training=TrainingOptions(
        epochs=20, batch_size=8, optimizer="adamw", learning_rate=1e-5, clip_norm=10.0, base_batch_size=8
    ),
)
