"""Walk from the cheapest plan to better ones: the step that gains the most for its cost, again and again."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from halfeven.diagnosis.exchanged_ranges import GridRange, grid_range, raising_bits, set_grid_range
from halfeven.diagnosis.sensitivity import Reference, divergence_of, divergences
from halfeven.mixed_precision.cost import Cost, Workload, cost_of, widths_of
from halfeven.mixed_precision.judge import Judge, Judgement
from halfeven.mixed_precision.moves import Move
from halfeven.mixed_precision.options import SearchOptions
from halfeven.mixed_precision.pricing import (
    NEXT_TO_NOTHING,
    added_price,
    is_cheaper,
    is_worth_its_work,
    missed_budgets,
    reason,
    worth,
)
from halfeven.mixed_precision.store import MeasurementStore
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.verification.layer_times import LayerTimes

FIRST_RESCORING = 4
"""Steps before the moves are ranked anew for the first time; then after twice as many, and so on."""

EQUIVALENT_GAIN_SHARE = 0.9
"""Share of a step's gain that a smaller change of the same tensors needs to be taken instead, at no higher price."""

NEGLIGIBLE_DIVERGENCE = 1e-4
"""Divergence that no answer shows."""

USELESS_ALONE = "gains nothing alone; others may after it"
"""The reason of a step that is taken where none gains."""


@dataclass(frozen=True)
class SearchStep:
    """A plan on the way, and the step that led to it."""

    number: int
    unit: str
    change: str
    reason: str
    divergence: float
    """From the float model, on the samples that rank the steps."""
    cost: Cost
    gain: float = 0.0
    """The fall of the divergence that the last ranking expected of the step."""
    judgement: Judgement | None = None
    """The drop on the held-out part, where it was measured."""

    @property
    def title(self) -> str:
        """The change in words."""
        return f"{self.unit}: {self.change}" if self.unit else "the scheme"


@dataclass
class Walk:
    """A search on its way: the model in its present state, the steps taken, and the moves that are left."""

    qmodel: nn.Module
    moves: Sequence[Move]
    workload: Workload
    times: LayerTimes | None
    reference: Reference
    judge: Judge
    options: SearchOptions
    store: MeasurementStore
    log: Callable[[str], None]
    # `steps[n]` is the plan after the first n moves of `taken`; `steps[0]` is the scheme's, so it has one more entry.
    steps: list[SearchStep] = field(default_factory=list)
    taken: list[Move] = field(default_factory=list)
    ranked_after: int = -1
    """Number of steps after which the moves were ranked last."""
    patience: int = 1
    """Number of steps from a ranking to the next that is made because no move gains by the last."""

    def __post_init__(self) -> None:
        self.start: dict[Quantizer, GridRange] = {q: grid_range(q) for q in quantizers(self.qmodel).values()}
        self.scheme = widths_of(self.qmodel)
        self.useless: set[Move] = set()
        self.gains: dict[Move, float] = {}

    def cost(self, move: Move | None = None) -> Cost:
        """Return the cost of the present plan, or of it with a move."""
        widths = widths_of(self.qmodel)
        for quantizer, setting in (move.settings if move is not None else {}).items():
            widths[quantizer.name] = None if setting is None else setting.scheme.bits
        return cost_of(self.workload, widths, self.scheme, self.times)

    def within(self, cost: Cost, before: Cost | None = None) -> bool:
        """Return True if a cost keeps the budgets.

        Args:
            cost: of a plan.
            before: of the plan that a step starts from: the step may come nearer to a budget that neither keeps.
        """
        missed = missed_budgets(self.options, cost)
        return not missed or (before is not None and all(getattr(cost, n) < getattr(before, n) for n in missed))

    def share(self, move: Move) -> float:
        """Return the share of the damage at the start that a move is expected to take away."""
        damage = self.steps[0].divergence
        return self.gains.get(move, 0.0) / damage if damage else 0.0

    def leaves_a_layer(self, move: Move) -> bool:
        """Return True if a layer computes in integers after a move: a model without any has no plan."""
        weights = [quantizer for quantizer in self.start if quantizer.weight and quantizer.mode is not Mode.FLOAT]
        return any(quantizer not in move.settings or move.settings[quantizer] is not None for quantizer in weights)

    def go_to(self, count: int) -> None:
        """Put the model into the state after the first steps."""
        for quantizer, given in self.start.items():
            quantizer.mode = Mode.QUANTIZE
            set_grid_range(quantizer, given)
        for move in self.taken[:count]:
            move.apply()

    def judged(self, count: int) -> Judgement:
        """Return the drop after the first steps, measured once."""
        step = self.steps[count]
        if step.judgement is None:
            # A resumed search takes the same steps, because every choice rests on a stored measurement: the number of
            # steps names the plan.
            values = self.store.measured(f"drop after {count}", lambda: self._judge_step(count))
            step = dataclasses.replace(step, judgement=Judgement(**values))
            self.steps[count] = step
            self.log(f"    after step {count}: {self.judge.unit} {step.judgement}")
        assert step.judgement is not None
        return step.judgement

    def _judge_step(self, count: int) -> dict[str, Any]:
        self.go_to(count)
        values = dataclasses.asdict(self.judge(self.qmodel))
        self.go_to(len(self.taken))
        return values

    def good_enough(self, count: int) -> bool:
        """Return True if the plan after the first steps keeps the budget of the drop, and all others."""
        # The other budgets first: they cost no pass over the held-out part.
        if self.options.max_drop is None or not self.within(self.steps[count].cost):
            return False
        return self.judged(count).drop <= self.options.max_drop


