"""Progressive bit-width: stages by the share of the run, ranges set anew at each, and a run that is resumed."""

import pytest
import torch

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.qat.bit_schedule import BitSchedule, ProgressionOptions
from halfeven.quantization.model_quantizers import quantizers
from placement.parts import IMAGE, Residual

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


class Loader:
    """One calibration batch; counts how often it is read."""

    def __init__(self):
        self.calls = []

    def __iter__(self):
        self.calls.append(1)
        return iter([X])


def progression(scheme="w4a8", **options):
    torch.manual_seed(0)
    qmodel = he.calibrate(he.prepare(Residual(), X, scheme=scheme, ranges="learned"), [X])
    loader = Loader()
    return qmodel, BitSchedule(qmodel, ProgressionOptions(**options), loader), loader.calls


def bits(qmodel, weight):
    return {q.scheme.bits for q in quantizers(qmodel).values() if q.weight is weight}


def test_bits_fall_to_those_of_the_plan_and_ranges_are_set_anew():
    qmodel, made, calls = progression(bits=(8, 6), share=0.4)
    seen = []
    for done in (0.0, 0.1, 0.19, 0.2, 0.39, 0.4, 0.9):
        made.before_step(qmodel, done)
        seen.append((bits(qmodel, True), len(calls)))
    assert [found for found, _ in seen] == [{8}, {8}, {8}, {6}, {6}, {4}, {4}]
    assert [count for _, count in seen] == [1, 1, 1, 2, 2, 3, 3]
    assert bits(qmodel, False) == {8}


def test_a_stage_has_the_scales_of_its_bits():
    qmodel, made, _ = progression(bits=(8,), share=0.5)
    quantizer = next(q for q in quantizers(qmodel).values() if q.weight)
    planned = quantizer.scale.detach().clone()
    made.before_step(qmodel, 0.0)
    assert bool((quantizer.scale < planned / 8).all())
    made.before_step(qmodel, 0.5)
    assert torch.equal(quantizer.scale, planned)


def test_a_resumed_run_has_the_bits_of_its_stage_and_keeps_its_ranges():
    qmodel, made, _ = progression()
    made.before_step(qmodel, 0.2)
    state, weights = made.state_dict(), qmodel.state_dict()
    other, resumed, calls = progression()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.before_step(other, 0.21)
    assert calls == []
    qmodel.eval()
    other.eval()
    assert torch.equal(qmodel(X), other(X))


@pytest.mark.parametrize("options", [{"bits": ()}, {"bits": (4, 8)}, {"bits": (8, 8)}, {"share": 0.0}, {"share": 1.0}])
def test_no_way_down_is_refused(options):
    with pytest.raises(ConfigError, match=r"must decrease|share=.*above 0 and below 1"):
        ProgressionOptions(**options)
