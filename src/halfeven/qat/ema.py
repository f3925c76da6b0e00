"""An exponential moving average (EMA) of the weights in quantization-aware training, to evaluate beside the weights.

Averaging the iterates: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); for
quantized networks: Park and Yoo, "PROFIT" (arXiv:2008.04693).

The latent float weights are averaged. The average of a weight that hops between two integers is near the boundary
between them, and its integer may be one that was never trained with: the average of good networks may be worse than
each of them. So evaluate both the average and the model in training, and keep the better. The average of BatchNorm's
statistics belongs to none of the networks; below 8 bits re-estimate it first: `re_estimate(average.model, loader)`.

`torch.optim.swa_utils.AveragedModel` does not fit: with `use_buffers` it averages integers too, and truncates them (a
zero point that rises is never followed), and a mask's -inf becomes NaN; without it BatchNorm's statistics are not
averaged. It has no warm-up, ignores the state of quantizers, and waits for the device in each step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from halfeven.errors import CheckpointError
from halfeven.graph.copying import copy_model
from halfeven.graph.torch_private import AnyBatchNorm, blend_all, copy_all, own_buffers, own_parameters
from halfeven.graph.wrappers import unwrapped
from halfeven.options import Options, at_least, below
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer
from halfeven.renamed import renamed_attributes

PYTHON_STATE = ("scheme", "state")
"""Attributes of a quantizer's state beside its tensors: to read those instead would wait for the device."""


@dataclass(frozen=True, kw_only=True)
class AveragingOptions(Options):
    """The memory of the average."""

    decay: Annotated[float, at_least(0), below(1)] = 0.0
    """Share of the average that stays at each step; its memory is about 1 / (1 - decay) steps: 0.999 for runs of
    thousands of steps; 0: off."""


def warmed_up(decay: float, step: int) -> float:
    """Return the decay at a step, from 0: at most (1 + step) / (10 + step), so that the start is soon forgotten."""
    # The warm-up of TensorFlow's ExponentialMovingAverage.
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def blend(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """Set each average to decay * average + (1 - decay) * value, in place, in one operation for each dtype.

    Args:
        averages: floating-point tensors; tensors of any dtype where the decay is 0, which copies.
        values: tensors of the same shapes, dtypes and devices.
        decay: weight of the present average, in [0, 1).
    """
    for mine, new in _grouped_by_dtype(averages, values):
        if decay == 0:
            # Not lerp with weight 1: integers cannot be interpolated, and NaN of a range that is not set would stay
            # NaN.
            copy_all(mine, new)
        else:
            blend_all(mine, new, 1 - decay)


def _grouped_by_dtype(averages: Sequence[Tensor], values: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for average, value in zip(averages, values, strict=True):
        mine, new = groups.setdefault(average.dtype, ([], []))
        mine.append(average)
        new.append(value)
    return list(groups.values())


class WeightEMA:
    """The moving average of a model: `model`, a model in eval mode with a plan and ranges of its own.

    Parameters (learned scales as they are stored: logarithms as logarithms), BatchNorm's statistics and the quantizers'
    ranges are averaged. All other buffers are copied: integers such as zero points, and constants. The average starts
    with the first update, whenever that is; until then it is the model given. A quantizer that has got its first range
    or other bits since the last update starts anew with them.

    In a distributed run all processes have the same average, except for BatchNorm's statistics: call
    `halfeven.layerwise.batchnorm_statistics.average_batchnorm(average.model)` before you evaluate or save it.

    Args:
        qmodel: the model in training; none of its modules may be replaced meanwhile.
        options: the decay.
    """

    def __init__(self, qmodel: nn.Module, options: AveragingOptions) -> None:
        self.options = options
        qmodel = unwrapped(qmodel)
        self._raw = qmodel
        # A whole model, so that it can be validated, saved and exported like the one in training.
        self.model = copy_model(qmodel).eval().requires_grad_(False)
        own = quantizers(self.model)
        # The copy has the same names, by which each quantizer finds its counterpart.
        self._quantizers = [(quantizer, own[name]) for name, quantizer in quantizers(qmodel).items()]
        self._started = False
        # By owner and name: to move a model to a device, or to load into it, may replace its tensors.
        self._averaged = [self._tables_holding(name, own_parameters) for name, _ in qmodel.named_parameters()]
        self._copied: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        for name, buffer in qmodel.named_buffers():
            owner = qmodel.get_submodule(name.rpartition(".")[0])
            # Other floating-point buffers are constants such as masks, whose -inf has no average.
            averaged = buffer.is_floating_point() and isinstance(owner, AnyBatchNorm | Quantizer)
            (self._averaged if averaged else self._copied).append(self._tables_holding(name, own_buffers))

    def _tables_holding(
        self, name: str, table: Callable[[nn.Module], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Return the tables that hold a tensor in the average and in the raw model, and its name in them."""
        path, _, attribute = name.rpartition(".")
        return table(self.model.get_submodule(path)), table(self._raw.get_submodule(path)), attribute

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights in, after an optimizer step.

        Args:
            step: number of the step just taken, from 0: the first steps count more (see `warmed_up`).
        """
        self._follow_device()
        # First the quantizers: those whose grid is new are copied, so that averaging blends numbers of one grid.
        for raw, mine in self._quantizers:
            if raw.scheme != mine.scheme or (raw.state.has_range and not mine.state.has_range):
                # An average with NaN, or with the scale of another grid, would mean nothing.
                mine.load_state_dict(raw.state_dict())
            # These steer the average's own forward pass, and they are no tensors that `blend` could copy.
            for name in PYTHON_STATE:
                setattr(mine, name, getattr(raw, name))
        # Decay 0 copies: the first update is where the average begins.
        blend(*self._tensors_at(self._averaged), warmed_up(self.options.decay, step) if self._started else 0.0)
        blend(*self._tensors_at(self._copied), 0.0)
        self._started = True

    def _follow_device(self) -> None:
        # The model in training may be moved after the average was made; one tensor tells where it is.
        tensors = self._averaged or self._copied
        if tensors:
            mine, raw, name = tensors[0]
            if mine[name].device != raw[name].device:
                self.model.to(raw[name].device)

    @staticmethod
    def _tensors_at(places: list[tuple[dict[str, Any], dict[str, Any], str]]) -> tuple[list[Tensor], list[Tensor]]:
        return [mine[name] for mine, _, name in places], [raw[name].detach() for _, raw, name in places]

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run with the same options needs.

        "model": tensors by name; "bits": those of the quantizers by name; "started": True after the first update.
        """
        bits = {name: quantizer.scheme.bits for name, quantizer in quantizers(self.model).items()}
        return {"model": self.model.state_dict(), "bits": bits, "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            CheckpointError: the state belongs to another model; the message lists the differences.
        """
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"The average of the weights cannot be resumed: {error} It belongs to another model. Resume the run "
                "with the options it was started with, or start anew."
            ) from error
        for name, quantizer in quantizers(self.model).items():
            quantizer.scheme = dataclasses.replace(quantizer.scheme, bits=state["bits"][name])
        # Without it the first update after the resumption would copy the weights and forget the average.
        self._started = state["started"]


__getattr__ = renamed_attributes(__name__, WeightAverage="qat.ema.WeightEMA")
