"""torchvision's RetinaNet, small, on made-up scenes of 64 x 64 pixels, 8 bits, without a download.

    pip install 'halfeven[train,detection]'
    halfeven ptq configs/shapes/retinanet.py
    halfeven train configs/shapes/retinanet.py

Anchors on two levels, a head with BatchNorm, focal loss.

Trains the float model and quantizes it; "train" then trains it quantized.
"""

from halfeven.config import DataOptions, DeviceOptions, Experiment, ModelOptions, TaskOptions, TrainingOptions

experiment = Experiment(
    task=TaskOptions(kind="detection"),
    model=ModelOptions(source="callable", name="halfeven.zoo.small_detectors:retinanet", arguments={"num_classes": 5}),
    data=DataOptions(source="shapes", image_size=64, calibration_samples=256, evaluation_batch_size=40, workers=0),
    pretraining=TrainingOptions(
        epochs=20,
        batch_size=16,
        optimizer="adamw",
        learning_rate=0.003,
        weight_decay=0.02,
        clip_norm=10.0,
        schedule="onecycle",
    ),
    training=TrainingOptions(
        epochs=2, batch_size=16, optimizer="adamw", learning_rate=5e-5, weight_decay=0.02, clip_norm=10.0
    ),
    # One thread: the network is so small that more gain nothing, and on a busy machine they wait for each other.
    device=DeviceOptions(kind="cpu", threads=1),
)
