"""Distillation: the float model teaches the quantized model, by its soft labels and by the outputs of its layers.

Soft labels: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531). For quantized students:
Mishra and Marr, "Apprentice" (arXiv:1711.05852); Kim et al., "QKD" (arXiv:1911.12491); without any labels, Liu et al.,
"Nonuniform-to-Uniform Quantization" (arXiv:2111.14826). Layers: Romero et al., "FitNets" (arXiv:1412.6550).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfeven.errors import ConfigError
from halfeven.graph.batches import run_on
from halfeven.graph.copying import copy_model
from halfeven.options import Options, PositiveFloat, Share
from halfeven.placement.captured_model import capture_for_quantization
from halfeven.placement.insertion import plan_of, recorded_example
from halfeven.placement.make_plan import regions
from halfeven.qat.features import Features
from halfeven.tasks.task import first_tensor


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Options):
    """The share of the float model in the loss, and the outputs and features that are compared."""

    weight: Share = 0.0
    """Share of the loss that the teacher's soft labels take; 0 switches them off; 1 ignores the labels of the data."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both before the softmax. 1, as the student has its teacher's size and can match the
    probabilities themselves, and gradients stay as large as cross-entropy's; 2 to 4 show more of a teacher that is
    sure of nearly every training sample."""
    features: tuple[str, ...] = ()
    """Modules of the float model whose outputs are compared, such as "layer4.1" or "blocks.6"; see `Distillation`."""
    feature_weight: PositiveFloat = 1.0
    """Weight of the mean of the features' errors, each relative to the mean square of the teacher's feature."""

    def __post_init__(self) -> None:
        if "" in self.features or len(set(self.features)) < len(self.features):
            raise ConfigError(
                f"distillation.features={list(self.features)} has an empty name or one twice, which would count "
                "double. Name each module once; the model's outputs are compared by distillation.weight."
            )


def soft_label_loss(outputs: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * KL(teacher || student) in nats, the mean over samples, [] in float32 (Hinton et al., section 2).

    The gradients of the divergence shrink by T^2; the factor makes up for that, so that the weight need not follow the
    temperature T.

    Args:
        outputs: the student's logits, [samples, classes]; axes between the two count as samples.
        expected: the teacher's logits, of the same shape; they get no gradient.
        temperature: divides the logits of both before the softmax.
    """
    # In float32 under autocast too: the divergence of two similar distributions is a small difference of logarithms.
    student = F.log_softmax(outputs.float() / temperature, -1)
    teacher = F.log_softmax(expected.detach().float() / temperature, -1)
    # `log_target` takes the logarithm of the teacher's probabilities: no log(0). Summed over classes, then the mean
    # over samples: "batchmean" would divide by the first axis alone, also where positions count as samples.
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def feature_loss(feature: Tensor, expected: Tensor) -> Tensor:
    """Return the mean squared error over the teacher's mean square, [] in float32; 0 for a teacher of zeros.

    This is the noise-to-signal ratio: 1 for a student of zeros, whatever the scale of the layer.

    Args:
        feature: the output of the student's layer, of any shape.
        expected: the output of the teacher's layer, of the same shape; it gets no gradient.
    """
    wanted = expected.detach().float()
    power = wanted.square().mean()
    # Without a signal there is nothing to learn, and division by 0 would make the whole loss NaN.
    return F.mse_loss(feature.float(), wanted) / torch.where(power > 0, power, float("inf"))


