"""Options of training with quantization that would do nothing are refused."""

import pytest

from halfeven.errors import ConfigError
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.oscillation import OscillationOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Option classes by themselves have a weight of 0.
        ({"distill": "on", "distillation": DistillationOptions(temperature=2.0)}, "distillation.weight is 0"),
        ({"average": "on", "averaging": AveragingOptions()}, "averaging.decay is 0"),
        ({"dampen_oscillations": "on", "oscillation": OscillationOptions(bits=3)}, "oscillation.dampening is 0"),
        # What "auto" never takes.
        ({"distillation": DistillationOptions(weight=0.5)}, r'qat.distillation would.*Set qat.distill="on"'),
        ({"progression": ProgressionOptions(share=0.5)}, r'qat.progression would.*Set qat.progress="on"'),
        ({"oscillation": OscillationOptions(dampening=0.5)}, "qat.oscillation would have no effect"),
        ({"oscillation": OscillationOptions(freeze=True, track=True)}, "qat.oscillation.freeze would have no effect"),
    ],
)
def test_what_would_do_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        QATOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"distill": "on", "distillation": DistillationOptions(features=("layer4",))},
        {"distill": "off", "distillation": DistillationOptions(weight=0.5)},
        {"freeze_oscillations": "on", "oscillation": OscillationOptions(freeze=True)},
        {"oscillation": OscillationOptions(track=True)},
        {"average": "off", "averaging": AveragingOptions()},
    ],
)
def test_what_does_something_or_is_switched_off_is_kept(options):
    assert QATOptions(**options)
