"""Quantization-aware training with timm's model, loss, optimizer and scheduler: `python examples/timm_style.py`."""

import timm
from digits import accuracy, loader, train, trained, validation
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat

EPOCHS = 2


def network():
    """Return a small model of timm for digits, whose 8x8 pixels are enlarged."""
    return nn.Sequential(nn.Upsample(scale_factor=4), timm.create_model("test_resnet", num_classes=10, in_chans=1))


def train_one_epoch(model, batches, optimizer, loss_function, scheduler, steps):
    model.train()
    for x, y in batches:
        steps.before_step()
        outputs = model(x)
        loss = steps.loss(outputs, x, y, loss_function(outputs, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.after_step()
        scheduler.step_update(num_updates=steps.step)


def main(folder="."):
    model = trained(network, epochs=4)
    qmodel = he.calibrate(he.prepare(model, next(iter(loader(train)))[0]), loader(train))
    steps = SessionSteps(setup_qat(qmodel, model, loader(train)), qmodel)
    batches = loader(train, shuffle=True)
    optimizer = create_optimizer_v2(steps.parameter_groups(1e-3), opt="sgd", momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS * len(batches), t_in_epochs=False)
    steps.start(EPOCHS * len(batches))
    loss = LabelSmoothingCrossEntropy(0.1)
    for epoch in range(EPOCHS):
        train_one_epoch(qmodel, batches, optimizer, loss, scheduler, steps)
        steps.before_validation()
        print(f"epoch {epoch + 1}: {accuracy(qmodel):.2f} %")
    best = steps.best(accuracy)
    path = he.export(best, f"{folder}/timm_style.xml")
    report = he.verify(best, path, loader(validation), float_model=model, timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
