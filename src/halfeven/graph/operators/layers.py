"""List the layers: convolutions, linear layers, products, normalization and dropout."""

import torch
from torch import nn

from halfeven.graph.operators.row import Operator, OperatorKind, keeps_features
from halfeven.graph.torch_private import AnyDropout
from halfeven.graph.training_tap import TrainingTap

aten = torch.ops.aten
K = OperatorKind

MODULES = (
    Operator(target=nn.Conv1d, kind=K.CONVOLUTION),
    Operator(target=nn.Conv2d, kind=K.CONVOLUTION),
    Operator(target=nn.Conv3d, kind=K.CONVOLUTION),
    Operator(target=nn.ConvTranspose1d, kind=K.TRANSPOSED_CONVOLUTION),
    Operator(target=nn.ConvTranspose2d, kind=K.TRANSPOSED_CONVOLUTION),
    Operator(target=nn.ConvTranspose3d, kind=K.TRANSPOSED_CONVOLUTION),
    Operator(target=nn.Linear, kind=K.LINEAR),
    Operator(target=nn.BatchNorm1d, kind=K.BATCH_NORM),
    Operator(target=nn.BatchNorm2d, kind=K.BATCH_NORM),
    Operator(target=nn.BatchNorm3d, kind=K.BATCH_NORM),
    Operator(target=nn.SyncBatchNorm, kind=K.BATCH_NORM),
    Operator(target=nn.InstanceNorm1d, kind=K.NORMALIZATION),
    Operator(target=nn.InstanceNorm2d, kind=K.NORMALIZATION),
    Operator(target=nn.InstanceNorm3d, kind=K.NORMALIZATION),
    Operator(target=nn.LayerNorm, kind=K.NORMALIZATION),
    Operator(target=nn.GroupNorm, kind=K.NORMALIZATION),
    Operator(target=AnyDropout, kind=K.IDENTITY),
    Operator(target=nn.Identity, kind=K.IDENTITY, passes_features=keeps_features),
    Operator(target=TrainingTap, kind=K.OUTPUT),
)

FUNCTIONS = (
    Operator(target=aten.conv1d.default, kind=K.CONVOLUTION, module=nn.Conv1d),
    Operator(target=aten.conv2d.default, kind=K.CONVOLUTION, module=nn.Conv2d),
    Operator(target=aten.conv3d.default, kind=K.CONVOLUTION, module=nn.Conv3d),
    Operator(target=aten.conv1d.padding, kind=K.CONVOLUTION, module=nn.Conv1d),
    Operator(target=aten.conv2d.padding, kind=K.CONVOLUTION, module=nn.Conv2d),
    Operator(target=aten.conv3d.padding, kind=K.CONVOLUTION, module=nn.Conv3d),
    Operator(target=aten.conv_transpose1d.default, kind=K.TRANSPOSED_CONVOLUTION, module=nn.ConvTranspose1d),
    Operator(target=aten.conv_transpose2d.input, kind=K.TRANSPOSED_CONVOLUTION, module=nn.ConvTranspose2d),
    Operator(target=aten.conv_transpose3d.input, kind=K.TRANSPOSED_CONVOLUTION, module=nn.ConvTranspose3d),
    Operator(target=aten.linear.default, kind=K.LINEAR, module=nn.Linear),
    Operator(target=aten.matmul.default, kind=K.MATMUL),
    Operator(target=aten.bmm.default, kind=K.MATMUL),
    Operator(target=aten.softmax.int, kind=K.SOFTMAX, results=(0.0, 1.0)),
    Operator(target=aten._softmax.default, kind=K.SOFTMAX, results=(0.0, 1.0)),
    Operator(target=aten.layer_norm.default, kind=K.NORMALIZATION, module=nn.LayerNorm),
    Operator(target=aten.group_norm.default, kind=K.NORMALIZATION, module=nn.GroupNorm),
    # With running statistics it becomes the model's own module, which follows the mode.
    Operator(
        target=aten.instance_norm.default,
        kind=K.NORMALIZATION,
        module=nn.InstanceNorm2d,
        training_flag="use_input_stats",
    ),
    # A BatchNorm whose parameters belong to a module of the model becomes a module for the input's number of axes; any
    # other stays a function.
    Operator(target=aten.batch_norm.default, kind=K.NORMALIZATION, module=nn.BatchNorm2d, training_flag="training"),
    Operator(target=aten.rms_norm.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.dropout.default, kind=K.IDENTITY, module=nn.Dropout),
    Operator(target=aten.feature_dropout.default, kind=K.IDENTITY, module=nn.Dropout2d),
    Operator(target=aten.alpha_dropout.default, kind=K.IDENTITY, module=nn.AlphaDropout),
    Operator(target=aten.feature_alpha_dropout.default, kind=K.IDENTITY, module=nn.FeatureAlphaDropout),
)

_CELLS = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)

RECURRENT = tuple(
    Operator(target=overload, kind=K.FLOAT, kernel_rounded=True)
    for cells in _CELLS
    for overload in (cells.input, cells.data)
)

_PRODUCTS = (aten.einsum, aten.mm, aten.addmm, aten.baddbmm, aten.addbmm, aten.mv, aten.dot, aten.tensordot)

PRODUCTS_IN_FLOAT = (
    *(Operator(target=product.default, kind=K.FLOAT, kernel_rounded=True) for product in _PRODUCTS),
    Operator(target=aten.bilinear.default, kind=K.FLOAT, kernel_rounded=True),
    Operator(target=aten.scaled_dot_product_attention.default, kind=K.FLOAT, kernel_rounded=True),
)
