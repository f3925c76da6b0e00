"""Digits of scikit-learn and a small network, which the examples share; nothing is downloaded."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(data.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train = TensorDataset(images[order[360:]], labels[order[360:]])
validation = TensorDataset(images[order[:360]], labels[order[:360]])


def loader(samples, *, shuffle=False):
    return DataLoader(samples, batch_size=60, shuffle=shuffle, drop_last=shuffle)


def network():
    def block(inputs, outputs, stride=1):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    body = block(1, 16), block(16, 32, 2), block(32, 32)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model):
    """Return the percentage of right answers."""
    model.eval()
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in loader(validation)) / len(validation)


def trained(make=network, epochs=6):
    """Return a network, trained in float."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        model.train()
        for x, y in loader(train, shuffle=True):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
