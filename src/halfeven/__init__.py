"""halfeven: train and quantize PyTorch models for integer runtimes, and prove that what was trained is what runs."""

from halfeven import moved
from halfeven.checkpoint import save
from halfeven.errors import HalfevenError
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import load, prepare, quantize
from halfeven.placement.insertion import plan_of
from halfeven.placement.plan import Plan, QuantizationOptions, Rule
from halfeven.runtimes.exact_model import exact
from halfeven.runtimes.export import export
from halfeven.verification.verify import verify

moved.install()

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
