"""A saved folder loads as the same network in every way, and a damaged folder gives a clear error."""

import json

import pytest
import torch
from processes import execute, forked_ranks, run_code, run_new_python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
)


SOURCE, TARGET = torch.tensor([[5, 9, 33, 2]]), torch.tensor([[1, 17, 8]])


def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=SOURCE, decoder_input_ids=TARGET).logits


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model and the folder that it was saved in."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_a_folder_holds_weights_and_configurations_and_no_code(saved):
    _, folder = saved
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_auto_classes_load_the_same_network(saved):
    model, folder = saved
    assert type(AutoConfig.from_pretrained(folder)) is VanillaTransformerConfig
    whole = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(whole) is VanillaTransformerForConditionalGeneration
    assert torch.equal(logits_of(whole), logits_of(model))
    base = AutoModel.from_pretrained(folder)
    assert type(base) is VanillaTransformerModel
    expected = model.model(input_ids=SOURCE, decoder_input_ids=TARGET).last_hidden_state
    assert torch.equal(base.eval()(input_ids=SOURCE, decoder_input_ids=TARGET).last_hidden_state, expected)


def test_another_process_loads_the_same_network(saved, tmp_path):
    model, folder = saved
    program = (
        "import sys, torch, vanilla_transformer; from transformers import AutoModelForSeq2SeqLM;"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval();"
        "ids = torch.tensor([[5, 9, 33, 2]]), torch.tensor([[1, 17, 8]]);"
        "torch.save(model(input_ids=ids[0], decoder_input_ids=ids[1]).logits, sys.argv[2])"
    )
    run_code(program, folder, tmp_path / "logits.pt", cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model), atol=1e-6, rtol=1e-6)


def test_shards_load_as_one_network(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)), logits_of(model))


def test_a_half_precision_copy_loads_in_its_own_dtype(tiny_model, tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(reloaded), logits_of(model))


@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_stack_is_saved_and_loaded_alone(tiny_model, tmp_path, normalize_before):
    encoder = tiny_model(normalize_before=normalize_before).model.encoder
    encoder.save_pretrained(tmp_path)
    reloaded = type(encoder).from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(SOURCE).last_hidden_state, encoder(SOURCE).last_hidden_state)


class TestDamage:
    @pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
    def test_a_truncated_file_is_refused(self, saved, kept):
        _, folder = saved
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
        with pytest.raises(SafetensorError, match=r"header|incomplete|Header|buffer"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)

    def test_a_corrupted_header_is_refused(self, saved):
        _, folder = saved
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[8:40] = b"\xff" * 32
        file.write_bytes(data)
        with pytest.raises(SafetensorError, match="header"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)

    def test_weights_of_another_size_are_refused(self, saved):
        _, folder = saved
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_ffn_dim": 40}))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)

    def test_weights_that_are_missing_are_reported(self, saved):
        _, folder = saved
        state = load_file(folder / "model.safetensors")
        del state["model.decoder.layers.1.fc2.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        _, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
        assert set(info["missing_keys"]) == {"model.decoder.layers.1.fc2.weight"}

    def test_a_folder_without_configuration_is_refused(self, saved):
        _, folder = saved
        (folder / "config.json").unlink()
        with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)

    def test_a_folder_without_weights_is_refused(self, saved):
        _, folder = saved
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            AutoModelForSeq2SeqLM.from_pretrained(folder)


class TestResizing:
    @pytest.mark.parametrize("size", [70, 50])
    @pytest.mark.parametrize("tied", [True, False])
    def test_table_output_and_bias_change_together(self, tiny_model, tmp_path, size, tied):
        model = tiny_model(tie_word_embeddings=tied)
        before = logits_of(model)
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.config.decoder_vocab_size == size
        embeddings = {model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens}
        assert {table.weight.data_ptr() for table in embeddings} == {model.model.shared.weight.data_ptr()}
        assert (model.lm_head.weight is model.model.shared.weight) == tied
        assert model.model.shared.weight.shape == model.lm_head.weight.shape == (size, 16)
        assert model.lm_head.bias.shape == (size,)
        after = logits_of(model)
        kept = min(size, 61)
        torch.testing.assert_close(after[..., :kept], before[..., :kept])
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)), after)

    def test_the_base_model_resizes_too(self, tiny_model):
        model = tiny_model(VanillaTransformerModel)
        model.resize_token_embeddings(70)
        assert model.encoder.embed_tokens.num_embeddings == model.decoder.embed_tokens.num_embeddings == 70
        assert model.config.vocab_size == model.config.decoder_vocab_size == 70

    @pytest.mark.parametrize("model_class", [VanillaTransformerModel, VanillaTransformerForConditionalGeneration])
    def test_two_tables_are_not_resized_by_one_number(self, tiny_model, model_class):
        model = tiny_model(model_class, share_encoder_decoder_embeddings=False, decoder_vocab_size=53)
        with pytest.raises(ValueError, match="share_encoder_decoder_embeddings=True"):
            model.resize_token_embeddings(70)


