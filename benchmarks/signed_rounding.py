"""AutoRound's signed gradient descent in place of AdaRound, on the linear layers of a BERT; it is not in halfeven.

Cheng et al. (arXiv 2309.05516): W~ = a s * clamp(round(W / (a s) + V), low, high), with V in [-1/2, 1/2] and a factor a
in [1/2, 1] for each row's scale. Both take steps of equal size against the sign of their gradient, which shrink to 0
along a line. Needs the package transformers, and the folder of a model, as sentence_embeddings.py does; the sentences
are the same. A seed draws those that calibrate and learn; the others are compared.

    python benchmarks/signed_rounding.py --model all-MiniLM-L6-v2 [--schemes w4a16 w4a8] [--seeds 0 1 2] [--json FILE]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from smoothing import BATCH, CALIBRATION, bert_and_batches, embeddings
from torch import Tensor

import halfeven as he
from halfeven.layerwise.sqnr import sqnr
from halfeven.ptq.reconstruction import optimize
from halfeven.ptq.reconstruction.adaround import Rounding, _as_rows, _from_rows
from halfeven.quantization.scheme import Scheme

SMALLEST_FACTOR = 0.5

_adaround = Rounding.of


class SignedRounding(Rounding):
    """The rounding of a linear layer by AutoRound. `floor` keeps W, and `first` the factor of each row's scale."""

    total: int
    """Number of steps to come in all."""
    first_scale: Tensor
    moves_scale: bool
    loss: Callable[[], float]
    """Returns the loss at the present weights."""
    best: tuple[float, Tensor, Tensor]
    """Least loss, with its V and factors."""

    @staticmethod
    def of_linear(
        weight: Tensor, scale: Tensor, scheme: Scheme, *, total: int, moves_scale: bool, loss: Callable[[], float]
    ) -> Rounding:
        """`Rounding.of` for other weights than those of linear layers."""
        if weight.ndim != 2:
            return _adaround(weight, scale, scheme)
        column = scale.detach().reshape(-1, 1).clone()
        rows = _as_rows(weight.detach(), scheme.axis)
        v, factor = torch.zeros_like(rows), torch.ones_like(column)
        soft = _from_rows(rows.clone(), weight.shape, scheme.axis).requires_grad_()
        made = SignedRounding(scheme, column, rows, v, factor, torch.empty(0), rows, soft)
        made.total, made.first_scale, made.moves_scale, made.loss = total, column.clone(), moves_scale, loss
        made.best = (float("inf"), v.clone(), factor.clone())
        made._round()
        return made

    @torch.no_grad()
    def _round(self) -> None:
        self.scale.copy_(self.first_scale * self.first)
        self.soft.copy_(_from_rows(self.scale * self._levels(), self.soft.shape, self.scheme.axis))

    def _levels(self) -> Tensor:
        return torch.clamp(torch.round(self.floor / self.scale + self.v), self.scheme.quant_min, self.scheme.quant_max)

    @torch.no_grad()
    def step(self, rate: float, weight: float, beta: float) -> None:
        """Take one signed step; the arguments are those of AdaRound, and have no effect."""
        assert self.soft.grad is not None
        grad = _as_rows(self.soft.grad, self.scheme.axis)
        self.soft.grad = None
        if self.loss() < self.best[0]:
            self.best = (self.loss(), self.v.clone(), self.first.clone())
        ratio = self.floor / self.scale
        inside = (ratio + self.v >= self.scheme.quant_min - 0.5) & (ratio + self.v <= self.scheme.quant_max + 0.5)
        # Straight through the rounding: dW~/dV = s inside of the grid, dW~/ds = level - W / s inside, level outside.
        along_scale = (grad * (self._levels() - torch.where(inside, ratio, 0.0))).sum(1, keepdim=True)
        size = (1 - self.steps / self.total) / self.total
        self.steps += 1
        self.v.sub_(size * torch.sign(torch.where(inside, grad, 0.0))).clamp_(-0.5, 0.5)
        if self.moves_scale:
            self.first.sub_(size * torch.sign(along_scale)).clamp_(SMALLEST_FACTOR, 1.0)
        if self.steps == self.total:
            self.v.copy_(self.best[1])
            self.first.copy_(self.best[2])
        self._round()

    @property
    def integers(self) -> Tensor:
        """The integers that V rounds to now."""
        return _from_rows(self._levels(), self.soft.shape, self.scheme.axis)

    @property
    def undecided(self) -> float:
        """Nothing is undecided: each step rounds."""
        return 0.0


@contextmanager
def signed_steps(total: int, moves_scale: bool) -> Iterator[None]:
    """Inside, reconstructions of `total` steps learn linear layers by AutoRound."""
    errors = optimize._relative_error
    losses = [float("inf")]

    def recorded(*values: Any) -> Tensor:
        error = errors(*values)
        losses.append(float(error.detach()))
        return error

    way = partial(SignedRounding.of_linear, total=total, moves_scale=moves_scale, loss=lambda: losses[-1])
    with (
        mock.patch.object(Rounding, "of", staticmethod(way)),
        mock.patch.object(optimize, "_relative_error", recorded),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with weights, config and tokenizer")
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w4a8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="sentences in a step")
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder to keep")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    model, batches = bert_and_batches(options.model)
    model.encoder.layer = model.encoder.layer[: options.layers]
    ways = {
        "AdaRound": nullcontext,
        "signed steps": partial(signed_steps, options.steps, False),
        "signed steps, scales too": partial(signed_steps, options.steps, True),
    }
    rows: list[dict[str, Any]] = []
    for scheme, seed in ((scheme, seed) for scheme in options.schemes for seed in options.seeds):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        seen, unseen = (
            [batches[i] for i in part] for part in (order[: CALIBRATION // BATCH], order[CALIBRATION // BATCH :])
        )
        with torch.no_grad():
            expected = embeddings(model, unseen)
        for name, way in ways.items():
            with way():
                given = {"iterations": options.steps, "batch_size": options.batch_size, "reconstruct": "blocks"}
                qmodel = he.quantize(model, seen, scheme=scheme, **given)
            with torch.no_grad():
                found = embeddings(qmodel, unseen)
            row = {"scheme": scheme, "seed": seed, "way": name, "sqnr_db": round(sqnr([found], [expected]), 2)}
            rows.append(row | {"cosine": round(float((found * expected).sum(-1).mean()), 5)})
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
