"""The deployed form of a quantized model, as a runtime's file has it."""

from torch import nn

from halfeven.deployment.channel_clips import write_channel_clips
from halfeven.deployment.deployed import Deployed, deployed_form
from halfeven.deployment.quantize_op import with_exported_quantizers
from halfeven.errors import ExportError
from halfeven.placement.gates import check_gates_deployable
from halfeven.placement.grids import check_deployable
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import regions
from halfeven.quantization.scheme import BITS_NAMED_FOR_FLOAT, parse_bits
from halfeven.runtimes.runtime import Runtime, runtime_named


def deploy(qmodel: nn.Module, runtime: Runtime) -> Deployed:
    """Return the deployed form of a quantized model for a runtime; the model is not changed.

    Raises:
        CalibrationError: a quantizer has no range yet.
        PlacementError: the runtime cannot carry the model's integers, or gains nothing by its quantized gates.
        ExportError: the model was pickled.
    """
    _refuse_pickled(qmodel)
    check_gates_deployable(plan_of(qmodel).options, runtime.target)
    check_deployable(plan_of(qmodel).tensors, runtime.target)
    model = deployed_form(qmodel)
    weights_alone = parse_bits(plan_of(qmodel).options.scheme)[1] == BITS_NAMED_FOR_FLOAT
    quantizers = with_exported_quantizers(model, clips_integers=runtime.clips_integers, narrow_weights=weights_alone)
    write_channel_clips(model, quantizers)
    deployed = Deployed(model, quantizers, runtime.target)
    # The runtime's passes come last: they look for quantizers as operators, and may add some.
    runtime.prepare_graph(deployed)
    return deployed


def _refuse_pickled(qmodel: nn.Module) -> None:
    nodes = [node for region in regions(qmodel).values() for node in region.graph.nodes]
    if nodes and not any("val" in node.meta for node in nodes):
        raise ExportError(
            "This model comes from a pickle (torch.load), which holds no sizes of tensors inside the graph, so it can "
            "be run and trained and not deployed. Write it with halfeven.save(qmodel, path), and read that with "
            "halfeven.load(path, model, example)."
        )


def runtime_of(qmodel: nn.Module, name: str | None = None) -> Runtime:
    """Return the runtime of a name; of None, the runtime that a quantized model was made for."""
    return runtime_named(name or plan_of(qmodel).options.target)
