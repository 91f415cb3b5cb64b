"""Training rows in memory whose text is transformed anew in each epoch (transforms.py)."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..settings.corpora import Corpus
from .encoding import WORDS, encode_pairs
from .epochs import SIDES_OF_IDS, Columns, EpochRows
from .languages import LANGUAGES
from .transforms import transform_batch


class TransformedRows(EpochRows):
    """
    Training rows whose text is transformed anew in each epoch, and then turned into ids.

    A row that would become too long keeps the ids that batches were planned with.

    Args:
        rows: the ids, with `source`, `target`, the columns of `prefix`, and the number of each row's `corpus`.
        tokenizer: the tokenizer of the rows.
        corpora: the corpora by number.
        seed: decides, with the epoch and the row's number, what is drawn.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, corpora: Sequence[Corpus], seed: int):
        super().__init__(rows)
        self.tokenizer, self.corpora, self.seed = tokenizer, list(corpora), seed

    def columns(self, numbers: list[int]) -> Columns:
        """The ids of these rows, and with BPE-dropout the lengths of their words."""
        columns = super().columns(numbers)
        words = [name for name in WORDS.values() if name in columns]
        found = {name: list(columns[name]) for name in (*SIDES_OF_IDS, *words)}
        for number, corpus in enumerate(self.corpora):
            if not corpus.transforms:
                continue
            places = [place for place, of in enumerate(columns["corpus"]) if of == number]
            texts = {name: [columns[name][place] for place in places] for name in ("source", "target", *corpus.columns)}
            languages = [columns[LANGUAGES[1]][place] for place in places] if LANGUAGES[1] in columns else None
            drawn = [numbers[place] for place in places]
            anew = encode_pairs(
                self.tokenizer,
                *transform_batch(corpus, texts, drawn, self.seed, self.epoch),
                corpus.data,
                with_words=bool(words),
                languages=languages,
            )
            limits = corpus.data.max_source_length, corpus.data.max_target_length
            for row, place in enumerate(places):
                if all(len(anew[side][row]) <= limit for side, limit in zip(SIDES_OF_IDS, limits, strict=True)):
                    for name, values in anew.items():
                        found[name][place] = values[row]
        return found
