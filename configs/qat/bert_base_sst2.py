"""BERT-base on GLUE's SST-2, 8 bits for OpenVINO, three epochs of QAT.

    pip install 'halfeven[text]'
    halfeven train configs/qat/bert_base_sst2.py --data.root SST-2

SST-2 is GLUE's folder with train.tsv and dev.tsv. The float model was trained on it and comes from transformers' hub;
`--model.name FOLDER --data.text.tokenizer FOLDER` takes one of yours, as `save_pretrained` wrote it. Of GLUE as a whole
the white paper reports 83.06 in float, 83.26 with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TextOptions, TrainingOptions

experiment = Experiment(
    model=ModelOptions(
        source="transformers", name="textattack/bert-base-uncased-SST-2", weights="pretrained", num_classes=2
    ),
    data=DataOptions(
        source="texts",
        root="data/SST-2",
        text=TextOptions(tokenizer="textattack/bert-base-uncased-SST-2", max_length=128),
        calibration_samples=512,
        evaluation_batch_size=32,
        workers=2,
    ),
    quantization=QuantizationOptions(target="openvino", scheme="w8a8"),
    training=TrainingOptions(
        epochs=3,
        batch_size=32,
        optimizer="adamw",
        learning_rate=2e-5,
        weight_decay=0.0,
        clip_norm=1.0,
        base_batch_size=32,
    ),
)
