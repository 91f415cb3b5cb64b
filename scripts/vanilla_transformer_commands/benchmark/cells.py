"""What is compared: sizes of networks to train, and searches to translate by. Needs no library, as --help does."""

from typing import NamedTuple


class Cell(NamedTuple):
    """One size to compare at: a recipe, and how many updates warm a contender up and make a round."""

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
# `decode`: width of the beam and sentences that are translated together.
SEARCHES = {"1x1": (1, 1), "4x1": (4, 1), "4x16": (4, 16), "1x32": (1, 32), "4x64": (4, 64)}
# With --memory: other source lengths and beams, a few new tokens.
MEMORY_LENGTHS, MEMORY_BEAMS, MEMORY_BATCH, MEMORY_NEW_TOKENS = (32, 128, 512), (1, 4, 8), 8, 8
# Of a test set, cells of one sentence at a time translate only the first, and the largest cell has its BLEU measured.
SPEED_SENTENCES, BLEU_CELL = 100, "4x64"
