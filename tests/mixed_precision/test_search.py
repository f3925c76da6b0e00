"""The search for the cheapest plan within a budget."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.mixed_precision import walk
from halfeven.mixed_precision.cost import cost_of, widths_of, workload_of
from halfeven.mixed_precision.final_rules import final_rules
from halfeven.mixed_precision.moves import moves_of
from halfeven.mixed_precision.result_page import search_contents
from halfeven.mixed_precision.store import MEASUREMENTS_FILE, MeasurementStore
from halfeven.mixed_precision.units import units_of
from halfeven.runtimes.runtime import runtime_named
from halfeven.verification.layer_times import LayerTime, LayerTimes

RANGES_ALONE = {"reconstruct": "off", "correct_biases": "off"}

pytestmark = pytest.mark.usefixtures("unfused")


class Net(nn.Module):
    """A residual block, a concatenation and a classifier; one depthwise layer has channels of very different ranges."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.uneven, self.other = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.uneven.weight.mul_(torch.logspace(-2, 2, 8).reshape(8, 1, 1, 1))
            self.head.weight.mul_(40)
            self.uneven.bias.mul_(torch.logspace(-2, 2, 8))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.branch(x) + x)
        x = F.relu(torch.cat([self.other(x), self.uneven(x)], 1))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = Net().eval()
    batches = list(torch.randn(8, 16, 3, 8, 8))
    with torch.no_grad():
        model.head.bias.sub_(model(torch.cat(batches)).mean(0))  # so that each class is the answer of some samples
        labels = model(torch.cat(batches)).argmax(1)

    def correct(candidate):
        return (candidate(torch.cat(batches)).argmax(1) == labels).double() * 100

    return model, batches, correct


def searched(subject, *arguments, **options):
    model, batches, _ = subject
    given = {"scheme": "w4a4", "samples": 32, "log": None} | options
    return he.search(model, batches, *arguments, **given)


def test_what_a_target_ties_is_one_unit(subject):
    model, batches, _ = subject
    qmodel = he.prepare(model, batches[0], target="onnxruntime")
    (summed,) = [unit for unit in units_of(qmodel) if "add" in unit.readers]
    assert set(summed.tensors) >= {"branch", "relu"}
    attention = he.prepare(Attention(), torch.randn(2, 4, 8))
    (unit,) = [unit for unit in units_of(attention) if len(unit.tensors) > 1]
    assert len(unit.tensors) == 4, "queries, keys, values and the softmax"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.out((self.q(x) @ self.k(x).transpose(1, 2) / 3).softmax(-1) @ self.v(x))


def test_costs_are_counted_over_the_multiply_accumulates(subject):
    model, batches, _ = subject
    qmodel = he.quantize(model, batches, scheme="w4a8", reconstruct="off")
    workload = workload_of(qmodel)
    works = {work.name: work for work in workload.works}
    assert works["stem"].multiply_accumulates == 16 * 64 * 8 * 27, "of the samples that the graph was traced with"
    widths = widths_of(qmodel)
    cost = cost_of(workload, widths, widths, None)
    assert cost.bits == 6
    assert cost.size == sum(module.weight.numel() for module in model.children()) / 2
    widened = widths | {works["stem"].weight: None}
    assert cost_of(workload, widened, widths, None).bits > 6