def walk(state: Walk) -> int:
    """Take steps until the drop and all other budgets are kept, or none is left.

    Returns:
        Number of steps of the best plan.
    """
    damage = state.store.measured("divergence", lambda: divergence_of(state.qmodel, state.reference))
    state.steps.append(SearchStep(0, "", "", "the scheme", damage, state.cost()))
    state.log(_step_line(state.steps[0], state.judge.unit))
    if state.good_enough(0):
        return 0
    rank_moves(state)
    return _take_steps(state)


def walk_on(state: Walk, latency: float) -> int:
    """Take further steps, after the last plan, until a lower estimate of the latency is kept too.

    Args:
        state: the search.
        latency: the budget of the estimate.

    Returns:
        Number of steps of the best plan.
    """
    options = state.options
    state.go_to(len(state.taken))
    state.options = dataclasses.replace(options, latency=latency)
    try:
        return _take_steps(state)
    finally:
        state.options = options


def _take_steps(state: Walk) -> int:
    """Take steps from the last plan on, and return the number of steps of the best plan."""
    # Numbers of steps: before the next ranking, at the last judgement, and of the longest plan that was not good
    # enough.
    start = len(state.taken)
    rescored = FIRST_RESCORING
    judged = failed = start
    while take_step(state):
        count = len(state.taken)
        # Each judgement costs a pass over the held-out part: after 1, 2, 4, ... steps, and then between two of these.
        if state.options.max_drop is not None and count - start >= max(2 * (judged - start), 1):
            judged = count
            if state.good_enough(count):
                return _first_good_enough(state, failed, count)
            failed = count
        # Ranked anew after 4, 8, 16, ... steps, `rescorings` times at most.
        if count == rescored and rescored < FIRST_RESCORING * 2**state.options.rescorings:
            rescored *= 2
            rank_moves(state)
    last = len(state.taken)
    if state.options.max_drop is None:
        return last
    return _first_good_enough(state, failed, last) if last > failed and state.good_enough(last) else last


