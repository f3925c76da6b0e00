"""Fashion-MNIST, ResNet-18: a given float checkpoint, 8 bits, 100 steps of QAT.

The images are those of Debian's package dataset-fashion-mnist, padded to 32x32. Give the float weights:
`--model.weights FILE`. Without one, `--pretraining.epochs 2` trains the float model first.

SGD at 0.01, falling to 0 by a cosine; batches of 64.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, TrainingOptions

experiment = Experiment(
    model=ModelOptions(source="timm", name="resnet18", num_classes=10, in_chans=1),
    data=DataOptions(source="fashion_mnist", calibration_samples=512, workers=0, evaluation_batch_size=250),
    training=TrainingOptions(epochs=1, max_steps=100, batch_size=64, learning_rate=0.01),
)
