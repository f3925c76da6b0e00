"""halfeven: train and quantize PyTorch models for integer runtimes, and prove that what was trained is what runs."""

from halfeven.errors import HalfevenError
from halfeven.export import exact, export, verify
from halfeven.pipelines import load, prepare, quantize
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan, QuantizationOptions, Rule
from halfeven.ptq.calibration import calibrate
from halfeven.training.checkpoint import save

__version__ = "0.1.0"

__all__ = [
    "HalfevenError",
    "Plan",
    "QuantizationOptions",
    "Rule",
    "calibrate",
    "exact",
    "export",
    "load",
    "plan_of",
    "prepare",
    "quantize",
    "save",
    "verify",
]
