"""The cells of the comparison: network sizes for training, searches for translating. Imports no library, for --help."""

from typing import NamedTuple


class Cell(NamedTuple):
    """A network size: its recipe, and the number of updates of the warm-up and of a round."""

    recipe: list[str]
    warmup: int
    updates: int


# Random text: 64 sentences an update (on a GPU four times as many), each of 32 tokens on both sides.
SENTENCES, LENGTH, GPU_FACTOR = 64, 32, 4
RANDOM_TEXT = ["--vocab_size", "16000", "--per_device_train_batch_tokens", str(SENTENCES * LENGTH)]
CELLS = {
    # This budget makes updates of about 3,900 target tokens.
    "tiny": Cell(["multi30k_en_de_tiny.yaml", "--per_device_train_batch_tokens", "4608"], warmup=5, updates=10),
    "base": Cell(["wmt14_en_de_base.yaml", *RANDOM_TEXT], warmup=1, updates=2),
    "big": Cell(["wmt14_en_de_big.yaml", *RANDOM_TEXT], warmup=1, updates=2),
}
# For `decode`: the number of beams, and of sentences in a batch.
SEARCHES = {"1x1": (1, 1), "4x1": (4, 1), "4x16": (4, 16), "1x32": (1, 32), "4x64": (4, 64)}
# For --memory: other source lengths and beams, and only a few new tokens.
MEMORY_LENGTHS, MEMORY_BEAMS, MEMORY_BATCH, MEMORY_NEW_TOKENS = (32, 128, 512), (1, 4, 8), 8, 8
# With a test set, cells of batch 1 translate only the first sentences, and BLEU is computed in one cell.
SPEED_SENTENCES, BLEU_CELL = 100, "4x64"
