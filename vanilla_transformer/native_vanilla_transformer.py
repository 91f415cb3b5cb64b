"""`generate(compiled=True)`: greedy and beam search as one compiled program, native_vanilla_transformer.cpp.

In a small network a call of torch takes longer than the product that it is made for, and a step of a search is some
hundred calls. Here the encoder, the decoder's steps and the search are one call. The program is compiled at first use,
for this machine's instructions, and kept in the user's cache folder.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateEncoderDecoderOutput

from .inference_vanilla_transformer import PositionTable, scaled_query, weight_and_bias
from .search_vanilla_transformer import SearchJob, beam_outputs


SOURCE = Path(__file__).with_suffix(".cpp")
COMPUTE_TYPES = ("float32", "int8")
ACTIVATIONS = {"relu": 1, "silu": 2, "swish": 2, "gelu": 3}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp"]

# OpenMP's threads do not live on in a forked process, which would wait for them without end.
_PROCESS = os.getpid()

_INDEX, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _structure(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """Of fields as types and names, several names at a time."""
    return type(
        "Structure", (ctypes.Structure,), {"_fields_": [(n, kind) for kind, names in fields for n in names.split()]}
    )


# As in the program's source.
_Sizes = _structure(
    (_INDEX, "d_model vocabulary"),
    (_INDEX, "encoder_layers encoder_heads encoder_ffn decoder_layers decoder_heads decoder_ffn"),
    (_INDEX, "encoder_d_k encoder_d_v decoder_d_k decoder_d_v"),
    (_INDEX, "normalize_before int8 activation"),
    (_FLOAT, "eps encoder_scale decoder_scale"),
)
_Job = _structure(
    (_INDEX, "sentences threads"),
    (_POINTER, "source source_starts encoder_positions decoder_positions prefix"),
    (_INDEX, "prefix_length max_length min_length"),
    (_POINTER, "eos"),
    (_INDEX, "eos_count beams early_stopping"),
    (_POINTER, "length_penalties"),
    (_INDEX, "returned"),
    (_POINTER, "sequences scores lengths lineage"),
)


def refuse_impossible(compute_type: str, device: torch.device) -> None:
    """
    Raises:
        ValueError: there is no such program, or not for this machine.
    """
    if device.type != "cpu":
        raise ValueError(
            f"compiled=True is for CPUs, and this model is on {device}: take cache_implementation='static'"
        )
    if compute_type not in COMPUTE_TYPES:
        types = " or ".join(COMPUTE_TYPES)
        raise ValueError(f"compiled=True does not go with compute_type={compute_type!r}: the program knows {types}")
    if compute_type == "int8" and not torch.cpu._is_vnni_supported():
        raise ValueError("compiled=True with compute_type='int8' needs a CPU with AVX-512 VNNI: leave one of them out")


def instructions() -> list[str]:
    """What torch found this machine to have, as a compiler is told of it."""
    found = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
    vnni = ["-mavx512vnni"] if torch.cpu._is_vnni_supported() else []
    return found.get(torch.backends.cpu.get_cpu_capability(), []) + vnni


@cache
def library() -> ctypes.CDLL:
    """
    The compiled program.

    Raises:
        ValueError: it cannot be compiled here.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, *FLAGS, *instructions(), "-c"]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vanilla_transformer"
    try:
        file = folder / f"{hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]}.so"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Beside, then renamed: other processes may be doing the same.
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                _run([*command, str(SOURCE), "-o", f"{beside}/program.o"])
                # Without a library of OpenMP: torch has brought its own, with its threads.
                _run([*compiler, "-shared", f"{beside}/program.o", "-o", f"{beside}/program.so"])
                os.replace(f"{beside}/program.so", file)
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise ValueError(
            f"compiled=True needs GCC (g++, or what CXX names; clang's OpenMP is not torch's) and {SOURCE.name}, which "
            f"the installed package has beside its code: {error}"
        ) from error
    loaded.vt_create.restype = _POINTER
    loaded.vt_create.argtypes = [_POINTER, _POINTER]
    loaded.vt_destroy.argtypes = [_POINTER]
    loaded.vt_search.argtypes = [_POINTER, _POINTER]
    return loaded


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"compiled=True: {command[0]} failed; set CXX to a GCC that knows C++20\n{done.stderr[-2000:]}".rstrip()
        )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeTransformer:
    """A model's weights as the program reads them."""

    def __init__(self, model: Any, compute_type: str):
        encoder, decoder = model.model.encoder, model.model.decoder
        sizes: dict[str, Any] = {
            "d_model": model.config.d_model,
            "vocabulary": model.config.decoder_vocab_size,
            "normalize_before": model.config.normalize_before,
            "eps": model.config.layer_norm_eps,
            "int8": compute_type == "int8",
            "activation": ACTIVATIONS[model.config.activation_function],
        }
        weights: list[Any] = []  # in the order in which the program takes them; a norm that is none is two None

        def add(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
            for together in zip(*pairs, strict=True):
                weights.append(torch.cat(together))

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
            for layer in stack.layers:
                add_layer(layer)
                if stack is decoder:
                    add(scaled_query(layer.encoder_attn))
                    add(weight_and_bias(layer.encoder_attn.out_proj))
                    add_norm(layer.encoder_attn_layer_norm)
            add_norm(stack.layer_norm)
        cross = [layer.encoder_attn for layer in decoder.layers]
        add(*(weight_and_bias(linear) for each in cross for linear in (each.k_proj, each.v_proj)))
        add(weight_and_bias(model.lm_head))
        weights += [encoder.embed_tokens.weight, decoder.embed_tokens.weight]
        weights = [each if each is None else each.detach().float().contiguous() for each in weights]
        self.embeddings = weights[-2:]  # the program reads these where they are
        pointers = (_POINTER * len(weights))(*map(_address, weights))
        self.encoder_positions, self.decoder_positions = PositionTable(encoder), PositionTable(decoder)
        self.library = library()
        self.network = self.library.vt_create(ctypes.byref(_Sizes(**sizes)), pointers)

    def __del__(self) -> None:
        if hasattr(self, "network"):
            self.library.vt_destroy(self.network)

    @staticmethod
    def can_search(model: Any, job: SearchJob) -> bool:
        """Whether the program knows all that is asked for."""
        config = job.config
        learned = model.config.position_embedding_type == "learned"
        return (
            model.config.activation_function in ACTIVATIONS
            and job.may_leave
            and job.minimum_length is not None
            and (config.num_beam_groups or 1) == 1
            and job.options.coverage_penalty == 0.0
            and (job.prefix_mask is None or bool(job.prefix_mask.all()))
            and not (learned and config.max_length > model.config.max_position_embeddings)
        )

    def search(self, job: SearchJob) -> Any:
        """What `search_beams` or `search_rows` returns."""
        config, ids, mask = job.config, job.source, job.source_mask
        sentences, prefix_length = job.input_ids.shape
        beams, returned = (config.num_beams, config.num_return_sequences) if config.num_beams > 1 else (0, 1)
        new_tokens = config.max_length - prefix_length
        if mask is None:
            lengths = torch.full((sentences,), ids.shape[1])
        else:
            lengths, ids = mask.bool().sum(dim=1), ids[mask.bool()]
        ids, prefix = ids.long().contiguous(), job.input_ids.long().contiguous()
        _refuse_unknown_ids("input_ids", ids, len(self.embeddings[0]))
        _refuse_unknown_ids("decoder_input_ids", prefix, len(self.embeddings[1]))
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
        early_stopping = {False: 0, True: 1, "never": 2 if config.length_penalty > 0.0 else 0}[config.early_stopping]
        penalties = [1.0, *(job.options.length_penalty(n + 1, config.length_penalty) for n in range(new_tokens))]
        eos = config._eos_token_tensor
        sequences = ids.new_full((sentences, returned, config.max_length), job.fill)
        scores = torch.empty(sentences, returned)
        told_lengths = ids.new_empty(sentences, returned)
        lineage = torch.full((sentences, returned, new_tokens), -1, dtype=torch.int32)
        inputs = {
            "source": ids,
            "source_starts": starts,
            "encoder_positions": self.encoder_positions.upto(int(lengths.max()) - 1),
            "decoder_positions": self.decoder_positions.upto(config.max_length - 1),
            "prefix": prefix,
            "eos": eos,
            "length_penalties": torch.tensor(penalties),
            "sequences": sequences,
            "scores": scores,
            "lengths": told_lengths,
            "lineage": lineage,
        }
        native = _Job(
            sentences=sentences,
            threads=torch.get_num_threads() if os.getpid() == _PROCESS else 1,
            prefix_length=prefix_length,
            max_length=config.max_length,
            min_length=job.minimum_length,
            eos_count=0 if eos is None else len(eos),
            beams=beams,
            early_stopping=early_stopping,
            returned=returned,
            **{name: _address(tensor) for name, tensor in inputs.items()},
        )
        self.library.vt_search(self.network, ctypes.byref(native))
        if beams:
            return beam_outputs(job, sequences, scores, told_lengths, lineage)
        sequences = sequences[:, 0, : int(told_lengths.max())]
        return GenerateEncoderDecoderOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def _refuse_unknown_ids(name: str, ids: torch.Tensor, vocabulary: int) -> None:
    """The program would read beside its table."""
    for extreme in (int(ids.min()), int(ids.max())) if ids.numel() else ():
        if not 0 <= extreme < vocabulary:
            raise IndexError(f"{name} holds the id {extreme}; ids go from 0 to {vocabulary - 1}")