# What each of two processes runs on the models in the folders that it is given.
TWO_RANKS = """
import sys, torch, vanilla_transformer
from transformers import AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

torch.distributed.init_process_group("gloo")
source, target = torch.tensor([[5, 9, 33, 2]]), torch.tensor([[1, 17, 8]])
for folder in sys.argv[1:]:
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, distributed_config=config).eval()
    outputs = model(input_ids=source, decoder_input_ids=target, labels=target)
    outputs.loss.backward()
    gradient = model.lm_head.weight.grad.full_tensor()
    found = [model.generate(source, num_beams=beams, max_length=12) for beams in (1, 3)]
    if torch.distributed.get_rank() == 0:
        torch.save((outputs.logits, gradient, found), f"{folder}.pt")
torch.distributed.destroy_process_group()
"""


class TestParallelPlans:
    @pytest.mark.parametrize("model_class", [VanillaTransformerModel, VanillaTransformerForConditionalGeneration])
    @pytest.mark.parametrize("plan", ["tp_plan", "fsdp_plan", "pp_plan"])
    def test_each_entry_names_a_module(self, tiny_model, model_class, plan):
        model = tiny_model(model_class)
        entries = getattr(model, plan)
        assert entries
        modules = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
        assert set(entries) <= modules

    def test_every_matrix_is_split_over_the_ranks(self, tiny_model):
        model = tiny_model()
        matrices = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Embedding")}
        assert {replace_layer_number_by_wildcard(name) for name in matrices} == set(model.tp_plan)

    def test_two_ranks_compute_what_one_computes(self, tiny_model, tmp_path):
        """Tensor parallelism over two processes on the CPU: logits, gradients and generated tokens."""
        models = {
            "shared": tiny_model(vocab_size=60),
            "separate": tiny_model(vocab_size=60, share_encoder_decoder_embeddings=False, d_kv=6, d_v=10),
        }
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
        forked_ranks(execute, TWO_RANKS, list(models), cwd=tmp_path)
        for name, model in models.items():
            logits, gradient, found = torch.load(tmp_path / f"{name}.pt")
            outputs = model(input_ids=SOURCE, decoder_input_ids=TARGET, labels=TARGET)
            outputs.loss.backward()
            torch.testing.assert_close(logits, outputs.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gradient, model.lm_head.weight.grad, atol=1e-5, rtol=1e-4)
            for beams, sequences in zip((1, 3), found, strict=True):
                assert torch.equal(sequences, model.generate(SOURCE, num_beams=beams, max_length=12))


def test_a_folder_with_code_loads_where_the_package_is_unknown(tiny_model, tmp_path):
    """`register_for_auto_class` puts the modules beside the weights, for users who have not installed the package."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    publish = (
        "import sys; from vanilla_transformer import *;"
        "VanillaTransformerConfig.register_for_auto_class();"
        "VanillaTransformerForConditionalGeneration.register_for_auto_class('AutoModelForSeq2SeqLM');"
        "VanillaTransformerForConditionalGeneration.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    run_code(publish, tmp_path / "plain", tmp_path / "published", cwd=tmp_path, check=True)
    modules = {f"{part}_vanilla_transformer.py" for part in ("configuration", "generation", "modeling")}
    modules |= {"decoding_call.py", "engine_packed.py", "loading.py", "network_loss.py", "scoring.py"}
    assert modules <= {file.name for file in (tmp_path / "published").iterdir()}
    load = (
        "import sys, torch; from transformers import AutoModelForSeq2SeqLM;"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval();"
        "assert 'vanilla_transformer' not in sys.modules;"
        "ids = torch.tensor([[5, 9, 33, 2]]), torch.tensor([[1, 17, 8]]);"
        "torch.save(model(input_ids=ids[0], decoder_input_ids=ids[1]).logits, sys.argv[2])"
    )
    run_new_python(load, tmp_path / "published", tmp_path / "logits.pt", cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model), atol=1e-6, rtol=1e-6)
