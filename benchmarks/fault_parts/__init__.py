"""The parts of the campaign of `benchmarks/faults.py`; they share models and damages with `tests/faults`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
