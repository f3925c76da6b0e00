"""Quantization-aware training in Hugging Face's Trainer: `python examples/with_transformers.py`."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import halfeven as he
from halfeven.integrations.transformers import QATCallback
from halfeven.pipelines import setup_qat

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=16, num_labels=2,
)  # fmt: skip


def texts(count, seed):
    """Made-up texts of 12 tokens; the class says whether more tokens are above 25 than below."""
    ids = torch.randint(50, (count, 12), generator=torch.Generator().manual_seed(seed))
    labels = ((ids > 25).sum(1) > 6).long()
    mask = torch.ones_like(ids[0])
    return [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]


def fit(model, epochs, *callbacks):
    """Train a model, float or quantized, with the same Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=2e-3, use_cpu=True,
            eval_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, label_names=["labels"],  # what the Trainer would read from its own classes
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=texts(256, 0), eval_dataset=texts(64, 1), callbacks=list(callbacks)
        )
        trainer.train()


def main(folder="."):
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG)
    fit(model, 5)
    batch = torch.utils.data.default_collate(texts(64, 2))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # With labels in the example, it returns the loss as the float model does. 7 bits: for processors without VNNI too.
    qmodel = he.prepare(model.eval(), batch, scheme="w7a7")
    he.calibrate(qmodel, [inputs])
    callback = QATCallback(setup_qat(qmodel, model, [inputs]), qmodel)
    fit(qmodel, 1, callback)
    best = callback.best(lambda each: float((each(**inputs).logits.argmax(1) == batch["labels"]).float().mean()))
    path = he.export(best, f"{folder}/transformers.xml")
    report = he.verify(best, path, [inputs], timed=False)
    print(report)
    return report


if __name__ == "__main__":
    main()
