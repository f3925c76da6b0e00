"""Arguments of the command line that cannot be used: option by option, and what they say about model and data."""

WRONG = {
    "scheme": ["--quantization.scheme", "w5a33"],
    "model": ["--model.name", "faulty_net:Missing"],
    "weights": ["--model.weights", "missing.safetensors", "--pretraining.epochs", "0"],
    "left out": ["--quantization.leave-out", "no.such.layer"],
    "labels": ["--data.function", "faulty_net:labels_beyond"],
    "labels that are no integers": ["--data.function", "faulty_net:float_labels"],
    "images of float64": ["--data.function", "faulty_net:doubles"],
    "a data set that raises": ["--data.function", "faulty_net:raising"],
    "images of two sizes": ["--data.function", "faulty_net:sizes_differ"],
    "data": ["--data.function", "faulty_net:missing"],
}
OF_TRAINING = {
    "batch": ["--training.batch-size", "1000"],
    "a layer to distil": ["--qat.distill", "on", "--qat.distillation.features", "no.such.layer"],
    "smoothing and labels": ["--pretraining.batch-size", "1000"],
}
