"""Walk from the cheapest plan to better ones: the step that gains the most for its cost, again and again."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from halfeven.diagnosis.exchanged_ranges import GridRange, grid_range, raised, set_grid_range
from halfeven.diagnosis.sensitivity import Reference, divergence_of, divergences
from halfeven.mixed_precision.cost import Cost, Work, cost_of, widths_of
from halfeven.mixed_precision.judge import Judge, Judgement
from halfeven.mixed_precision.moves import Move
from halfeven.mixed_precision.options import SearchOptions
from halfeven.mixed_precision.store import MeasurementStore
from halfeven.quantization.quantizer import Mode, Quantizer, quantizers
from halfeven.verification.layer_times import LayerTimes

FIRST_RESCORING = 4
"""Steps before the moves are ranked anew for the first time; then after twice as many, and so on."""

LEFT = 0.01
"""Share of the damage at the start below which nothing is left to gain."""


@dataclass(frozen=True)
class Step:
    """A plan on the way, and the step that led to it."""

    number: int
    unit: str
    change: str
    reason: str
    divergence: float
    """From the float model, on the samples that rank the steps."""
    cost: Cost
    judgement: Judgement | None = None
    """The drop on the held-out part, where it was measured."""


@dataclass
class Walk:
    """A search on its way: the model in its present state, the steps taken, and the moves that are left."""

    qmodel: nn.Module
    moves: Sequence[Move]
    works: Sequence[Work]
    times: LayerTimes | None
    reference: Reference
    judge: Judge
    options: SearchOptions
    store: MeasurementStore
    log: Callable[[str], None]
    steps: list[Step] = field(default_factory=list)
    taken: list[Move] = field(default_factory=list)
    ranked_after: int = -1
    """Number of steps after which the moves were ranked last."""

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
        return cost_of(self.works, widths, self.scheme, self.times)

    def within(self, cost: Cost) -> bool:
        """Return True if a cost keeps the budgets."""
        pairs = [
            (cost.bits, self.options.bits),
            (cost.tensors, self.options.tensors),
            (cost.latency, self.options.latency),
        ]
        return all(value is None or budget is None or value <= budget for value, budget in pairs)

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
            values = self.store.measured(f"drop after {count}", lambda: self._judge(count))
            step = dataclasses.replace(step, judgement=Judgement(**values))
            self.steps[count] = step
            self.log(f"    after step {count}: {self.judge.unit} {step.judgement}")
        assert step.judgement is not None
        return step.judgement

    def _judge(self, count: int) -> dict[str, Any]:
        self.go_to(count)
        values = dataclasses.asdict(self.judge(self.qmodel))
        self.go_to(len(self.taken))
        return values

    def good_enough(self, count: int) -> bool:
        """Return True if the drop after the first steps keeps its budget."""
        return self.options.max_drop is not None and self.judged(count).drop <= self.options.max_drop


def walk(state: Walk) -> int:
    """Take steps until the drop is within its budget, or none is left; return the number of steps of the best plan."""
    damage = state.store.measured("divergence", lambda: divergence_of(state.qmodel, state.reference))
    state.steps.append(Step(0, "", "", "the scheme", damage, state.cost()))
    state.log(_line(state.steps[0], state.judge.unit))
    if state.good_enough(0):
        return 0
    rank(state)
    rescored = FIRST_RESCORING
    judged = failed = 0
    while (step := _next(state)) is not None or _rank_again(state):
        if step is None:
            continue
        state.steps.append(step)
        state.log(_line(step, state.judge.unit))
        count = len(state.taken)
        # Each judgement costs a pass over the held-out part: after 1, 2, 4, ... steps, and then between two of these.
        if state.options.max_drop is not None and count >= max(2 * judged, 1):
            judged = count
            if state.good_enough(count):
                return _first_good(state, failed, count)
            failed = count
        if count == rescored and rescored < FIRST_RESCORING * 2**state.options.rescorings:
            rescored *= 2
            rank(state)
    last = len(state.taken)
    if state.options.max_drop is None:
        return last
    return _first_good(state, failed, last) if last > failed and state.good_enough(last) else last


def _first_good(state: Walk, failed: int, good: int) -> int:
    """Return the first number of steps whose drop keeps the budget, between one that does not and one that does."""
    while good - failed > 1:
        middle = (failed + good) // 2
        if state.good_enough(middle):
            good = middle
        else:
            failed = middle
    state.go_to(good)
    return good


def _rank_again(state: Walk) -> bool:
    """Rank the moves that are left in the context of the last step, if any would be within the budgets.

    Gains that were measured before other steps may have been hidden by a larger damage.
    """
    if state.ranked_after == len(state.taken) or _is_mended(state):
        return False
    state.useless.clear()
    if not any(_is_open(state, move) and state.within(state.cost(move)) for move in state.moves):
        return False
    rank(state)
    return True


def _is_mended(state: Walk) -> bool:
    return state.steps[-1].divergence <= LEFT * state.steps[0].divergence


def rank(state: Walk) -> None:
    """Measure what each move would gain in the context of the present plan."""
    state.ranked_after = len(state.taken)
    state.useless.clear()
    open_moves = {number: move for number, move in enumerate(state.moves) if _is_open(state, move)}
    state.log(f"  ranking {len(open_moves)} steps on {sum(len(x[0]) for x in state.reference.outputs)} samples ...")
    present = state.steps[-1].divergence
    for number, after in state.store.measured(
        f"ranking after {len(state.taken)}", lambda: _measured(state, open_moves)
    ).items():
        state.gains[state.moves[int(number)]] = present - after


def _measured(state: Walk, moves: dict[int, Move]) -> dict[str, float]:
    found: dict[str, float] = {}
    for candidate in dict.fromkeys(move.candidate for move in moves.values()):
        same = {str(number): move for number, move in moves.items() if move.candidate == candidate}
        settings = {q: s for move in same.values() for q, s in move.settings.items() if s is not None}
        groups = {number: list(move.settings) for number, move in same.items()}
        change = _changer(settings)
        found |= divergences(state.qmodel, state.reference, groups, change)
    return found


def _changer(settings: dict[Quantizer, GridRange]) -> Any:
    return lambda group: raised(group, settings)


def _is_open(state: Walk, move: Move) -> bool:
    return move not in state.taken and move not in state.useless and move.raises()


def _next(state: Walk) -> Step | None:
    """Take the best move, and return its step; None if none is left that gains and keeps the budgets."""
    before = state.steps[-1]
    if _is_mended(state):
        return None
    while True:
        open_moves = [move for move in state.moves if _is_open(state, move) and state.gains.get(move, 0.0) > 0]
        costs = {move: state.cost(move) for move in open_moves}
        affordable = [move for move in open_moves if state.within(costs[move])]
        if not affordable:
            return None
        best = max(affordable, key=lambda move: _worth(state, before, costs[move], state.gains[move]))
        best.apply()
        state.taken.append(best)
        name = f"divergence after {len(state.taken)}: {best.unit.name}, {best}"
        after = state.store.measured(name, lambda: divergence_of(state.qmodel, state.reference))
        if after < before.divergence or _is_cheaper(state, before.cost, costs[best]):
            return Step(
                len(state.taken),
                best.unit.name,
                str(best),
                _reason(state, before, costs[best], state.gains[best]),
                after,
                costs[best],
            )
        # It gained alone, and gains nothing in this context.
        state.taken.pop()
        state.useless.add(best)
        state.go_to(len(state.taken))


def _price(state: Walk, cost: Cost) -> float:
    """Return the cost that steps are weighed by."""
    options = state.options
    name = options.cost
    if name == "latency" or (name == "auto" and options.latency is not None):
        return cost.latency if cost.latency is not None else cost.bops
    if name == "auto" and options.bits is not None:
        return cost.bits
    return cost.size if name == "size" else cost.bops


def _is_cheaper(state: Walk, before: Cost, after: Cost) -> bool:
    return _price(state, after) < _price(state, before)


def _worth(state: Walk, before: Step, cost: Cost, gain: float) -> tuple[bool, float]:
    """Return the rank of a move: those that cost nothing first, then by the gain over the cost that they add."""
    if state.options.cost == "auto" and state.options.tensors is not None and state.options.latency is None:
        return cost.tensors <= before.cost.tensors, gain
    added = _price(state, cost) - _price(state, before.cost)
    return added <= 0, gain if added <= 0 else gain / added


def _reason(state: Walk, before: Step, cost: Cost, gain: float) -> str:
    share = gain / state.steps[0].divergence if state.steps[0].divergence else 0.0
    if _is_cheaper(state, before.cost, cost):
        return f"gains {100 * share:.1f} % of the damage and is cheaper"
    if _price(state, cost) == _price(state, before.cost):
        return f"gains {100 * share:.1f} % of the damage at no cost"
    return f"gains {100 * share:.1f} % of the damage"


def _line(step: Step, unit: str) -> str:
    cost = step.cost
    latency = "" if cost.latency is None else f", latency {cost.latency:.3f}"
    what = f"{step.unit}: {step.change}" if step.unit else "the scheme"
    return (
        f"  {step.number:3} {what}; {step.reason}; divergence {step.divergence:.4g}, {cost.bits:.2f} bits{latency}, "
        f"{cost.tensors} tensors raised"
    )
