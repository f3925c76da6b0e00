"""Writing a quantized model for its runtime, and proving that the file computes what was trained."""

from halfeven.export.exact import exact
from halfeven.export.exporting import export
from halfeven.export.report import Report
from halfeven.export.runtime import load_deployed
from halfeven.export.verify import verify

__all__ = ["Report", "exact", "export", "load_deployed", "verify"]
