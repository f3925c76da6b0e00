"""Quantization-aware training in a script in timm's style: its model, loss, optimizer and scheduler."""

import timm
from digits import accuracy, loader, train, trained, validation
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat
from halfeven.training.optimization import parameter_groups
from halfeven.training.options import TrainingOptions

EPOCHS = 2


def network():
    """Return a small model of timm for digits, whose 8x8 pixels are enlarged."""
    return nn.Sequential(nn.Upsample(scale_factor=4), timm.create_model("test_resnet", num_classes=10, in_chans=1))


def train_one_epoch(model, batches, optimizer, loss_function, scheduler, updates, steps):
    model.train()
    for x, y in batches:
        steps.before_step()
        outputs = model(x)
        loss = steps.loss(outputs, x, y, loss_function(outputs, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
        scheduler.step_update(num_updates=updates)
        steps.after_step(updates)
    return updates


def main(folder="."):
    model = trained(network, epochs=4)
    qmodel = he.calibrate(he.prepare(model, next(iter(loader(train)))[0]), loader(train), batches=8)
    steps = SessionSteps(setup_qat(qmodel, model, list(loader(train))[:8]), qmodel)
    batches = loader(train, shuffle=True)
    optimizer = create_optimizer_v2(parameter_groups(qmodel, TrainingOptions()), opt="sgd", lr=1e-3, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS * len(batches), t_in_epochs=False)
    steps.start(EPOCHS * len(batches))
    loss = LabelSmoothingCrossEntropy(0.1)
    updates = 0
    for epoch in range(EPOCHS):
        updates = train_one_epoch(qmodel, batches, optimizer, loss, scheduler, updates, steps)
        print(f"epoch {epoch + 1}: {accuracy(qmodel):.2f} %")
    best = steps.best(accuracy)
    report = he.verify(best, he.export(best, f"{folder}/timm.xml"), loader(validation), float_model=model, timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