def take_step(state: Walk) -> bool:
    """Take one step after the last plan; return False where none is left."""
    # A step that gains by the last ranking, or else by a new one.
    step = _take_best_move(state)
    if step is None and _rank_again(state):
        step = _take_best_move(state)
    # Neither the last ranking nor a new one has a step that gains: the least harmful one, where a drop is still to be
    # met.
    step = step or _take_best_move(state, gaining=False)
    if step is not None:
        state.steps.append(step)
        state.log(_step_line(step, state.judge.unit))
    return step is not None


def _first_good_enough(state: Walk, failed: int, good: int) -> int:
    """Return the first number of steps whose plan keeps all budgets, between one that does not and one that does."""
    # Bisection: the drop is taken to fall from step to step, and no step leaves a budget that is kept.
    while good - failed > 1:
        middle = (failed + good) // 2
        if state.good_enough(middle):
            good = middle
        else:
            failed = middle
    # The model ends in the state of the plan that is returned.
    state.go_to(good)
    return good


def _rank_again(state: Walk) -> bool:
    """Rank the moves that are left in the context of the last step, if any would be within the budgets.

    Gains that were measured before other steps may have been hidden by a larger damage. Where a drop is to be met, the
    least harmful step is taken in the meantime, and the number of steps between such rankings doubles each time.
    """
    since = len(state.taken) - state.ranked_after
    if not since or _has_nothing_to_gain(state):
        return False
    if state.options.max_drop is not None and since < state.patience:
        return False
    state.useless.clear()
    present = state.steps[-1].cost
    if not any(_can_be_taken(state, move) and state.within(state.cost(move), present) for move in state.moves):
        return False
    rank_moves(state)
    state.patience *= 2
    return True


def _has_nothing_to_gain(state: Walk) -> bool:
    """Return True where nothing is left to gain, and the budgets are kept."""
    last = state.steps[-1]
    if not state.within(last.cost):
        return False
    if last.divergence <= NEGLIGIBLE_DIVERGENCE:
        return True
    # Where the drop is too large yet, a hundredth of the damage may still show in it.
    return state.options.max_drop is None and last.divergence <= NEXT_TO_NOTHING * state.steps[0].divergence


def rank_moves(state: Walk) -> None:
    """Measure the gain of each move in the context of the present plan."""
    state.ranked_after = len(state.taken)
    state.useless.clear()
    open_moves = {number: move for number, move in enumerate(state.moves) if _can_be_taken(state, move)}
    state.log(f"  ranking {len(open_moves)} steps on {sum(state.reference.counts)} samples ...")
    present = state.steps[-1].divergence
    name = f"ranking after {len(state.taken)}"
    for number, after in state.store.measured(name, lambda: _measure_moves(state, open_moves)).items():
        state.gains[state.moves[int(number)]] = present - after


def _rank_relatives(state: Walk, taken: Move, after: float) -> None:
    """Measure anew the gains of other changes of the same tensors: a step has taken a part of them away."""
    related = {
        number: move
        for number, move in enumerate(state.moves)
        if (move.unit is taken.unit or move.settings.keys() & taken.settings.keys()) and _can_be_taken(state, move)
    }
    name = f"ranking of its tensors after {len(state.taken)}: {taken.unit.name}, {taken}"
    for number, divergence in state.store.measured(name, lambda: _measure_moves(state, related)).items():
        state.gains[state.moves[int(number)]] = after - divergence


def _measure_moves(state: Walk, moves: dict[int, Move]) -> dict[str, float]:
    found: dict[str, float] = {}
    # `settings` holds one setting for a quantizer, and each candidate has its own.
    for candidate in dict.fromkeys(move.candidate for move in moves.values()):
        same = {str(number): move for number, move in moves.items() if move.candidate == candidate}
        settings = {q: s for move in same.values() for q, s in move.settings.items() if s is not None}
        groups = {number: list(move.settings) for number, move in same.items()}
        change = _raising(settings)
        found |= divergences(state.qmodel, state.reference, groups, change)
    return found


def _raising(settings: dict[Quantizer, GridRange]) -> Any:
    return lambda group: raising_bits(group, settings)


