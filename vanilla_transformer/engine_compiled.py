"""Greedy and beam search as one compiled program, engine_compiled.cpp: the fastest engine on a CPU.

In a small network a call of torch takes longer than the product that it computes, and a step of a search needs about a
hundred calls. Here the encoder, the decoder's steps and the search are one call.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.generation import GenerateEncoderDecoderOutput

from .decoding_beams import beam_outputs
from .decoding_job import SearchJob
from .engine_packed import PositionTable, scaled_query, weight_and_bias
from .engine_program import Job, Sizes, Weight, load


COMPUTE_TYPES = ("float32", "int8")
# By the class of the layers' modules, because they may have been replaced by others than the config names.
ACTIVATIONS = {type(ACT2FN[name]): number for name, number in {"relu": 1, "silu": 2, "swish": 2, "gelu": 3}.items()}

_INTERPRETER = {
    "release_interpreter": ctypes.pythonapi.PyEval_SaveThread,
    "take_interpreter": ctypes.pythonapi.PyEval_RestoreThread,
    "check_signals": ctypes.pythonapi.PyErr_CheckSignals,
}
# What the program's functions return.
_DONE, _INTERRUPTED, _NO_MEMORY, _NO_THREAD, _OUT_OF_RANGE = range(5)


def _raise(outcome: int, message: str) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("generate(): there is not enough memory for this model and batch; use a smaller batch")
    if outcome == _NO_THREAD:
        raise RuntimeError(f"generate(): cannot start a thread ({message}): torch.set_num_threads(1) avoids threads")
    if outcome == _OUT_OF_RANGE:
        raise IndexError(message)
    raise RuntimeError(f"generate(): the compiled program rejected its input: {message}")


class CompiledTransformer:
    """A model's weights, laid out as the program reads them."""

    def __init__(self, model: Any, compute_type: str):
        """
        Raises:
            ProgramError: the program cannot be compiled here.
            MemoryError: there is no memory for a second copy of the weights.
        """
        encoder, decoder = model.model.encoder, model.model.decoder
        sizes: dict[str, Any] = {
            "d_model": model.config.d_model,
            "source_vocabulary": model.config.vocab_size,
            "vocabulary": model.config.decoder_vocab_size,
            "normalize_before": model.config.normalize_before,
            "eps": model.config.layer_norm_eps,
            "int8": compute_type == "int8",
            "activation": ACTIVATIONS[type(decoder.layers[0].activation_fn)],
        }
        for name, stack in (("encoder", encoder), ("decoder", decoder)):
            first = stack.layers[0]
            sizes |= {
                f"{name}_layers": len(stack.layers),
                f"{name}_heads": first.self_attn.q_proj.out_features // first.self_attn.d_k,
                f"{name}_ffn": first.fc1.out_features,
                f"{name}_d_k": first.self_attn.d_k,
                f"{name}_d_v": first.self_attn.d_v,
                f"{name}_scale": stack.embed_scale,
            }
        weights = [each if each is None else each.detach().float().contiguous() for each in _weights_in_order(model)]
        self.embeddings = weights[-2:]  # the program reads these where they are
        counted = (Weight * len(weights))(
            *(Weight(None, 0) if each is None else Weight(each.data_ptr(), each.numel()) for each in weights)
        )
        self.vocabulary = model.config.decoder_vocab_size
        self.encoder_positions, self.decoder_positions = PositionTable(encoder), PositionTable(decoder)
        self.library, self.network = load(), ctypes.c_void_p()
        outcome = self.library.vt_create(
            ctypes.byref(Sizes(**sizes)), counted, len(weights), ctypes.byref(self.network)
        )
        if outcome != _DONE:
            _raise(outcome, self.library.vt_message().decode())

    def __del__(self) -> None:
        if hasattr(self, "network"):
            self.library.vt_destroy(self.network)

    def search(self, job: SearchJob) -> Any:
        """
        Returns what `search_beams` or `search_rows` returns. Other Python threads run meanwhile, and may search too.

        Raises:
            IndexError: an id is outside the vocabulary.
            KeyboardInterrupt: the user pressed Ctrl-C.
            MemoryError: the batch does not fit into memory.
            RuntimeError: a thread cannot be started.
        """
        config = job.config
        sentences, prefix_length = job.input_ids.shape
        beams, returned = (config.num_beams, config.num_return_sequences) if config.num_beams > 1 else (0, 1)
        given, found = self._given(job), _places(job, returned)
        native = Job(
            sentences=sentences,
            threads=torch.get_num_threads(),
            encoder_position_count=len(given["encoder_positions"]),
            decoder_position_count=len(given["decoder_positions"]),
            prefix_length=prefix_length,
            max_length=config.max_length,
            min_length=job.minimum_length,
            eos_count=len(given["eos"]),
            beams=beams,
            early_stopping={False: 0, True: 1, "never": 2 if config.length_penalty > 0.0 else 0}[config.early_stopping],
            returned=returned,
            **{name: tensor.data_ptr() for name, tensor in (given | found).items()},
            **{name: ctypes.cast(function, ctypes.c_void_p) for name, function in _INTERPRETER.items()},
        )
        # A KeyboardInterrupt is raised here.
        outcome = self.library.vt_search(self.network, ctypes.byref(native))
        if outcome != _DONE:
            _raise(outcome, self.library.vt_message().decode())
        if beams:
            return beam_outputs(job, found["sequences"], found["scores"], found["lengths"], found["lineage"])
        sequences = found["sequences"][:, 0, : int(found["lengths"].max())]
        return GenerateEncoderDecoderOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    def _given(self, job: SearchJob) -> dict[str, torch.Tensor]:
        """The inputs of the program: sources without padding, prefixes, positions, penalties, end-of-sentence ids."""
        config, ids, mask = job.config, job.source, job.source_mask
        if mask is None:
            lengths = ids.new_full((len(ids),), ids.shape[1], dtype=torch.long)
        else:
            lengths, ids = mask.bool().sum(dim=1), ids[mask.bool()]
        new_tokens = config.max_length - job.input_ids.shape[1]
        penalties = [1.0, *(job.options.length_penalty(n + 1, config.length_penalty) for n in range(new_tokens))]
        # An id outside the vocabulary, such as -1 for outputs that never end, is never predicted.
        eos = config._eos_token_tensor
        eos = ids.new_empty(0) if eos is None else eos[(eos >= 0) & (eos < self.vocabulary)]
        given = {
            "source": ids.long(),
            "source_starts": torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)]),
            "encoder_positions": self.encoder_positions.upto(int(lengths.max()) - 1),
            "decoder_positions": self.decoder_positions.upto(config.max_length - 1),
            "prefix": job.input_ids.long(),
            "eos": eos.long(),
            "length_penalties": ids.new_tensor(penalties, dtype=torch.float32),
        }
        return {name: tensor.contiguous() for name, tensor in given.items()}


