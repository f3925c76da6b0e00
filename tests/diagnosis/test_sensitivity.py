"""The share of each tensor in the damage, measured in context and alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.diagnosis import sensitivity
from halfeven.diagnosis.causes import Suspect, cause_of
from halfeven.diagnosis.divergence import NOT_FINITE, divergence, error_share
from halfeven.diagnosis.exchanged_ranges import (
    planned_quantizers,
    quantized_alone,
    raising_bits,
    ranges_at,
    switched_on,
)
from halfeven.diagnosis.restarted import RestartedForward, WholeForward, forward_of
from halfeven.diagnosis.sensitivity import Reference, divergence_of, divergences, reference_of, sensitivities
from halfeven.diagnosis.statistics import tensor_statistics
from halfeven.errors import CalibrationError
from halfeven.placement.insertion import plan_of


class Branching(nn.Module):
    """A residual sum and a concatenation, whose tensors share a quantizer, before a pool and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.last, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = torch.cat([F.relu(self.a(x) + x), F.relu(self.b(x))], 1)
        return self.head(F.max_pool2d(F.relu(self.last(x)), 2).mean((2, 3)))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    batches = list(torch.randn(3, 8, 3, 10, 10))
    model = Branching().eval()
    qmodel = he.calibrate(he.prepare(model, batches[0], scheme="w4a4"), batches)
    return qmodel.eval(), model, batches


def test_a_pass_restarted_at_any_node_gives_the_models_own_outputs(quantized):
    qmodel, _, batches = quantized
    forward = forward_of(qmodel)
    assert isinstance(forward, RestartedForward)
    expected = qmodel(batches[0])
    stop = forward.start(((batches[0],), {}))
    for position in range(len(forward.operations)):
        forward.advance(stop, position)
        assert torch.equal(forward.outputs(stop)[0], expected)
        assert len(stop.values) < 5  # what no later node reads is released


def test_a_raised_tensor_counts_as_if_the_whole_model_ran_with_it(quantized):
    qmodel, model, batches = quantized
    reference = reference_of(qmodel, batches, float_model=model)
    ranges = ranges_at(qmodel, batches, 8)
    groups = {(planned.name, q.weight): [q] for q, planned in planned_quantizers(qmodel)}
    found = divergences(qmodel, reference, groups, lambda group: raising_bits(group, ranges))
    before = divergence_of(qmodel, reference)
    for name, group in groups.items():
        with raising_bits(group, ranges):
            assert found[name] == pytest.approx(divergence_of(qmodel, reference), rel=1e-6)
    assert len({round(value, 12) for value in found.values()}) > len(found) / 2
    assert divergence_of(qmodel, reference) == before


def test_a_model_captured_in_parts_is_measured_too(quantized):
    qmodel, model, batches = quantized
    reference = reference_of(qmodel, batches, float_model=model)
    groups = {planned.name: [q] for q, planned in planned_quantizers(qmodel) if not q.weight}
    with quantized_alone(qmodel):
        expected = divergences(qmodel, reference, groups, switched_on)
    parts = nn.Sequential(qmodel)
    assert isinstance(forward_of(parts), WholeForward)
    with quantized_alone(parts):
        assert divergences(parts, reference, groups, switched_on) == pytest.approx(expected)


def test_measuring_leaves_the_model_as_it_was(quantized):
    qmodel, model, batches = quantized
    state = copy.deepcopy(qmodel.state_dict())
    expected = qmodel(batches[0])
    found = sensitivities(qmodel, batches, float_model=model)
    assert torch.equal(qmodel(batches[0]), expected)
    assert all(torch.equal(value, state[name]) for name, value in qmodel.state_dict().items())
    assert len(found.tensors) == len(he.plan_of(qmodel).tensors) + len(he.plan_of(qmodel).weights)
    assert [t.kl_in_context for t in found.tensors] == sorted((t.kl_in_context for t in found.tensors), reverse=True)
    assert {t.raised_bits for t in found.tensors} == {8}


def test_the_bad_tensor_comes_first_and_its_raise_is_worth_its_damage(quantized):
    _, model, batches = quantized
    qmodel = he.prepare(model, batches[0], scheme="w8a8", rules=(he.Rule(pattern="last", activation_bits=2),))
    he.calibrate(qmodel, batches)
    found = sensitivities(qmodel, batches)
    worst = found.tensors[0]
    assert worst.name.startswith("last") or worst.name.startswith("relu")
    assert (worst.bits, worst.raised_bits, worst.weight) == (2, 8, False)
    assert worst.kl_in_context > 0.9 * found.divergence
    he.set_rules(qmodel, he.Rule(pattern=worst.name, activation_bits=8))
    he.calibrate(qmodel, batches)
    assert sensitivities(qmodel, batches, alone=False).divergence < 0.2 * found.divergence


