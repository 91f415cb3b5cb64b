"""How errors are shown."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from vanilla_transformer import VanillaTransformerConfig
from vanilla_transformer.training.errors import UserError, message_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention_heads": 5}, "encoder_attention_heads=5 does not divide d_model=512: "),
        ({"d_model": "wide"}, "Field 'd_model' expected int, got str (value: 'wide')"),
    ],
)
def test_a_message_of_the_config_begins_with_the_field(fields, message):
    with pytest.raises(StrictDataclassError) as refused:
        VanillaTransformerConfig(**fields)
    assert str(refused.value).count("\n") == 1  # "... error for ...:", then the message
    assert message_of(refused.value).startswith(message)


def test_a_message_of_several_lines_is_joined():
    assert message_of(UserError("one\n  two")) == "one two"
