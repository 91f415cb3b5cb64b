"""Runs in JoeyNMT's own environment: `python joeynmt_driver.py JOB.json ...`.

Trains a tiny model for one update by JoeyNMT's own program, which saves it as JoeyNMT does, then loads it as JoeyNMT's
`translate` does and writes what it makes of the test set: the ids that it reads, logits for given targets, and what its
greedy search finds. The job says which configuration, and where.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from joeynmt.config import load_config, parse_global_args
from joeynmt.prediction import predict, prepare
from joeynmt.training import TrainManager


def train(config: Path) -> None:
    """One update of a model whose parameters have values that reveal mistakes."""
    args = parse_global_args(load_config(config.as_posix()), rank=0, mode="train")
    torch.manual_seed(args.seed)
    model, train_data, dev_data, _ = prepare(args, rank=0, mode="train")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if not args.model.get("tied_softmax", False):
            # Each token predicts another one, and some predict the end.
            rows = model.trg_embed.lut.weight
            model.decoder.output_layer.weight.copy_(rows[torch.randperm(len(rows))])
            model.decoder.output_layer.weight[model.eos_index] = rows[4:7].sum(dim=0)
    trainer = TrainManager(
        rank=0,
        model=model,
        model_dir=args.model_dir,
        device=args.device,
        n_gpu=0,
        autocast=args.autocast,
        seed=args.seed,
        train_args=args.train,
        dev_args=args.test,
    )
    trainer.train_and_validate(train_data=train_data, valid_data=dev_data)


@torch.no_grad()
def references(config: Path) -> dict:
    """The saved model's output for the test set."""
    args = parse_global_args(load_config(config.as_posix()), rank=0, mode="test")
    model, _, _, test_data = prepare(args, rank=0, mode="test")
    model.eval()
    _, _, texts, found, *_ = predict(model, test_data, args.device, 0, args=args.test, autocast=args.autocast)
    rows = []
    for number, tokens in enumerate(found):
        source = test_data.get_item(number, test_data.src_lang, is_train=False)
        ids = model.src_vocab.sentences_to_ids([source], bos=False)[0]
        target = [model.bos_index, *(model.trg_vocab.lookup(token) for token in tokens[:-1])]
        source_ids, target_ids = torch.tensor(ids), torch.tensor([target])
        mask = torch.ones(1, 1, source_ids.shape[1], dtype=torch.bool)
        memory, hidden, _, _ = model(return_type="encode", src=source_ids, src_length=None, src_mask=mask)
        logits, *_ = model(
            return_type="decode",
            trg_input=target_ids,
            encoder_output=memory,
            encoder_hidden=hidden,
            src_mask=mask,
            unroll_steps=None,
            trg_mask=torch.ones(1, 1, len(target), dtype=torch.bool),
        )
        row = {"pieces": source, "ids": ids[0], "target": target, "tokens": tokens, "text": texts[number]}
        rows.append({**row, "logits": logits[0].tolist()})
    return {"rows": rows, "source_vocabulary": model.src_vocab._itos, "target_vocabulary": model.trg_vocab._itos}


def main(job: Path) -> None:
    """Writes the configuration, the model, and the references beside the job."""
    folder = job.parent
    config = folder / "model" / "config.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(json.loads(job.read_text())), encoding="utf-8")
    train(config)
    (folder / "references.json").write_text(json.dumps(references(config)), encoding="utf-8")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(Path(path))
