"""ResNet-18 on ImageNet, 8 bits for OpenVINO: ten epochs of QAT at a constant rate, on 8 processes of 32 images.

    torchrun --nproc_per_node 8 tools/train.py configs/qat/qat_openvino_resnet18_10e_8xb32_in1k.py --data.root IMAGENET

IMAGENET is a folder with train/CLASS/IMAGE and val/CLASS/IMAGE. On fewer processes add `--auto-scale-lr`: the
rate is meant for 256 images a step. The float weights come from timm; `--model.weights FILE` takes a
.safetensors or .pth file in timm's, torchvision's or OpenMMLab's names instead, such as mmpretrain's
resnet18_8xb32_in1k.

The recipe is MMRazor's config of the same name: the data pipeline (random resized crop and flip; short side 256
and centre crop 224), SGD at 1e-4 with momentum 0.9 and weight decay 1e-4 on weights, biases and BatchNorm, no
warm-up, no clipping; weights symmetric per channel, ranges that follow every batch by a hundredth, BatchNorm
live, both to the end of the run.

It departs from it where that is known to cost accuracy or to fail:

- After a ReLU the zero point is 0 on an unsigned grid, all of whose 256 integers are used; MMRazor puts it at
  127, which leaves 128.
- The weight's range is that of the present weight, not the widest of the whole run, so the exported scale is
  the trained one.
- Ranges are calibrated on training images before the first step; MMRazor starts from the first batch of each
  process.
- BatchNorm is never divided out: a gamma of zero trains (in MMRazor it gives NaN).
- Where quantizers go is what OpenVINO computes in integers (see the plan that is printed), the last feature map
  included.
- Images are decoded and scaled by Pillow and torchvision, not by OpenCV.
- The float model is evaluated once, as `float`; the trained one after each epoch, as `int8`.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, ScheduleOptions, TrainingOptions

experiment = Experiment(
    # torchvision's weights (69.76 %), trained as those that MMRazor starts from (69.90 %).
    model=ModelOptions(source="timm", name="resnet18.tv_in1k", weights="pretrained"),
    data=DataOptions(source="image_folder", root="data/imagenet", workers=5, evaluation_batch_size=32),
    quantization=QuantizationOptions(
        target="openvino",
        scheme="w8a8",
        ranges="observed",
        weight_observer="minmax",
        activation_observer="moving_average",
    ),
    training=TrainingOptions(
        epochs=10,
        batch_size=32,
        drop_last=False,
        optimizer="sgd",
        learning_rate=1e-4,
        momentum=0.9,
        weight_decay=1e-4,
        decay_norms_and_biases=True,
        schedule="constant",
        base_batch_size=256,
        save_every=1000,
        log_every=100,
    ),
    schedule=ScheduleOptions(freeze_batchnorm_after=1.0, stop_observing_after=1.0),
)
