"""Quantization-aware training in your own loop: `python examples/own_loop.py`."""

import torch
from digits import accuracy, loader, train, trained, validation
from torch.nn import functional as F

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat

EPOCHS = 3


def main(folder="."):
    model = trained()
    batches = loader(train, shuffle=True)
    qmodel = he.prepare(model, next(iter(batches))[0], scheme="w4a8")
    he.calibrate(qmodel, loader(train))
    print(f"float {accuracy(model):.2f} %, calibrated {accuracy(qmodel):.2f} %")

    steps = SessionSteps(setup_qat(qmodel, model, loader(train)), qmodel)
    steps.start(EPOCHS * len(batches))
    optimizer = torch.optim.SGD(steps.parameter_groups(1e-2), momentum=0.9)
    for epoch in range(EPOCHS):
        qmodel.train()
        for x, y in batches:
            steps.before_step()
            outputs = qmodel(x)
            steps.loss(outputs, x, y, F.cross_entropy(outputs, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.after_step()
        steps.before_validation()
        print(f"epoch {epoch + 1}: {accuracy(qmodel):.2f} %")
    print(steps.report())

    best = steps.best(accuracy)
    path = he.export(best, f"{folder}/own_loop.xml")
    report = he.verify(best, path, loader(validation), float_model=model, timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
