"""Runs in Eole's own environment: `python eole_driver.py JOB.json ...`.

Trains a tiny model for one update by Eole's own program, which saves it as Eole does, then loads it as Eole's `predict`
does and writes what it makes of the test sentences: the ids that it reads, logits for given targets, and what its
greedy search finds. The job says which configuration, and where.
"""

import json
import sys
from pathlib import Path

import torch
from eole.config.run import PredictConfig, TrainConfig
from eole.inference_engine import InferenceEnginePY
from eole.train_single import main as train
from safetensors.torch import load_file, save_file


def enliven(folder: Path) -> None:
    """Weights with which each token predicts another one, if the output has its own matrix."""
    path = folder / "model" / "step_1" / "model.00.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith("weight"):
            tensor += 1
    if "generator.weight" in tensors:
        rows = tensors["tgt_emb.embeddings.weight"]
        tensors["generator.weight"] = 2 * rows[torch.randperm(len(rows))]
        tensors["generator.weight"][3] = rows[4:7].sum(dim=0)
    save_file(tensors, path)


def engine(folder: Path, new_tokens: int) -> InferenceEnginePY:
    """Eole's own, with its greedy search."""
    config = PredictConfig(
        model_path=str(folder / "model"),
        src="unused",
        beam_size=1,
        top_k=1,
        max_length=new_tokens,
        max_length_ratio=0,
        batch_size=8,
        world_size=0,
        gpu_ranks=[],
    )
    return InferenceEnginePY(config)


@torch.no_grad()
def references(folder: Path, job: dict) -> dict:
    """The saved model's output for the sentences."""
    whole, split = engine(folder, job["new_tokens"]), engine(folder, job["new_tokens"])
    split.transforms = {}
    model, vocabs, sentences = whole.predictor.model, whole.vocabs, job["sentences"]
    pieces = [whole.transform_pipe.apply({"src": sentence, "tgt": None})["src"] for sentence in sentences]
    pieces = [row if isinstance(row, list) else row.split(" ") for row in pieces]
    _, _, texts = whole.infer_list(sentences)
    _, _, found = split.infer_list([" ".join(row) for row in pieces])
    rows = []
    for row, text, tokens in zip(pieces, texts, found, strict=True):
        ids = vocabs["src"](row)
        start = vocabs["tgt"][vocabs["decoder_start_token"]]
        target = [start, 7, 5, 9, 11]
        # The model leaves the last target token out.
        states = model(torch.tensor([ids]), torch.tensor([[*target, start]]), torch.tensor([len(ids)])).dec_out
        logits = model.generator(states)[0].tolist()
        rows.append({"pieces": row, "ids": ids, "target": target, "text": text[0], "logits": logits})
        rows[-1]["tokens"] = tokens[0].split(" ") if tokens[0] else []
    return {
        "rows": rows,
        "source_vocabulary": vocabs["src"].ids_to_tokens,
        "target_vocabulary": vocabs["tgt"].ids_to_tokens,
    }


def main(path: Path) -> None:
    """Writes the model and the references beside the job."""
    job = json.loads(path.read_text(encoding="utf-8"))
    train(TrainConfig(**job["config"]), device_id=-1)
    enliven(path.parent)
    found = references(path.parent, job)
    (path.parent / "references.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