def _can_be_taken(state: Walk, move: Move) -> bool:
    return move not in state.taken and move not in state.useless and move.raises()


def _take_best_move(state: Walk, *, gaining: bool = True) -> SearchStep | None:
    """Take the best move, and return its step; None if none is left that keeps the budgets.

    Args:
        state: the search.
        gaining: the move must gain. False where no move gains alone and the drop is still too large: the least harmful
            move is taken, after which others may gain, because errors of several tensors meet.
    """
    before = state.steps[-1]
    if _has_nothing_to_gain(state) or (not gaining and state.options.max_drop is None):
        return None
    while (best := _best_move(state, before, gaining=gaining)) is not None:
        move, cost = best
        gain, share = state.gains[move], state.share(move)
        move.apply()
        state.taken.append(move)
        name = f"divergence after {len(state.taken)}: {move.unit.name}, {move}"
        after = state.store.measured(name, lambda: divergence_of(state.qmodel, state.reference))
        # The ranking measured the move in an earlier plan: what counts is the divergence of the present plan with it.
        needed = not state.within(before.cost) and is_cheaper(state.options, before.cost, cost)
        # Above a budget a cheaper plan is worth a step even where it gains nothing.
        if after < before.divergence or needed or not gaining:
            _rank_relatives(state, move, after)
            why = reason(state.options, before.cost, cost, share) if gaining else USELESS_ALONE
            return SearchStep(len(state.taken), move.unit.name, str(move), why, after, cost, gain)
        # It gained alone, and gains nothing in this context.
        state.taken.pop()
        state.useless.add(move)
        state.go_to(len(state.taken))
    return None


def _best_move(state: Walk, before: SearchStep, *, gaining: bool) -> tuple[Move, Cost] | None:
    """Return the move that gains the most for its price, with the cost of the plan with it; None if none is left.

    A smaller change of the same tensors that gains nearly as much, at no higher price, is preferred.
    """
    costs = _affordable_moves(state, before, gaining=gaining)
    if not costs:
        return None
    gains = {move: state.gains.get(move, 0.0) for move in costs}
    if not gaining:
        least = max(costs, key=lambda move: gains[move])
        return least, costs[least]
    best = max(costs, key=lambda move: worth(state.options, before.cost, costs[move], gains[move]))
    highest = added_price(state.options, before.cost, costs[best])
    # Less by a tenth of its size, whatever its sign.
    enough = gains[best] - (1 - EQUIVALENT_GAIN_SHARE) * abs(gains[best])
    as_good = [
        move
        for move, cost in costs.items()
        if move.unit is best.unit and gains[move] >= enough and added_price(state.options, before.cost, cost) <= highest
    ]
    # The price may count one cost only, such as the number of tensors: among equals the least work is taken.
    chosen = min(as_good, key=lambda move: costs[move].work)
    return chosen, costs[chosen]


def _affordable_moves(state: Walk, before: SearchStep, *, gaining: bool) -> dict[Move, Cost]:
    """Return the moves that may be taken, with the cost of the plan with each."""
    found = {}
    for move in state.moves:
        if not (_can_be_taken(state, move) and state.leaves_a_layer(move)):
            continue
        cost = state.cost(move)
        needed = not state.within(before.cost) and is_cheaper(state.options, before.cost, cost)
        if gaining:
            gains = state.gains.get(move, 0.0) > 0
            worthy = needed or (gains and is_worth_its_work(state.options, before.cost, cost, state.share(move)))
        else:
            worthy = cost.work > before.cost.work or cost.size > before.cost.size
        if worthy and state.within(cost, before.cost):
            found[move] = cost
    return found


def _step_line(step: SearchStep, unit: str) -> str:
    cost = step.cost
    latency = "" if cost.latency is None else f", latency {cost.latency:.3f}"
    return (
        f"  {step.number:3} {step.title}; {step.reason}; divergence {step.divergence:.4g}, "
        f"{cost.bits:.2f} bits{latency}, {cost.tensors} tensors raised"
    )
