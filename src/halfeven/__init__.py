"""halfeven: train and quantize PyTorch models for integer runtimes, and prove that what was trained is what runs."""

import importlib
from typing import TYPE_CHECKING

from halfeven import moved

if TYPE_CHECKING:
    from halfeven.checkpoint import save
    from halfeven.diagnosis.diagnose import diagnose
    from halfeven.errors import HalfevenError
    from halfeven.layerwise.calibrate import calibrate
    from halfeven.mixed_precision.result import SearchResult
    from halfeven.mixed_precision.search import search
    from halfeven.pipelines import load, plan, prepare, quantize, set_rules
    from halfeven.placement.insertion import plan_of
    from halfeven.placement.options import QuantizationOptions, Rule
    from halfeven.placement.plan import Plan
    from halfeven.quantization.observers import Observer
    from halfeven.quantization.quantizer import Quantizer
    from halfeven.runtimes.exact_model import exact
    from halfeven.runtimes.export import export
    from halfeven.runtimes.runtime import load_deployed
    from halfeven.verification.verify import verify
else:
    # torch takes seconds to import, and `halfeven --help` does without it: a public name is imported at its first use.
    _MODULES = {
        "HalfevenError": "errors",
        "Observer": "quantization.observers",
        "Plan": "placement.plan",
        "Quantizer": "quantization.quantizer",
        "QuantizationOptions": "placement.options",
        "Rule": "placement.options",
        "calibrate": "layerwise.calibrate",
        "diagnose": "diagnosis.diagnose",
        "exact": "runtimes.exact_model",
        "export": "runtimes.export",
        "load": "pipelines",
        "load_deployed": "runtimes.runtime",
        "plan": "pipelines",
        "plan_of": "placement.insertion",
        "prepare": "pipelines",
        "quantize": "pipelines",
        "SearchResult": "mixed_precision.result",
        "save": "checkpoint",
        "search": "mixed_precision.search",
        "set_rules": "pipelines",
        "verify": "verification.verify",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module 'halfeven' has no attribute '{name}'")
        found = getattr(importlib.import_module(f"halfeven.{_MODULES[name]}"), name)
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *_MODULES})


moved.install()

__version__ = "0.1.0"

__all__ = [
    "HalfevenError",
    "Observer",
    "Plan",
    "QuantizationOptions",
    "Quantizer",
    "Rule",
    "SearchResult",
    "calibrate",
    "diagnose",
    "exact",
    "export",
    "load",
    "load_deployed",
    "plan",
    "plan_of",
    "prepare",
    "quantize",
    "save",
    "search",
    "set_rules",
    "verify",
]
