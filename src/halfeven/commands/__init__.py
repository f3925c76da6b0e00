"""What the commands do: train, ptq, test and export, each as its steps in order."""

from halfeven.commands.checkpoints import run_export, run_test
from halfeven.commands.ptq import run_ptq
from halfeven.commands.training import run_training

__all__ = ["run_export", "run_ptq", "run_test", "run_training"]
