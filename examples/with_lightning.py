"""Quantization-aware training in Lightning's Trainer: `python examples/with_lightning.py`."""

import lightning
import torch
from digits import accuracy, loader, train, trained, validation
from torch.nn import functional as F

import halfeven as he
from halfeven.integrations.lightning import QATCallback
from halfeven.pipelines import setup_qat


class Classifier(lightning.LightningModule):
    def __init__(self, model, callback):
        super().__init__()
        self.model = model
        self.callback = callback

    def training_step(self, batch, number):
        x, y = batch
        outputs = self.model(x)
        return self.callback.loss(outputs, x, y, F.cross_entropy(outputs, y))

    def validation_step(self, batch, number):
        x, y = batch
        self.log("top1", 100 * (self.model(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.callback.parameter_groups(1e-2), momentum=0.9)


def main(folder="."):
    model = trained()
    qmodel = he.prepare(model, next(iter(loader(train)))[0], scheme="w4a8")
    he.calibrate(qmodel, loader(train))
    print(f"float {accuracy(model):.2f} %, calibrated {accuracy(qmodel):.2f} %")

    callback = QATCallback(setup_qat(qmodel, model, loader(train)), qmodel)
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(qmodel, callback), loader(train, shuffle=True), loader(validation))
    print(callback.report())

    best = callback.best(accuracy)
    path = he.export(best, f"{folder}/lightning.xml")
    report = he.verify(best, path, loader(validation), float_model=model, timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
