"""Tasks: the loss that trains a model's outputs and the metrics that judge them."""

from halfeven.tasks.classification import Classification
from halfeven.tasks.segmentation import Segmentation
from halfeven.tasks.task import Task

__all__ = ["Classification", "Segmentation", "Task"]
