"""ResNet-18 on ImageNet, 8 bits for OpenVINO, without training: 32 batches of 32 calibration images.

    halfeven ptq configs/ptq/ptq_openvino_resnet18_8xb32_in1k_calib32xb32.py --data.root IMAGENET

IMAGENET is a folder with train/CLASS/IMAGE and val/CLASS/IMAGE. The float weights come from timm;
`--model.weights FILE` takes a .safetensors or .pth file in timm's, torchvision's or OpenMMLab's names instead, such as
mmpretrain's resnet18_8xb32_in1k.

The model, the evaluation (short side 256, centre crop 224) and the number of calibration images are those of MMRazor's
config of the same name. The rest is halfeven's pipeline with its defaults:

- The 1,024 calibration images are drawn from the training images with a seed and seen as in evaluation. MMRazor
  calibrates on the first 1,024 validation images, on which it then measures.
- After a ReLU the zero point is 0 on an unsigned grid, all of whose 256 integers are used.
- Activation ranges have the least squared error over all calibration images; MMRazor's follow the batches by a tenth.
- Which further steps run (equalization, bias correction, learned rounding) is chosen from model and bits, and printed.
- Images are decoded and scaled by Pillow and torchvision, not by OpenCV.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions

experiment = Experiment(
    model=ModelOptions(source="timm", name="resnet18.tv_in1k", weights="pretrained"),
    data=DataOptions(
        source="image_folder",
        root="data/imagenet",
        calibration_samples=32 * 32,
        evaluation_batch_size=32,
        workers=5,
    ),
    quantization=QuantizationOptions(target="openvino", scheme="w8a8"),
)