class Distillation:
    """The loss of a student that is taught by a float model.

    `loss = (1 - weight) * task + weight * T^2 * KL(teacher || student) + feature_weight * mean of the features' errors`

    The teacher is a copy of the model given, in eval mode, without gradients. It is no part of the student, whose
    parameters and state do not contain it. For logits alone the teacher may be any module with the same classes.

    Features are the outputs of layers with parameters or statistics that the model *calls*: convolutions, linear layers
    and normalizations. A quantized model calls nothing else: for a container such as "layer4.1" its last such layer
    counts ("layer4.1.bn2": before the addition and the ReLU), and for a layer that is called more than once its last
    output. The teacher is captured as the student was, and its BatchNorm folded where the student's is, so that a name
    means the same tensor in both. It does not where the student's channels were rescaled since by cross-layer
    equalization, which `setup_qat` refuses.

    Use it as a context manager, or `close()` it: until then hooks on the student keep the features of each forward pass
    with gradients. In a copy of the student these hooks do nothing.

    Args:
        teacher: the float model; it is not changed.
        qmodel: the student, from `prepare`, or any module that calls the layers named.
        options: the tensors to compare, and their weights in the loss.
        logits: takes the logits, [samples, ..., classes], out of a model's outputs; by default the first tensor.

    Raises:
        ConfigError: a feature does not exist in one of the two models, or means different tensors in them.
        CaptureError: features are compared, and the teacher cannot be captured.
    """

    def __init__(
        self,
        teacher: nn.Module,
        qmodel: nn.Module,
        options: DistillationOptions,
        logits: Callable[[Any], Tensor] = first_tensor,
    ) -> None:
        self.options = options
        self.logits = logits
        # A copy: the caller may train the float model on, or may have given the model that is quantized.
        self.teacher = copy_model(teacher)
        if options.features and regions(qmodel) and not regions(teacher):
            self.teacher = _captured_as(qmodel, self.teacher)
        self.teacher.eval().requires_grad_(False)
        self._student_features = Features(qmodel, "student", options.features, with_gradients=True)
        self._teacher_features = Features(self.teacher, "teacher", options.features, with_gradients=False)
        self._student_features.open()
        self._teacher_features.open()

    @property
    def layers(self) -> dict[str, str]:
        """The name of the student's layer that each feature is read from, by the feature's name in the options."""
        return dict(zip(self.options.features, self._student_features.names, strict=True))

    def loss(self, outputs: Any, inputs: Any, labels: Any, task_loss: Tensor) -> Tensor:
        """Return the loss of a batch, []. Call it once after each forward pass of the student, under the same autocast.

        Args:
            outputs: the student's outputs: logits, [samples, classes], or whatever `logits` takes them out of.
            inputs: the student's inputs: a tensor, a tuple of positional or a dict of keyword arguments.
            labels: the labels, which `task_loss` was made from; they are not used here.
            task_loss: the loss of outputs and labels, [], for example their cross-entropy. At weight 0 and without
                features it is returned as it is; at weight 1 it does not count.

        Raises:
            ConfigError: the teacher's logits or features have another shape.
            AlgorithmError: a layer of a feature was not run, or its output is no tensor.
        """
        options = self.options
        weight = options.weight
        total = task_loss
        if weight > 0 or options.features:
            # The teacher computes the same batch, augmented alike, under the autocast of the caller.
            expected = self._teacher_outputs(inputs, first_tensor(outputs).device)
            if weight > 0:
                given = self.logits(outputs)
                wanted = self.logits(expected)
                _check_shape("logits", given, wanted)
                soft = soft_label_loss(given, wanted, options.temperature)
                # At weight 1 the task's loss is left out rather than multiplied by 0: 0 times infinity would be NaN.
                total = soft if weight == 1 else (1 - weight) * task_loss + weight * soft
            if options.features:
                total = total + options.feature_weight * self._feature_error()
        return total

    @torch.no_grad()
    def _teacher_outputs(self, inputs: Any, device: torch.device) -> Any:
        tensor = next(chain(self.teacher.parameters(), self.teacher.buffers()), None)
        if tensor is not None and tensor.device != device:
            self.teacher.to(device)
        return run_on(self.teacher, inputs)

    def _feature_error(self) -> Tensor:
        student = self._student_features.take()
        teacher = self._teacher_features.take()
        # Both were filled by the last forward passes: the student's before `loss`, the teacher's in `_teacher_outputs`.
        errors = []
        for name, given, wanted in zip(self.options.features, student, teacher, strict=True):
            _check_shape(f'feature "{name}"', given, wanted)
            errors.append(feature_loss(given, wanted))
        return torch.stack(errors).mean()

    def close(self) -> None:
        """Remove the hooks from the student, and the features that they kept."""
        self._student_features.close()
        self._teacher_features.close()

    def __enter__(self) -> "Distillation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _captured_as(qmodel: nn.Module, teacher: nn.Module) -> nn.Module:
    """Capture a float model as a quantized model was, so that both call the same layers under the same names."""
    # The same options leave out the same modules and fold the same BatchNorms, so that names mean the same layers.
    options = plan_of(qmodel).options
    example = recorded_example(qmodel)
    if example is None:
        raise ConfigError(
            "Features are compared, and this quantized model has no example input to capture the teacher with. Make it "
            "with halfeven.prepare(model, example), or give a teacher that is captured already."
        )
    args, kwargs = example
    # Modules that the user left out of the student may not exist in the teacher, and capture refuses unknown names.
    there = dict(teacher.named_modules())
    leave_out = tuple(name for name in options.leave_out if name in there)
    options = dataclasses.replace(options, leave_out=leave_out)
    kept = [kept for kept in plan_of(qmodel).kept if kept.name in there]
    # The recorded example is on the CPU, where the capture runs the model on it; `_teacher_outputs` moves the teacher
    # back.
    return capture_for_quantization(teacher.cpu(), kwargs or args, options, kept)[0]


def _check_shape(what: str, given: Tensor, wanted: Any) -> None:
    shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
    if shape != tuple(given.shape):
        raise ConfigError(
            f"The {what} of the student have shape {tuple(given.shape)} and the teacher's {shape}, so the two cannot "
            "be compared. Teach with the float model that was quantized, or with one of the same classes and widths."
        )
