"""Exports a model to ONNX (https://onnx.ai), as two graphs.

    to_onnx(model, "folder")
    encoder, decoder = (onnxruntime.InferenceSession(f"folder/{name}.onnx") for name in ("encoder", "decoder"))

These are the two programs of conversion/export.py, with the same names of inputs and outputs. docs/interoperability.md
shows a greedy search with them.
"""

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .export import DecoderProgram, EncoderProgram, export_programs


def to_onnx(model: VanillaTransformerForConditionalGeneration, folder: str | Path) -> None:
    """
    Writes `encoder.onnx` and `decoder.onnx` into a folder.

    Weights of more than 2 GB do not fit into an ONNX file. They are written beside it, to `encoder.onnx.data`.

    Args:
        model: on any device, in any dtype; the graphs are in float32. It is not changed.
        folder: the output folder, which is created if necessary. Files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = export_programs(model)
    _write(encoder, EncoderProgram, folder / "encoder.onnx")
    _write(decoder, DecoderProgram, folder / "decoder.onnx")


def _write(program: ExportedProgram, kind: type[EncoderProgram] | type[DecoderProgram], path: Path) -> None:
    with warnings.catch_warnings():
        # Several inputs share named sizes on purpose.
        warnings.filterwarnings("ignore", message=".*shares the same shape constraints")
        graph = torch.onnx.export(
            program,
            input_names=list(kind.INPUTS),
            output_names=kind.OUTPUTS,
            dynamic_shapes=kind.INPUTS,
            verbose=False,
        )
    assert graph is not None
    graph.save(path)
