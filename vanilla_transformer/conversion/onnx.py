"""For ONNX runtimes (https://onnx.ai): the network as two graphs.

    to_onnx(model, "folder")
    encoder, decoder = (onnxruntime.InferenceSession(f"folder/{name}.onnx") for name in ("encoder", "decoder"))

They are the two programs of conversion/export.py, whose inputs and outputs have their names there. A greedy search
with them is in docs/interoperability.md.
"""

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .export import DecoderProgram, EncoderProgram, export_programs


def to_onnx(model: VanillaTransformerForConditionalGeneration, folder: str | Path) -> None:
    """
    Writes `encoder.onnx` and `decoder.onnx` into a folder, which is made if need be.

    Weights of more than 2 GB, which do not fit into an ONNX file, stand beside it, in `encoder.onnx.data`.

    Args:
        model: on any device, in any dtype; the graphs are in float32. It stays as it is.
        folder: where to. Files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = export_programs(model)
    _write(encoder, EncoderProgram, folder / "encoder.onnx")
    _write(decoder, DecoderProgram, folder / "decoder.onnx")


def _write(program: ExportedProgram, kind: type[EncoderProgram] | type[DecoderProgram], path: Path) -> None:
    with warnings.catch_warnings():
        # Sizes of several inputs that have one name are what is wanted here.
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
