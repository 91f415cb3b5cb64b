"""Numbers in words."""

import pytest

from vanilla_transformer.training.words import counted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "row"), "0 rows"),
        ((1, "row"), "1 row"),
        ((2000, "row"), "2,000 rows"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
    ],
)
def test_a_noun_has_the_form_of_its_number(arguments, words):
    assert counted(*arguments) == words