class Skip(nn.Module):
    """A sum that alone reads the result of a convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.last = (nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(4))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(F.relu(self.left(x) + self.right(x)))


def test_a_tensor_that_no_layer_multiplies_has_a_price():
    qmodel = he.prepare(Skip().eval(), torch.randn(2, 3, 8, 8), scheme="w4a4")
    (unit,) = [unit for unit in units_of(qmodel) if not unit.layers]
    workload, widths = workload_of(qmodel), widths_of(qmodel)
    (traffic,) = [traffic for traffic in workload.traffic if traffic.name == unit.name]
    assert traffic.elements == 2 * 2 * 8 * 64, "written and read"
    times = LayerTimes(1.0, 2.0, 2.0)
    plain, raised, floating = (cost_of(workload, widths | {unit.name: bits}, widths, times) for bits in (4, 8, None))
    assert plain.bits == raised.bits == floating.bits
    assert plain.work < raised.work < floating.work
    assert plain.latency < raised.latency < floating.latency
    assert cost_of(workload, {}, widths, times).latency == 1.0, "all in float takes what the float file takes"


def test_the_smaller_change_is_taken_where_it_costs_no_more_and_is_nearly_as_good(subject):
    candidates = (he.Rule(activation_bits=16), he.Rule(activation_bits=8))
    found = searched(subject, tensors=1, candidates=candidates)
    assert [step.change for step in found.steps[1:]] == ["activation bits 8"]


def test_what_else_a_tensor_would_gain_is_measured_anew_after_its_step(subject):
    candidates = (he.Rule(weight_bits=8), he.Rule(activation_bits=8), he.Rule(quantize=False))
    found = searched(subject, bits=12.0, candidates=candidates, rescorings=0)
    again = [
        (before, step) for before, step in zip(found.steps, found.steps[1:], strict=False) if step.unit == before.unit
    ]
    assert again
    for before, step in again:
        assert step.gain == pytest.approx(before.divergence - step.divergence, abs=1e-6)


def test_the_first_step_mends_what_hurts_the_most(subject):
    raised = (he.Rule(activation_bits=8),)
    found = searched(subject, tensors=1, candidates=raised)
    assert found.reached
    assert found.chosen == 1
    plain = found.steps[0].divergence
    gains = []
    for place in he.plan_of(found.qmodel).tensors:
        rule = he.Rule(pattern=place.places[0], activation_bits=8)
        one = searched(subject, tensors=0, candidates=raised, rules=(rule,))
        gains.append(plain - one.steps[0].divergence)
    assert plain - found.steps[1].divergence == pytest.approx(max(gains), rel=0.3)


def test_the_drop_is_kept_by_as_few_steps_as_are_needed(subject):
    found = searched(subject, subject[2], max_drop=1.0)
    assert found.reached
    assert found.judgement.drop <= 1.0
    assert 0 < found.chosen < len(found.steps) + 1
    before = [step for step in found.steps[: found.chosen] if step.judgement is not None]
    assert all(step.judgement.drop > 1.0 for step in before)
    model, batches, correct = subject
    assert float(correct(found.qmodel).mean()) >= 99.0
    rebuilt = he.quantize(model, batches, scheme="w4a4", rules=found.rules, reconstruct="off", correct_biases="off")
    torch.testing.assert_close(rebuilt(batches[0]), found.qmodel(batches[0]))


def test_the_rules_describe_each_tensor_as_its_last_step_does(subject):
    model, batches, _ = subject
    qmodel = he.quantize(model, batches, scheme="w4a4", reconstruct="off", correct_biases="off")
    target = runtime_named("openvino").target
    candidates = (he.Rule(observer="lp"), he.Rule(activation_bits=8))
    moves = moves_of(qmodel, units_of(qmodel), candidates, batches, target)
    (first,) = [move for move in moves if move.unit.name == "x" and str(move) == "observer lp"]
    (second,) = [move for move in moves if move.unit.name == "x" and str(move) == "activation bits 8"]
    plan = he.plan_of(qmodel).with_rules(*final_rules(he.plan_of(qmodel), [first, second]))
    (entry,) = [tensor for tensor in plan.tensors if tensor.name == "x"]
    assert (entry.scheme.bits, entry.observer) == (8, "mse"), "the ranges that the step was measured with"
    (weight,) = [weight for weight in plan.weights if weight.name == "stem"]
    assert (weight.scheme.bits, weight.observer) == (4, "lp")
    patterns = [rule.pattern for rule in final_rules(he.plan_of(qmodel), [first, second])]
    assert len(patterns) == len(set(patterns)), "each operator has a single line to paste"


@pytest.mark.parametrize("later", [he.Rule(activation_bits=8), he.Rule(weight_bits=8)])
def test_the_rules_take_back_what_the_last_step_of_a_tensor_takes_back(subject, later):
    model, batches, _ = subject
    qmodel = he.quantize(model, batches, scheme="w4a4", per_channel=False, **RANGES_ALONE)
    target = runtime_named("openvino").target
    candidates = (he.Rule(per_channel=True, symmetric=True), later)
    moves = moves_of(qmodel, units_of(qmodel), candidates, batches, target)
    first, second = [move for move in moves if move.unit.name == "x"]
    assert second.settings.keys() < first.settings.keys(), "the earlier step is not replaced as a whole"
    plan = he.plan_of(qmodel).with_rules(*final_rules(he.plan_of(qmodel), [first, second]))
    (tensor,) = [tensor for tensor in plan.tensors if tensor.name == "x"]
    (weight,) = [weight for weight in plan.weights if weight.name == "stem"]
    grids = {tensor.quantizer_name: tensor.scheme, weight.quantizer_name: weight.scheme}
    measured = {quantizer.name: setting.scheme for quantizer, setting in (first.settings | second.settings).items()}
    assert grids == measured


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_scale_per_channel_is_a_candidate_that_costs_nothing(subject, ranges):
    model, batches, _ = subject
    options = {"scheme": "w4a8", "per_channel": False, "equalize": "off", "ranges": ranges}
    found = searched(subject, bits=6.0, candidates=(he.Rule(per_channel=True),), **options)
    assert found.chosen > 0
    assert found.steps[found.chosen].cost.size == found.steps[0].cost.size
    assert found.steps[found.chosen].divergence < 0.5 * found.steps[0].divergence
    raised = {weight.name for weight in he.plan_of(found.qmodel).weights if weight.scheme.axis is not None}
    assert raised >= {rule.pattern for rule in found.rules}
    rebuilt = he.quantize(model, batches, rules=found.rules, **options, **RANGES_ALONE)
    torch.testing.assert_close(rebuilt(batches[0]), found.qmodel(batches[0]))


def test_answers_are_compared_without_a_metric(subject):
    found = searched(subject, max_drop=3.0)
    assert found.reached
    assert found.unit == "% of answers changed"
    assert found.judgement.interval is not None
    text = str(found)
    assert "All budgets are kept" in text
    assert "Rule(pattern=" in text
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == found.chosen
    divergences = [step.divergence for step in found.pareto]
    assert divergences == sorted(divergences, reverse=True)


def test_a_budget_of_bits_is_kept_and_one_that_cannot_be_is_said_so(subject):
    found = searched(subject, bits=5.0)
    assert found.reached
    assert found.chosen > 0
    assert found.steps[found.chosen].cost.bits <= 5.0
    short = searched(subject, lambda model: 0.85, max_drop=0.5, tensors=0)
    assert short.reached, "a constant metric drops by nothing"
    assert "in the unit that evaluate returns" in str(short)
    worse = searched(subject, subject[2], max_drop=0.0, tensors=0, candidates=(he.Rule(activation_bits=8),))
    assert not worse.reached
    assert "No plan within the budgets" in str(worse)


def test_an_interrupted_search_goes_on_from_its_measurements(subject, tmp_path):
    first = searched(subject, tensors=2, resume_dir=tmp_path)
    lines = []
    again = searched(subject, tensors=2, resume_dir=tmp_path, log=lines.append)
    assert [step.divergence for step in again.steps] == [step.divergence for step in first.steps]
    assert again.rules == first.rules
    kept = json.loads((tmp_path / MEASUREMENTS_FILE).read_text())
    assert "ranking after 0" in kept["found"]
    with pytest.raises(ConfigError, match=r"another search \(options"):
        searched(subject, tensors=3, resume_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a budget"),
        ({"bits": -1.0}, "bits=-1.0 must be"),
        ({"max_drop": 1.0, "candidates": ()}, "candidates is empty"),
        ({"max_drop": 1.0, "candidates": (he.Rule(pattern="stem", activation_bits=8),)}, "cannot be tried"),
        ({"max_drop": 1.0, "candidates": (he.Rule(ranges="learned"),)}, "cannot be tried"),
        ({"latency": 0.5, "target": "tensorrt", "scheme": "w8a8"}, "not run here"),
        ({"latency": 0.5, "candidates": (he.Rule(activation_bits=16),)}, "can only be simulated"),
        ({"max_drop": 1.0, "iteration": 3}, "has no option"),
        ({"bits": 5.0, "scheme": "w4a16"}, "the same for all plans"),
        ({"max_dorp": 1.0}, r'search has no option "max_dorp". Did you mean max_drop'),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_work(options, said):
    def batches():
        raise AssertionError("the batches were read")
        yield

    with pytest.raises(ConfigError, match=said):
        he.search(nn.Identity(), batches(), **options)


def test_a_metric_that_is_none_is_refused(subject):
    with pytest.raises(ConfigError, match="is no metric"):
        searched(subject, lambda model: float("nan"), max_drop=1.0)


def test_layers_that_are_slower_in_integers_go_to_float(subject, monkeypatch):
    from halfeven.mixed_precision import plan_search

    layers = (LayerTime("uneven", 1.0, 0.2, True), LayerTime("stem", 0.1, 0.3, True))
    monkeypatch.setattr(plan_search, "_time_layers", lambda *arguments: LayerTimes(2.0, 1.4, 2.0, layers))
    found = searched(subject, latency=0.7, scheme="w8a8", candidates=(he.Rule(quantize=False),))
    assert found.steps[1].unit.startswith("relu") or "uneven" in {rule.pattern for rule in found.rules}
    assert "is cheaper" in found.steps[1].reason
    assert found.steps[1].cost.latency == pytest.approx(0.6)


def test_a_plan_that_keeps_its_drop_goes_on_until_it_keeps_the_other_budgets(subject, monkeypatch):
    from halfeven.mixed_precision import plan_search

    layers = (LayerTime("uneven", 1.0, 0.2, True),)
    times = iter([1.4, 0.6])
    monkeypatch.setattr(plan_search, "_time_layers", lambda *given: LayerTimes(next(times), 2.0, 2.0, layers))
    # Work is the price that the user names: in float the layer has more of it, so only the missed budget is a reason.
    found = searched(subject, subject[2], max_drop=100.0, latency=0.5, bits=20.0, cost="bops")
    assert found.reached
    assert (found.chosen, found.latency) == (1, 0.3)
    before, after = found.steps
    assert before.cost.latency == pytest.approx(0.7)
    assert before.judgement is None, "a plan that is too slow needs no pass over the held-out part"
    assert after.cost.latency < 0.5
    assert before.cost.work < after.cost.work
    assert "is cheaper" in after.reason
    assert after.judgement.drop <= 100.0


def test_a_file_that_takes_longer_than_estimated_gives_way_to_a_faster_plan(subject, monkeypatch):
    from halfeven.mixed_precision import plan_search

    layers = (LayerTime("stem", 0.1, 0.5, True), LayerTime("branch", 0.1, 0.5, True))
    ratios = iter([0.5, 1.2, 0.6])
    monkeypatch.setattr(plan_search, "_time_layers", lambda *given: LayerTimes(next(ratios), 2.0, 1.0, layers))
    lines = []
    found = searched(subject, latency=1.0, scheme="w8a4", candidates=(he.Rule(quantize=False),), log=lines.append)
    assert found.reached
    assert found.latency == 0.6
    assert found.chosen < len(found.steps) - 1
    assert any("more than estimated" in line for line in lines)
    assert found.steps[found.chosen].cost.latency <= 1.0 * found.steps[-1].cost.latency / 1.2


def test_a_file_that_no_earlier_plan_is_faster_than_makes_the_walk_go_on(subject, monkeypatch):
    from halfeven.mixed_precision import plan_search

    layers = (LayerTime("uneven", 1.0, 0.2, True), LayerTime("stem", 1.0, 0.4, True))
    ratios = iter([3.0, 2.6, 1.5])
    monkeypatch.setattr(plan_search, "_time_layers", lambda *given: LayerTimes(next(ratios), 2.0, 1.0, layers))
    # The scheme takes 3 and each layer in float saves some: the first step is enough by the estimate, not by the file.
    found = searched(subject, subject[2], max_drop=100.0, latency=2.35, scheme="w8a8", cost="bops")
    assert found.reached
    assert found.latency == 1.5
    assert found.chosen == 2
    assert found.steps[2].cost.latency <= found.steps[1].cost.latency * 2.35 / 2.6, "the estimates are corrected"


def test_a_resumed_search_takes_the_steps_of_the_times_that_were_measured_first(subject, monkeypatch, tmp_path):
    from halfeven.mixed_precision import plan_search

    layers = (LayerTime("uneven", 1.0, 0.2, True),)
    monkeypatch.setattr(plan_search, "_time_layers", lambda *given: LayerTimes(2.0, 1.4, 2.0, layers))
    options = {"latency": 0.7, "scheme": "w8a8", "candidates": (he.Rule(quantize=False),), "resume_dir": tmp_path}
    first = searched(subject, **options)
    monkeypatch.setattr(plan_search, "_time_layers", lambda *given: LayerTimes(1.0, 9.0, 9.0, ()))
    again = searched(subject, **options)
    assert (again.steps, again.rules, again.latency) == (first.steps, first.rules, first.latency)


def test_a_model_of_the_rules_that_loses_more_than_the_walk_saw_gets_a_further_step(subject):
    calls = []

    def metric(candidate):
        calls.append(candidate)
        # The float model, the scheme, one step, then the model that is made of the rules, and with one more step.
        return {1: 100.0, 2: 0.0, 3: 99.5, 4: 50.0}.get(len(calls), 99.5)

    found = searched(subject, metric, max_drop=1.0)
    assert found.reached
    assert found.chosen == 2, "the walk had ended after one step"


def test_measurements_of_another_judge_are_refused(subject, tmp_path):
    searched(subject, max_drop=100.0, resume_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"another search \(metric"):
        searched(subject, subject[2], max_drop=100.0, resume_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"another search \(steps"):
        searched(subject, max_drop=100.0, resume_dir=tmp_path, equalize="off")


def test_facts_are_equal_up_to_rounding_and_may_be_no_numbers(tmp_path):
    MeasurementStore(tmp_path, {"answers": [100.0, float("nan")]}).measured("one", lambda: 1.0)
    assert MeasurementStore(tmp_path, {"answers": [100.001, float("nan")]}).measured("one", lambda: 2.0) == 1.0
    json.loads((tmp_path / MEASUREMENTS_FILE).read_text(), parse_constant=pytest.fail)
    with pytest.raises(ConfigError, match="answers differ"):
        MeasurementStore(tmp_path, {"answers": [101.0, float("nan")]})


def test_steps_of_a_scheme_of_weights_alone_are_weighed_by_their_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5)).eval()
    with torch.no_grad():
        model[4].weight.mul_(40)

    def lost(candidate):
        return float(candidate is model)  # no plan is good enough, so all steps are taken

    found = he.search(model, list(torch.randn(8, 16, 64)), lost, scheme="w4a16", max_drop=0.1, samples=64, log=None)
    sizes = [step.cost.size for step in found.steps]
    assert sizes == sorted(sizes)
    # The largest gain for its size: a small layer first, and 8 bits before float, which adds seven times as much.
    assert [step.change for step in found.steps[1:3]] == ["weight bits 8"] * 2
    assert len({step.cost.work for step in found.steps}) == 1
    assert len(found.pareto) > 2
    contents = search_contents(found.to_dict(), {})
    assert contents.plans_cost.startswith("size of the weights")
    assert contents.plans[1]["cost"] == sizes[1] / sizes[0]


def test_a_drop_that_no_plan_keeps_ends_with_a_layer_in_integers(subject):
    model = subject[0]
    in_float = (he.Rule(quantize=False),)
    found = searched(subject, lambda candidate: float(candidate is model), max_drop=0.1, candidates=in_float)
    assert not found.reached
    assert he.plan_of(found.qmodel).weights
    assert "No plan within the budgets" in str(found)


def test_moves_that_gain_nothing_are_ranked_anew_ever_more_rarely(subject, monkeypatch):
    model, lines = subject[0], []
    monkeypatch.setattr(walk, "divergence_of", lambda *_: 1.0)
    monkeypatch.setattr(walk, "_measure_moves", lambda _, moves: {number: 1.0 for number in map(str, moves)})
    found = searched(subject, lambda candidate: float(candidate is model), max_drop=0.1, rescorings=0, log=lines.append)
    steps = len(found.steps) - 1
    rankings = sum(line.startswith("  ranking") for line in lines)
    assert steps >= 8
    assert rankings <= 2 + steps.bit_length(), "a ranking takes much longer than a step"


def test_a_metric_judges_the_result_without_a_budget_for_its_drop(subject):
    found = searched(subject, subject[2], tensors=1)
    assert found.judgement.drop == pytest.approx(100.0 - float(subject[2](found.qmodel).mean()))


def test_a_drop_of_outputs_that_are_no_class_scores_is_not_called_answers():
    batches = list(torch.randn(2, 8, 3, 4, 4))
    found = he.search(Skip().eval(), batches, scheme="w4a4", max_drop=50.0, tensors=0, log=None)
    assert found.unit == "100 x divergence"


def test_learned_rounding_of_the_final_model_is_kept_for_a_resumed_search(subject, tmp_path):
    searched(subject, tensors=0, reconstruct="layers", iterations=1, resume_dir=tmp_path)
    assert len(list(tmp_path.glob("plan_*/*.safetensors"))) == 5
