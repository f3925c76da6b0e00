"""The whole way in a few minutes on two cores, without a download.

Trains a float ResNet-18 on scikit-learn's 1,437 training digits, quantizes it to 8 bits, trains that (QAT),
exports it to OpenVINO and verifies that the runtime computes the integers that were trained.
"""

from halfeven.config import DataOptions, DeviceOptions, Experiment, ModelOptions, TrainingOptions

experiment = Experiment(
    model=ModelOptions(source="timm", name="resnet18", num_classes=10, in_chans=1),
    data=DataOptions(source="digits", calibration_samples=256, workers=0),
    pretraining=TrainingOptions(epochs=5, batch_size=64, learning_rate=0.02, weight_decay=5e-4, warmup_steps=10),
    training=TrainingOptions(epochs=2, batch_size=64, learning_rate=2e-3, weight_decay=5e-4),
    # One thread: the network is so small that more gain nothing, and on a busy machine they wait for each other.
    device=DeviceOptions(kind="cpu", threads=1),
)
