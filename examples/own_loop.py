"""Quantization-aware training in your own loop: `python examples/own_loop.py`."""

import torch
from digits import accuracy, loader, train, trained, validation
from torch.nn import functional as F

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat
from halfeven.training.optimization import parameter_groups
from halfeven.training.options import TrainingOptions

EPOCHS = 3


def main(folder="."):
    model = trained()
    batches = loader(train, shuffle=True)
    qmodel = he.prepare(model, next(iter(batches))[0], scheme="w4a8")
    he.calibrate(qmodel, loader(train), batches=8)
    print(f"float {accuracy(model):.2f} %, calibrated {accuracy(qmodel):.2f} %")

    steps = SessionSteps(setup_qat(qmodel, model, list(loader(train))[:8]), qmodel)
    steps.start(EPOCHS * len(batches))
    optimizer = torch.optim.SGD(parameter_groups(qmodel, TrainingOptions()), lr=1e-2, momentum=0.9)
    for epoch in range(EPOCHS):
        qmodel.train()
        for number, (x, y) in enumerate(batches):
            steps.before_step()
            outputs = qmodel(x)
            steps.loss(outputs, x, y, F.cross_entropy(outputs, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.after_step(epoch * len(batches) + number + 1)
        steps.before_validation()
        print(f"epoch {epoch + 1}: {accuracy(qmodel):.2f} %")
    print(steps.report())

    best = steps.best(accuracy)
    report = he.verify(
        best, he.export(best, f"{folder}/own_loop.xml"), loader(validation), float_model=model, timed=False
    )
    print(report)
    return report


if __name__ == "__main__":
    main()