def test_a_part_of_the_samples_ranks_and_the_worst_are_measured_on_all(quantized, monkeypatch):
    monkeypatch.setattr(sensitivity, "MEASURED_AGAIN", 2)
    qmodel, model, batches = quantized
    whole = sensitivities(qmodel, batches, float_model=model, alone=False)
    part = sensitivities(qmodel, batches, float_model=model, alone=False, ranked_by=len(batches[0]))
    few = sensitivities(qmodel, batches[:1], float_model=model, alone=False)
    assert part.divergence == whole.divergence
    expected = {t.name + str(t.weight): t.kl_in_context for t in whole.tensors}
    same = [t for t in part.tensors if t.kl_in_context == pytest.approx(expected[t.name + str(t.weight)], abs=1e-12)]
    assert len(same) >= 2
    assert {t.kl_in_context for t in part.tensors} & {t.kl_in_context for t in few.tensors[2:]}


def test_groups_are_raised_together_and_8_bits_to_float(quantized):
    _, model, batches = quantized
    qmodel = he.calibrate(he.prepare(model, batches[0]), batches)
    everything = {"all": [q for q, _ in planned_quantizers(qmodel)]}
    (found,) = sensitivities(qmodel, batches, groups=everything).tensors
    assert found.raised_bits is None
    assert found.kl_in_context == pytest.approx(sensitivities(qmodel, batches, alone=False).divergence)
    with pytest.raises(CalibrationError, match="no batch"):
        sensitivities(qmodel, [])


@pytest.mark.parametrize(
    ("sizes", "evidence"),
    [
        ((1, 100), "Channel 1 has 100 times the range of the smallest channel that is not dead"),
        ((1, 100, 100, 100), "Channel 1 has 100 times the range of the smallest channel that is not dead"),
        ((1, 0, 0, 0, 100), "Channel 4 has 100 times the range of the smallest channel that is not dead"),
        ((1, 1, 1, 100), "Channel 3 has 100 times the range of the median channel"),
    ],
)
def test_unlike_channels_are_compared_with_a_channel_that_shows_it(sizes, evidence):
    layer, x = nn.Linear(4, len(sizes)), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(sizes).float()[:, None] * torch.tensor([0.5, -1, 0.25, 1]))
    qmodel = he.calibrate(he.prepare(nn.Sequential(layer), x, per_channel=False), [x])
    (weight,) = plan_of(qmodel).weights
    found = tensor_statistics(qmodel, [((x,), {})])[weight.name, True]
    assert cause_of(Suspect(qmodel, weight, found)).evidence.startswith(evidence)


class Branches(nn.Module):
    """Two branches that are concatenated, one of them dead."""

    def __init__(self):
        super().__init__()
        self.live, self.dead, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        with torch.no_grad():
            self.dead.weight.zero_()
            self.dead.bias.zero_()

    def forward(self, x):
        return self.last(torch.cat([self.live(x).relu(), self.dead(x).relu()], 1))


def test_a_dead_branch_of_a_concatenation_is_no_tensor_of_another_size():
    x = torch.randn(8, 4)
    qmodel = he.calibrate(he.prepare(Branches(), x), [x])
    (shared,) = [tensor for tensor in plan_of(qmodel).tensors if len(tensor.places) == 2]
    found = tensor_statistics(qmodel, [((x,), {})])[shared.name, False]
    assert "share one range" not in cause_of(Suspect(qmodel, shared, found)).name


def test_answers_are_compared_as_what_they_are():
    torch.manual_seed(0)
    logits = torch.randn(4, 10)
    other = logits + torch.randn(4, 10)
    kl = F.kl_div(F.log_softmax(other, 1), F.log_softmax(logits, 1), log_target=True, reduction="batchmean")
    assert divergence([other], [logits]) == pytest.approx(float(kl), rel=1e-5)
    assert divergence([logits + 3], [logits]) == pytest.approx(0, abs=1e-9)  # no answer changes
    as_probabilities = divergence([other.softmax(1)], [logits.softmax(1)])
    assert as_probabilities == pytest.approx(float(kl), rel=1e-3)
    image = torch.randn(4, 3, 8, 8)
    spread = float(image.var(0, correction=0).mean())
    # A constant part of the output, here 100, is no measure of it.
    assert divergence([image + 100.1], [image + 100]) == pytest.approx(0.01 / (0.01 + spread), rel=0.1)
    assert divergence([image, other], [image, logits]) == pytest.approx(float(kl), rel=1e-5)


def test_samples_are_counted_where_an_output_has_another_first_axis():
    batch = ((torch.zeros(4, 3),), {"mask": torch.zeros(9, 9)})
    anchors = torch.zeros(100, 4)
    assert Reference([batch, batch], [[torch.zeros(4, 2), anchors]] * 2).counts == [4, 4]
    assert Reference([batch], [[anchors]]).counts == [100]


def test_answers_that_are_not_finite_count_by_the_sample():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert divergence([torch.full_like(logits, float("nan"))], [logits]) == NOT_FINITE
    one = logits.clone()
    one[2, 3] = float("-inf")
    assert divergence([one], [logits]) == NOT_FINITE / 4
    assert error_share([one], [logits]) == 1.0
    # A class that the float model masks is no damage, and the other classes are compared.
    assert divergence([one], [one]) == 0 == error_share([one], [one])
    assert 0 < divergence([one + torch.arange(10.0) / 10], [one]) < 1
    assert divergence([torch.tensor(float("nan"))], [torch.tensor(1.0)]) == NOT_FINITE
