"""Fashion-MNIST, ResNet-18: a given float checkpoint, quantized to 8 bits from 512 training images.

    halfeven ptq configs/ptq/fashion_mnist_resnet18.py --model.weights FILE [--quantization.scheme w4a4]

The images are those of Debian's package dataset-fashion-mnist, padded to 32x32. Without float weights,
`--pretraining.epochs 2` trains the float model first. All steps are left to the pipeline, which prints its choices.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions

experiment = Experiment(
    model=ModelOptions(source="timm", name="resnet18", num_classes=10, in_chans=1),
    data=DataOptions(source="fashion_mnist", calibration_samples=512, workers=0, evaluation_batch_size=64),
)
