"""Quantization-aware training in a script in timm's style: its model, optimizer and scheduler."""

import timm
import torch
from digits import accuracy, loader, train, validation
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat
from halfeven.training.optimization import parameter_groups
from halfeven.training.options import TrainingOptions

LOSS = LabelSmoothingCrossEntropy(0.1)


def train_one_epoch(model, batches, optimizer, loss_function, scheduler, first_update, steps=None):
    model.train()
    for update, (x, y) in enumerate(batches, first_update):
        if steps is not None:
            steps.before_step()
        outputs = model(x)
        loss = loss_function(outputs, y)
        loss = loss if steps is None else steps.loss(outputs, x, y, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(num_updates=update + 1)
        if steps is not None:
            steps.after_step(update + 1)
    return update + 1


def fit(model, groups, lr, epochs, steps=None):
    batches = loader(train, shuffle=True)
    optimizer = create_optimizer_v2(groups, opt="sgd", lr=lr, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs * len(batches), t_in_epochs=False)
    updates = 0
    for epoch in range(epochs):
        updates = train_one_epoch(model, batches, optimizer, LOSS, scheduler, updates, steps)
        print(f"epoch {epoch + 1}: {accuracy(model):.2f} %")


def main(folder="."):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model = torch.nn.Sequential(torch.nn.Upsample(scale_factor=4), model)  # digits have 8x8 pixels
    fit(model, model.parameters(), lr=0.05, epochs=4)
    qmodel = he.calibrate(he.prepare(model.eval(), next(iter(loader(train)))[0]), loader(train), batches=8)
    steps = SessionSteps(setup_qat(qmodel, model, list(loader(train))[:8]), qmodel)
    steps.start(len(loader(train, shuffle=True)))
    fit(qmodel, parameter_groups(qmodel, TrainingOptions()), lr=1e-3, epochs=1, steps=steps)
    best = steps.best(accuracy)
    report = he.verify(best, he.export(best, f"{folder}/timm.xml"), loader(validation), float_model=model, timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
