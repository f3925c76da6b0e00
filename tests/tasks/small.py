"""Small networks that learn the made-up scenes in seconds, as models of torchvision, and the loop that trains them."""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models._api import register_model


def block(inside, outside, stride):
    conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


class Segmenter(nn.Module):
    """Logits at a quarter of the resolution, scaled up; and those of an auxiliary head, as torchvision has it."""

    def __init__(self, classes=3):
        super().__init__()
        self.down = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32, 1))
        self.head, self.aux = nn.Conv2d(32, classes, 1), nn.Conv2d(32, classes, 1)

    def forward(self, x):
        x = self.down(x)
        up = [nn.functional.interpolate(head(x), scale_factor=4, mode="bilinear") for head in (self.head, self.aux)]
        return {"out": up[0], "aux": up[1]}


class Pyramid(nn.Module):
    """One feature map of 32 channels, at an eighth of the resolution."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32, 2), block(32, 32, 1))

    def forward(self, x):
        return {"0": self.down(x)}


@register_model()
def small_segmenter(weights=None, num_classes=3):
    return Segmenter(num_classes)


@register_model()
def small_retinanet(weights=None, num_classes=3):
    """torchvision's RetinaNet on one feature map; the background is one of its classes."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead

    torch.manual_seed(0)
    # Without BatchNorm its small weights take long to get going.
    head = RetinaNetHead(32, 2, num_classes, norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(((16, 24),), ((1.0,),))
    return RetinaNet(Pyramid(), num_classes, anchor_generator=anchors, head=head)


def fit(model, data, task, *, epochs, rate=3e-3):
    """Train with AdamW at a constant rate; gives the losses."""
    torch.manual_seed(0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), rate), []
    for _ in range(epochs):
        for inputs, targets in DataLoader(data, 8, shuffle=True, collate_fn=task.collate):
            loss = task.loss(model.train()(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses
