"""Quantization-aware training with Accelerate: `accelerate launch examples/with_accelerate.py`, or with python."""

import torch
from accelerate import Accelerator
from digits import accuracy, loader, train, trained, validation
from torch.nn import functional as F

import halfeven as he
from halfeven.integrations.session_steps import SessionSteps
from halfeven.pipelines import setup_qat

EPOCHS = 3


def main(folder="."):
    accelerator = Accelerator(cpu=True)
    model = trained()
    qmodel = he.prepare(model, next(iter(loader(train)))[0], scheme="w4a8")
    he.calibrate(qmodel, loader(train))
    steps = SessionSteps(setup_qat(qmodel, model, loader(train)), qmodel)
    optimizer = torch.optim.SGD(steps.parameter_groups(1e-2), momentum=0.9)
    wrapped, optimizer, batches = accelerator.prepare(qmodel, optimizer, loader(train, shuffle=True))
    steps.start(EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        wrapped.train()
        for x, y in batches:
            steps.before_step()
            outputs = wrapped(x)
            accelerator.backward(steps.loss(outputs, x, y, F.cross_entropy(outputs, y)))
            optimizer.step()
            optimizer.zero_grad()
            steps.after_step()
        steps.before_validation()
        accelerator.print(f"epoch {epoch + 1}: {accuracy(qmodel):.2f} %")

    best = steps.best(accuracy)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path = he.export(best, f"{folder}/accelerate.xml")
        report = he.verify(best, path, loader(validation), float_model=model, timed=False)
        print(report)
        return report
    return None


if __name__ == "__main__":
    main()
