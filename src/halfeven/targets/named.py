"""The targets by name."""

from halfeven.errors import PlacementError
from halfeven.targets.onnxruntime import ONNXRUNTIME
from halfeven.targets.openvino import OPENVINO
from halfeven.targets.target import Target
from halfeven.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (OPENVINO, ONNXRUNTIME, TENSORRT)}


def target_named(name: str) -> Target:
    """A target by its name; raises PlacementError for one that does not exist."""
    if name not in TARGETS:
        raise PlacementError(f'There is no target "{name}". Choose one of {", ".join(TARGETS)}.')
    return TARGETS[name]
