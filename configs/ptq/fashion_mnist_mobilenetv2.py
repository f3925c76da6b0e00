"""Fashion-MNIST, MobileNetV2: as `fashion_mnist_resnet18.py`, on a network of depthwise convolutions."""

from halfeven.config import DataOptions, Experiment, ModelOptions

experiment = Experiment(
    model=ModelOptions(source="timm", name="mobilenetv2_100", num_classes=10, in_chans=1),
    data=DataOptions(source="fashion_mnist", calibration_samples=512, workers=0, evaluation_batch_size=64),
)
