"""The whole way in a minute or two on two cores, without a download.

Trains a small float ResNet on scikit-learn's 1,437 training digits, quantizes it to 4 bits, which costs accuracy, and
trains that (QAT), which brings the accuracy back. Exports it to OpenVINO, and verifies that the runtime computes the
integers that were trained. OpenVINO stores integers of 4 bits as bytes, so that this file is no faster there than one
of 8 bits: `--quantization.scheme w8a8` (`w7a8` on processors without VNNI) is for deployment.
"""

from halfeven.config import (
    DataOptions,
    DeviceOptions,
    Experiment,
    ModelOptions,
    QuantizationOptions,
    TrainingOptions,
)

experiment = Experiment(
    model=ModelOptions(source="timm", name="test_resnet", num_classes=10, in_chans=1),
    data=DataOptions(source="digits", calibration_samples=256, workers=0),
    quantization=QuantizationOptions(scheme="w4a4"),
    pretraining=TrainingOptions(epochs=6, batch_size=64, learning_rate=0.03, weight_decay=5e-4, warmup_steps=10),
    training=TrainingOptions(epochs=4, batch_size=64, learning_rate=0.01, weight_decay=5e-4),
    # One thread: the network is so small that more gain nothing, and on a busy machine they wait for each other.
    device=DeviceOptions(kind="cpu", threads=1),
)
