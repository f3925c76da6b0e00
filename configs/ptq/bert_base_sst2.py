"""BERT-base on GLUE's SST-2, 8 bits for OpenVINO, without training.

    pip install 'halfeven[text]'
    halfeven ptq configs/ptq/bert_base_sst2.py --data.root SST-2

SST-2 is GLUE's folder with train.tsv and dev.tsv. The float model was trained on it and comes from transformers' hub;
`--model.name FOLDER --data.text.tokenizer FOLDER` takes one of yours, as `save_pretrained` wrote it. GLUE's other tasks
of classification need `--data.text.columns` and `--data.text.label-column`: for MRPC `'#1 String' '#2 String'` and
`Quality`. Of GLUE as a whole the white paper reports 83.06 in float, 82.43 with weights and activations of 8 bits.
"""

from halfeven.config import DataOptions, Experiment, ModelOptions, QuantizationOptions, TextOptions

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
)