def _places(job: SearchJob, returned: int) -> dict[str, torch.Tensor]:
    """The buffers for the program's results: `returned` outputs of each sentence."""
    ids, longest = job.input_ids, job.config.max_length
    sentences, prefix_length = ids.shape
    return {
        "sequences": ids.new_full((sentences, returned, longest), job.fill, dtype=torch.long),
        "scores": ids.new_empty(sentences, returned, dtype=torch.float32),
        "lengths": ids.new_empty(sentences, returned, dtype=torch.long),
        "lineage": ids.new_full((sentences, returned, longest - prefix_length), -1, dtype=torch.int32),
    }


def _weights_in_order(model: Any) -> Sequence[torch.Tensor | None]:
    """All matrices and vectors, in the order that the program expects. An absent norm adds two None."""
    encoder, decoder = model.model.encoder, model.model.decoder
    weights: list[torch.Tensor | None] = []

    def add(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        for parts in zip(*pairs, strict=True):
            weights.append(torch.cat(parts))

    def add_norm(norm: Any) -> None:
        weights.extend([None, None] if isinstance(norm, nn.Identity) else [norm.weight, norm.bias])

    def add_layer(layer: Any) -> None:
        attention = layer.self_attn
        add(scaled_query(attention))
        add(weight_and_bias(attention.k_proj), weight_and_bias(attention.v_proj))
        add(weight_and_bias(attention.out_proj))
        add_norm(layer.self_attn_layer_norm)
        add(weight_and_bias(layer.fc1))
        add(weight_and_bias(layer.fc2))
        add_norm(layer.final_layer_norm)

    for layer in encoder.layers:
        add_layer(layer)
    add_norm(encoder.layer_norm)
    for layer in decoder.layers:
        add_layer(layer)
        add(scaled_query(layer.encoder_attn))
        add(weight_and_bias(layer.encoder_attn.out_proj))
        add_norm(layer.encoder_attn_layer_norm)
    add_norm(decoder.layer_norm)
    cross = [layer.encoder_attn for layer in decoder.layers]
    add(*(weight_and_bias(linear) for each in cross for linear in (each.k_proj, each.v_proj)))
    add(weight_and_bias(model.lm_head))
    return [*weights, encoder.embed_tokens.weight, decoder.embed_tokens.weight]
