"""Define the mark at a tensor of a captured graph that the outputs of training mode are made of."""

from torch import Tensor, nn


class TrainingTap(nn.Module):
    """Marks a tensor that only training returns; it has no readers, and eval mode does not need it."""

    _is_impure = True  # torch.fx keeps the call of such a module although nothing reads its result

    def forward(self, x: Tensor) -> Tensor:
        return x
