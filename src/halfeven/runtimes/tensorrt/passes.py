"""TensorRT's form of a deployed model: only signed activations without a zero point."""

from halfeven.deployment.deployed import Deployed
from halfeven.errors import PlacementError


def prepare_graph(deployed: Deployed) -> None:
    """Check that TensorRT has integers for every grid of a deployed model; nothing is changed.

    Raises:
        PlacementError: an activation is unsigned.
    """
    unsigned = [q.name.removeprefix("quantizers.") for q in deployed.quantizers if not (q.weight or q.signed)]
    if unsigned:
        name = deployed.target.name
        raise PlacementError(
            f"{name} supports only signed activations without a zero point, and {len(unsigned)} of this model are "
            f'unsigned ({", ".join(unsigned[:3])}), so other integers would run. Prepare it with target="{name}"; '
            "OpenVINO and ONNX Runtime run such a model too."
        )
