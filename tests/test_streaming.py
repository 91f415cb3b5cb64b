"""Training rows from a stream: all of them, in bounded memory, for each process its own, resumable at any batch."""

import gzip
import json
import random
import re
import tracemalloc
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from processes import forked_ranks
from transformers import DataCollatorForSeq2Seq

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.data.streaming import StreamedBatches, open_stream
from vanilla_transformer.training.errors import DataError, RecipeError
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.settings.arguments import DataArguments, TrainingArguments
from vanilla_transformer.training.settings.corpora import Corpus
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer_commands.main import run as run_program


GENERATOR = random.Random(0)
WORDS = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]
# Each ends with its number, so that no two are equal.
TEXTS = [" ".join([*GENERATOR.choices(WORDS, k=GENERATOR.randint(1, 12)), str(number)]) for number in range(2000)]
PAIRS = list(zip(TEXTS[:1000], TEXTS[1000:], strict=True))
BUDGET = 120
# Between one pass over 1,000 rows and two, for one process; twice as many for two.
LENGTH = 200


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def files(tmp_path) -> dict[str, list[str]]:
    """The same rows in every form that is read."""
    rows = [{"source": source, "target": target} for source, target in PAIRS]
    texts = ["".join(f"{text}\n" for text in side) for side in zip(*PAIRS, strict=True)]
    for name, text in zip(("en", "de"), texts, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.csv").write_text("source,target\n" + "".join(f'"{a}","{b}"\n' for a, b in PAIRS), encoding="utf-8")
    (tmp_path / "a.tsv").write_text("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in PAIRS), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    translations = [{"translation": {"en": source, "de": target}} for source, target in PAIRS]
    (tmp_path / "hub").mkdir()
    for number in range(2):
        part = translations[500 * number : 500 * (number + 1)]
        Dataset.from_list(part).to_parquet(tmp_path / "hub" / f"train-{number}.parquet")
    Dataset.from_list(translations[:7]).to_parquet(tmp_path / "hub" / "validation-0.parquet")
    names = [["en", "de"], ["en.gz", "de.gz"], ["a.jsonl"], ["a.csv"], ["a.tsv"], ["a.parquet"]]
    return {name[-1]: [str(tmp_path / part) for part in name] for name in names} | {"hub": [str(tmp_path / "hub")]}


FORMS = ["de", "de.gz", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "hub"]


def arguments(names: list[str], **options) -> DataArguments:
    if names[0].endswith("hub"):
        return DataArguments(dataset=names[0], source_lang="en", target_lang="de", **options)
    return DataArguments(train_file=names, validation_file=names, **options)


def make(tokenizer, rows=None, length=LENGTH, shuffle_buffer=150, max_target_length=256, **options) -> StreamedBatches:
    data = DataArguments(shuffle_buffer=shuffle_buffer, max_target_length=max_target_length)
    return StreamedBatches(rows or open_rows(), tokenizer, Corpus("train", data), BUDGET, length=length, **options)


def open_rows(pairs=PAIRS) -> IterableDataset:
    return IterableDataset.from_generator(as_rows, gen_kwargs={"pairs": tuple(pairs)})


def as_rows(pairs):
    yield from ({"source": source, "target": target} for source, target in pairs)


def passes(batches: StreamedBatches, tokenizer) -> dict[int, list[tuple[str, str]]]:
    """The text of what each pass over the data yields."""
    found = defaultdict(list)
    for batch in batches:
        for row in batch["rows"]:
            texts = tokenizer.batch_decode([row["input_ids"], row["labels"]], skip_special_tokens=True)
            found[batch["position"]["epoch"]].append(tuple(texts))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_holds_the_rows_that_are_loaded_without_it(files, form):
    loaded = load_pairs(arguments(files[form]))["train"].to_list()
    assert list(open_stream(arguments(files[form], streaming=True))) == loaded
    assert list(open_stream(arguments(files[form], streaming=True, max_train_samples=9))) == loaded[:9]
    in_memory = load_pairs(arguments(files[form], streaming=True))
    assert set(in_memory) == {"validation"}


@pytest.mark.parametrize("form", ["de.gz", "hub"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_comes_once_in_a_pass_and_every_process_has_as_many_batches(files, form, processes, tokenizer):
    rows = open_stream(arguments(files[form], streaming=True))
    shares = [list(make(tokenizer, rows, num_processes=processes, process_index=index)) for index in range(processes)]
    assert {len(share) for share in shares} == {LENGTH}
    found = [passes(share, tokenizer) for share in shares]
    for number in range(2 if processes > 1 else 1):
        assert sorted(pair for share in found for pair in share[number]) == sorted(PAIRS)
    for batch in (batch for share in shares for batch in share):
        for side in ("input_ids", "labels"):
            assert len(batch["rows"]) * max(len(row[side]) for row in batch["rows"]) <= BUDGET


def test_batches_are_full_and_of_like_lengths(tokenizer):
    batches = list(islice(make(tokenizer, shuffle_buffer=1000), 100))
    used = sum(len(row[side]) for batch in batches for row in batch["rows"] for side in ("input_ids", "labels"))
    assert used / (2 * BUDGET * len(batches)) > 0.6
    in_order = [row for batch in batches for row in batch["rows"]]
    assert len({len(row["labels"]) for row in in_order[:30]}) > 1  # neither sorted nor in the order of the file


def test_the_seed_and_the_pass_decide_the_order_whatever_was_drawn_before(tokenizer):
    first = list(make(tokenizer, seed=3))
    torch.rand(7)
    assert list(make(tokenizer, seed=3)) == first
    assert list(make(tokenizer, seed=4)) != first
    orders = passes(make(tokenizer, length=300), tokenizer)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != PAIRS


@pytest.mark.parametrize("form", ["de.gz", "a.parquet", "hub"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_goes_on_after_any_batch(files, form, processes, tokenizer):
    def open_again():
        rows = open_stream(arguments(files[form], streaming=True))
        return make(tokenizer, rows, num_processes=processes, process_index=processes - 1)

    batches = list(open_again())
    # `datasets` may write the same place in other words after a resume.
    expected, positions = ([batch[name] for batch in batches] for name in ("rows", "position"))
    last_of_pool = next(i for i in range(30, LENGTH) if positions[i]["pool"] != positions[i + 1]["pool"])
    last_of_pass = next(i for i in range(LENGTH) if positions[i]["epoch"] != positions[i + 1]["epoch"])
    for taken in (1, last_of_pool, last_of_pool + 1, last_of_pass + 1, LENGTH - 3):
        resumed = open_again()
        # Each resumes where the one before it was.
        resumed.resume(json.loads(json.dumps(positions[taken - 1])), skipped=taken)
        found = list(resumed)
        assert found[:taken] == [None] * taken
        assert [batch["rows"] for batch in found[taken:]] == expected[taken:]
        positions[taken:] = [batch["position"] for batch in found[taken:]]


def test_no_more_than_two_pools_are_read_ahead(tokenizer):
    read = []

    def counted():
        for number, (source, target) in enumerate(PAIRS):
            read.append(number)
            yield {"source": source, "target": target}

    batches = make(tokenizer, IterableDataset.from_generator(counted), shuffle_buffer=50, length=120)
    for batch in batches:
        position = batch["position"]
        # The two, and the block that the generator of `datasets` has begun.
        assert len(read) <= 1000 * position["epoch"] + 50 * (position["pool"] + 2)
    assert position["pool"] > 10


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer):
    def peak(copies: int) -> int:
        for name, side in zip(("en", "de"), zip(*PAIRS, strict=True), strict=True):
            (tmp_path / name).write_text("".join(f"{text}\n" for text in side) * copies, encoding="utf-8")
        data = DataArguments(train_file=[str(tmp_path / "en"), str(tmp_path / "de")], streaming=True)
        batches = iter(make(tokenizer, open_stream(data), length=10**6, shuffle_buffer=500))
        tracemalloc.start()
        while next(batches)["position"]["epoch"] == 0:
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small = peak(1)
    assert peak(6) < 1.5 * small


def test_what_is_left_out_is_counted(tokenizer, caplog):
    pairs = [("ein", "eins"), ("zwei", " "), ("drei", "drei " * 30), ("vier", "vier")]
    batches = make(tokenizer, open_rows(pairs), length=3, max_target_length=20)
    with caplog.at_level("INFO", "vanilla_transformer.training.data.streaming"):
        assert set(passes(batches, tokenizer)[0]) == {pairs[0], pairs[3]}
    assert "of 4 rows left out: 1 for an empty side, 1 for more than max_target_length=20 tokens" in caplog.text


def lines(*texts: str | bytes) -> bytes:
    return b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts)


GOOD = '{"source": "ein", "target": "zwei"}'
BAD = {
    "bytes that are no text": (
        {"en": lines(*"abcd"), "de": lines("a", "b", b"\xf6", "d")}, r"de, line 3: byte 0xf6 is not UTF-8"
    ),
    "a target that ends early": ({"en": lines(*"abcd"), "de": lines(*"ab")}, r"en has 4 lines and \S*de has 2"),
    "a source that ends early": ({"en": lines(*"ab"), "de": lines(*"abcd")}, r"en has 2 lines and \S*de has 4"),
    "a damaged gzip": (
        {"en.gz": gzip.compress(lines(*"abcd"))[:-9], "de": lines(*"abcd")}, r"en.gz: the gzip file is damaged"
    ),
    "no JSON": ({"a.jsonl": lines(GOOD, GOOD, '{"source": ')}, r"a.jsonl, line 3: this is not JSON"),
    "JSON without a target": ({"a.jsonl": lines(GOOD, '{"source": "a"}')}, r"a.jsonl, line 2: the target is None"),
    "JSON of numbers": (
        {"a.jsonl": lines(GOOD, '{"source": "a", "target": 5}')}, r"a.jsonl, line 2: the target is 5, and must be text"
    ),
    "a CSV row that is too short": ({"a.csv": lines("source,target", "a,b", "c")}, r"a.csv, line 3: 1 value, under"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_in_the_middle_is_named_when_it_is_reached(mistake, tmp_path, tokenizer):
    contents, message = BAD[mistake]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    data = DataArguments(train_file=[str(tmp_path / name) for name in contents], streaming=True)
    with pytest.raises(DataError, match=message):
        list(make(tokenizer, open_stream(data)))
    if "gzip" not in mistake:
        assert next(iter(open_stream(data)))


def test_a_missing_text_in_parquet_is_named(tmp_path, tokenizer):
    Dataset.from_dict({"source": ["a", "b"], "target": ["c", None]}).to_parquet(tmp_path / "a.parquet")
    data = DataArguments(train_file=[str(tmp_path / "a.parquet")], streaming=True)
    with pytest.raises(DataError, match=r"a.parquet: the target is None, and must be text"):
        list(make(tokenizer, open_stream(data)))


def test_a_list_is_not_streamed(tmp_path):
    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    with pytest.raises(DataError, match=r"a.json: a list cannot be streamed"):
        open_stream(DataArguments(train_file=[str(tmp_path / "a.json")]))


@pytest.mark.parametrize(("pairs", "processes"), [([], 1), ([("", "a")], 1), ([("a", "b")], 2)])
def test_a_process_without_rows_ends_the_run(pairs, processes, tokenizer):
    rows = IterableDataset.from_generator(as_rows, gen_kwargs={"pairs": tuple(pairs)})
    with pytest.raises(DataError, match="no row to train on"):
        list(make(tokenizer, rows, num_processes=processes, process_index=processes - 1))


REFUSED = {
    "no length": ("max_steps=-1", {"max_steps": -1}),
    "batches of rows": ("train_sampling_strategy=random", {"train_sampling_strategy": "random"}),
    "evaluation by epoch": ("eval_strategy=epoch", {"eval_strategy": "epoch"}),
    "checkpoints by epoch": ("save_strategy=epoch", {"save_strategy": "epoch"}),
    "workers": ("dataloader_num_workers=2", {"dataloader_num_workers": 2}),
    "no skipping": ("ignore_data_skip=True", {"ignore_data_skip": True}),
    "the phrasebook": ("dataset=phrasebook:en-de", {"dataset": "phrasebook:en-de"}),
    "duplicates": ("drop_duplicates=True", {"drop_duplicates": True}),
    "dropout of merges": ("bpe_dropout=0.1", {"bpe_dropout": 0.1}),
    "rows that fit no batch": ("max_target_length=256", {"per_device_train_batch_tokens": 255, "max_source_length": 9}),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_a_stream_cannot_do_is_refused_by_name(mistake, tmp_path):
    message, changed = REFUSED[mistake]
    right = {"streaming": True, "max_steps": 10, "eval_strategy": "no", "save_strategy": "no"}
    right["load_best_model_at_end"] = False
    options = [f"--{name}={value}" for name, value in {**right, **changed, "output_dir": tmp_path}.items()]
    with pytest.raises(RecipeError, match=f"{re.escape(message)} does not go with streaming: "):
        parse_recipe(options)


def make_trainer(model, tokenizer, folder: Path, batches: StreamedBatches, **options) -> TranslationTrainer:
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", eval_strategy="no", save_strategy="steps", save_steps=4,
        load_best_model_at_end=False, learning_rate=0.01, warmup_steps=2, disable_tqdm=True, logging_steps=1,
        gradient_accumulation_steps=3, max_steps=10, save_total_limit=9, **options,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer)
    return TranslationTrainer(model=model, args=args, train_dataset=batches, data_collator=collator)


def test_a_run_that_resumes_in_a_pool_is_the_run_that_never_stopped(tiny_model, tokenizer, tmp_path):
    """Dropout included: bit-identical weights, and the same log."""
    ends, losses = [], []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        model = tiny_model(dropout=0.1, vocab_size=len(tokenizer))
        batches = make(tokenizer, length=30, shuffle_buffer=40)
        trainer = make_trainer(model, tokenizer, tmp_path / name, batches)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append(model.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    for weight, expected in zip(*(end.values() for end in ends), strict=True):
        assert torch.equal(weight, expected)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    position = json.loads((tmp_path / "whole" / "checkpoint-4" / "stream_0.json").read_text())
    assert position["batches"] > 0 < position["pool"]


def test_the_trainer_hands_on_every_batch_of_its_process_and_counts_its_tokens(tiny_model, tokenizer, tmp_path):
    expected = list(make(tokenizer, length=30, num_processes=2, process_index=1))
    batches = make(tokenizer, length=30, num_processes=2, process_index=1)
    trainer = make_trainer(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path, batches)
    loader = trainer.get_train_dataloader()
    assert len(loader) == 30
    iterator, found = iter(loader), []
    for start in range(0, 30, 3):
        micro, count = trainer.get_batch_samples(iterator, 3, torch.device("cpu"))
        rows = [row["labels"] for batch in expected[start : start + 3] for row in batch["rows"]]
        assert count == sum(map(len, rows))
        found += [batch["labels"] for batch in micro]
        assert all(set(batch) == {"input_ids", "attention_mask", "labels"} for batch in micro)
    for labels, batch in zip(found, expected, strict=True):
        assert [[token for token in row if token != -100] for row in labels.tolist()] == [
            row["labels"] for row in batch["rows"]
        ]


def test_another_number_of_processes_is_refused(tiny_model, tokenizer, tmp_path):
    trainer = make_trainer(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path, make(tokenizer))
    (tmp_path / "stream_0.json").write_text('{"processes": 2}')
    with pytest.raises(RecipeError, match="written by 2 streaming processes, but this run has 1"):
        trainer._resume(trainer.stream, str(tmp_path), 12)


RECIPE = """
streaming: true
train_file: [{folder}/train.en, {folder}/train.de]
validation_file: [{folder}/valid.en, {folder}/valid.de]
shuffle_buffer: 200
vocab_size: 320
d_model: 16
encoder_layers: 1
decoder_layers: 1
encoder_attention_heads: 2
decoder_attention_heads: 2
encoder_ffn_dim: 32
decoder_ffn_dim: 32
per_device_train_batch_tokens: 300
warmup_steps: 10
max_steps: 30
eval_strategy: steps
eval_steps: 15
save_strategy: steps
save_steps: 15
max_new_tokens: 8
output_dir: {folder}/run
"""


def test_two_processes_train_from_a_stream(tmp_path):
    for name, pairs in (("train", PAIRS), ("valid", PAIRS[:20])):
        for language, side in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (tmp_path / f"{name}.{language}").write_text("".join(f"{text}\n" for text in side), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    argv = [str(tmp_path / "recipe.yaml"), "--max_eval_samples", "20"]
    forked_ranks(run_program, "train", argv, CUDA_VISIBLE_DEVICES="")

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["updates"] == 30
    assert metrics["rows"] == {"validation": 20}
    assert (tmp_path / "run" / "README.md").exists()
    states = []
    for process in range(2):
        position = json.loads((tmp_path / "run" / "checkpoint-30" / f"stream_{process}.json").read_text())
        assert position["processes"] == 2
        states.append((position["epoch"], position["pool"], position["batches"]))
    assert all(state > (0, 0, 1) for state in states)
