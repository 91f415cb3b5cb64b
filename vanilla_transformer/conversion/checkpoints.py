"""Helpers that read the checkpoints of other frameworks: weights by name, without running code, and vocabularies.

Nothing in a file is executed, and nothing is guessed: a tensor that is missing, unused, or of the wrong shape is an
error that names it.
"""

import json
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import SinusoidalPositions, VanillaTransformerForConditionalGeneration
from ..tokenization_vanilla_transformer import VanillaTransformerTokenizer


# The bias of a token that can never be predicted. Its probability is exactly 0 in every floating-point type, and a loss
# with label smoothing stays finite.
NEVER = -1e4
# The score of a piece that sentencepiece lacks: every segmentation without it is preferred.
UNUSED = -1e4
# In the tokenizer's vocabulary, precedes a piece that only the target has. Texts do not contain this character (private
# use area), so no source is split into such a piece. Decoding removes it.
TARGET_ONLY = "\ue000"
# Models of transformers, by the `model_type` in config.json, with the files that they need besides weights.
OF_TRANSFORMERS = {
    "marian": ("config.json", "vocab.json", "source.spm", "target.spm"),
    "fsmt": ("config.json", "vocab-src.json", "vocab-tgt.json", "merges.txt"),
}
# Their JSON files, and for a vocabulary the field of config.json that holds its size.
SETTINGS = {
    **dict.fromkeys(("config.json", "generation_config.json", "tokenizer_config.json"), ""),
    **{"vocab.json": "vocab_size", "vocab-src.json": "src_vocab_size", "vocab-tgt.json": "tgt_vocab_size"},
}


def refuse_other_kind(source: str | Path, kind: str) -> None:
    """
    Checks the source of a conversion before another library fails on it with an obscure error.

    Args:
        source: the file or folder to convert.
        kind: its format: "marian", "fsmt", "joeynmt", "eole" or "torch".

    Raises:
        ValueError: it is a model of this package already, or another kind of transformers' models; it is a file instead
            of a folder, or the other way round; or a file of a transformers' folder is missing or damaged.
    """
    source = Path(source)
    if not source.is_dir():
        if kind not in ("torch", "joeynmt"):
            raise ValueError(f"{source} is a file: --format {kind} reads a folder")
        return
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    _refuse_other_model_type(source / "config.json", config.get("model_type"), kind)
    if kind == "torch":
        raise ValueError(f"{source} is a folder: --format torch reads one file, a state dict")
    needed = OF_TRANSFORMERS.get(kind, ())
    for name in needed:
        if not (source / name).is_file() or not (source / name).stat().st_size:
            raise ValueError(
                f"{name} in {source} is missing or empty: a folder of --format {kind} has {', '.join(needed)}"
            )
    if kind in OF_TRANSFORMERS:
        _refuse_damaged_files(source, config)


def _refuse_other_model_type(path: Path, model_type: Any, kind: str) -> None:
    if model_type == VanillaTransformerConfig.model_type:
        raise ValueError(
            f"{path} describes a model of this package: there is nothing to convert. AutoModelForSeq2SeqLM and "
            "`vanilla-transformer translate` load the folder as it is"
        )
    if model_type in OF_TRANSFORMERS and model_type != kind:
        raise ValueError(f"{path} has model_type={model_type!r}: give --format {model_type}")
    # Other frameworks' folders have no model_type. Those of transformers lack it only if config.json is missing.
    if model_type != kind and (model_type is not None or (kind in OF_TRANSFORMERS and path.is_file())):
        known = " and ".join(map(repr, OF_TRANSFORMERS))
        raise ValueError(f"{path} has model_type={model_type!r}: of transformers' models, {known} can be converted")


def _refuse_damaged_files(folder: Path, config: dict[str, Any]) -> None:
    """transformers would ignore a damaged `generation_config.json` and an empty vocabulary of FSMT."""
    for path in sorted(folder.glob("*.json")):
        if path.name in SETTINGS:
            entries = len(read_json(path))
            size = config.get(SETTINGS[path.name])
            if size is not None and not 0 < entries <= size:
                raise ValueError(f"{path} has {entries} tokens, but config.json has {SETTINGS[path.name]}={size}")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    Reads a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} contains {json.dumps(found)[:20]}, which is not an object")
    return found


def read_pickle(path: str | Path) -> Any:
    """
    Reads a file of `torch.save` that contains only tensors, numbers, strings and containers of them.

    Raises:
        ValueError: the file contains other objects, which only code could restore, or is damaged. No code has run.
        FileNotFoundError: there is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message is long, and advises to allow the code. One line of it may name the object.
        asked = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        raise ValueError(
            f"{path} contains more than weights, which only its own code could restore, or is not a checkpoint. It was "
            f"refused, and no code was run{f' ({asked[0]})' if asked else ''}"
        ) from None
    except (RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is damaged, or was not written by torch.save") from error


def read_safetensors(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of all files.

    Raises:
        ValueError: a file is damaged, or two files have a tensor of the same name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{path} contains the tensor {twice[0]}, which another file also contains")
        tensors |= found
    return tensors


class Weights:
    """
    A checkpoint's tensors, each of which is taken once.

    Args:
        tensors: the content of the checkpoint.
        origin: the name of the checkpoint in messages.

    Raises:
        ValueError: `tensors` is not a dictionary of tensors.
    """

    def __init__(self, tensors: Any, origin: str | Path):
        self.origin = origin
        if not isinstance(tensors, Mapping) or not tensors:
            raise ValueError(f"{origin} must be a dictionary of tensors, and is {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{origin} has {type(tensor).__name__} where a tensor should be, at {name}")
        self.tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor. It is an error if the tensor is missing."""
        self._refuse_missing(name)
        return self.tensors[name].shape

    def take(self, name: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """
        Removes a tensor of this shape and returns it.

        Raises:
            ValueError: it is missing, has another shape, or was quantised.
        """
        self._refuse_missing(name)
        tensor = self.tensors.pop(name)
        if shape is not None and tensor.shape != torch.Size(shape):
            raise ValueError(
                f"{self.origin}: {name} has shape {list(tensor.shape)}, but the configuration needs {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{self.origin}: {name} has dtype {tensor.dtype}: quantised weights cannot be converted")
        return tensor

    def take_one(self, *names: str) -> torch.Tensor:
        """
        A matrix that is stored under one or more of these names.

        Raises:
            ValueError: it is missing, or the copies differ.
        """
        present = [name for name in names if name in self] or [names[0]]
        first, *others = [self.take(name) for name in present]
        for name, other in zip(present[1:], others, strict=True):
            if not torch.equal(first, other):
                raise ValueError(
                    f"{self.origin}: {present[0]} and {name} differ, but the configuration says that they are shared"
                )
        return first

    def count(self, pattern: str) -> int:
        """The number of layers. `pattern` is the name of a tensor in each layer, with {} for the layer's number."""
        number = 0
        while pattern.format(number) in self:
            number += 1
        return number

    def refuse_left_over(self) -> None:
        """
        Raises:
            ValueError: some tensors were not used.
        """
        if self.tensors:
            names = sorted(self.tensors)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{self.origin} holds {', '.join(names[:5])}{more}, which its configuration does not use")

    def _refuse_missing(self, name: str) -> None:
        if name not in self:
            raise ValueError(f"{self.origin} lacks the tensor {name}")


@torch.no_grad()
def copy_modules(
    model: VanillaTransformerForConditionalGeneration,
    weights: Weights,
    modules: Mapping[str, str],
    has_bias: Callable[[str], bool] = lambda module: True,
) -> None:
    """
    Copies weights and biases of whole modules.

    Args:
        model: the model to copy to.
        weights: the checkpoint to copy from.
        modules: for each module of the model, by name, the name of the checkpoint's module.
        has_bias: whether the checkpoint's module of this name has a bias. If not, the model's bias becomes 0.

    Raises:
        ValueError: as in `Weights.take`.
    """
    for ours, theirs in modules.items():
        for kind, parameter in model.get_submodule(ours).named_parameters(recurse=False):
            if kind == "bias" and not has_bias(theirs):
                parameter.zero_()
            else:
                parameter.copy_(weights.take(f"{theirs}.{kind}", parameter.shape))


def layer_modules(stack: str, layers: int, names: Mapping[str, str], theirs: str) -> dict[str, str]:
    """
    The modules of all layers of a stack, for `copy_modules`.

    Args:
        stack: "encoder" or "decoder".
        layers: number of layers.
        names: for each module of our layer, by name, the name in the checkpoint's layer.
        theirs: the name of a layer in the checkpoint, with {} for its number.
    """
    return {
        f"model.{stack}.layers.{number}.{inner}": f"{theirs.format(number)}.{name}"
        for number in range(layers)
        for inner, name in names.items()
    }


def take_tables(
    weights: Weights, names: Sequence[str], shared: bool, tied: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Takes the embeddings of source and target and the output projection, `[V, d_model]` each.

    Args:
        weights: the checkpoint to take from.
        names: their three names. A shared matrix may be stored under any of its names.
        shared: whether source and target share a matrix.
        tied: whether target and output share a matrix.

    Raises:
        ValueError: as in `Weights.take_one`.
    """
    source, target, output = ([name] for name in names)
    if shared:
        source += target
        target = source
    if tied:
        target += output
        output = target
    first = weights.take_one(*source)
    second = first if shared else weights.take_one(*target)
    return first, second, second if tied else weights.take_one(*output)


@torch.no_grad()
def copy_tables(
    model: VanillaTransformerForConditionalGeneration,
    source: torch.Tensor,
    target: torch.Tensor,
    output: torch.Tensor,
    bias: torch.Tensor | None,
    joint: "JointVocabulary | None" = None,
) -> None:
    """
    Copies the embeddings, `[V, d_model]` for each side, and the output projection, with its bias, `[V]`, if it has one.

    Args:
        joint: the joint vocabulary, if the two sides differ. Default: the order of rows does not change.

    Raises:
        ValueError: a shape does not match the model's configuration.
    """
    if bias is None:
        bias = torch.zeros(len(output))
    if joint is not None:
        joint.refuse_other_sizes(source, target, output, bias)
        source, target = source[joint.source_rows], target[joint.target_rows]
        output, bias = joint.spread(output, 0.0), joint.spread(bias, NEVER)
    for name, parameter, table in (
        ("the source embeddings", model.get_input_embeddings().weight, source),
        ("the target embeddings", model.model.decoder.embed_tokens.weight, target),
        ("the output projection", model.lm_head.weight, output),
        ("the output bias", model.lm_head.bias, bias),
    ):
        if parameter.shape != table.shape:
            raise ValueError(
                f"{name} have shape {list(table.shape)}, but the configuration and the vocabulary need "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(table)


def refuse_other_positions(table: torch.Tensor, config: VanillaTransformerConfig, name: str) -> None:
    """
    Raises:
        ValueError: the position table, `[L, d_model]`, is not the paper's sinusoids, up to float32 rounding.
    """
    numbers = torch.arange(len(table))
    expected = SinusoidalPositions(config)(numbers[None], torch.float32)[0]
    # In single precision the angle of position 5000 has three correct decimals.
    if table.shape != expected.shape or not torch.allclose(table.float(), expected, atol=1e-2):
        raise ValueError(f"{name} does not contain the sinusoids that the configuration asks for")


class JointVocabulary(NamedTuple):
    """
    Joint ids for different source and target vocabularies: the source's tokens, then those that only the target has.

    A tokenizer has one vocabulary, so the model gets this one for both sides. The outputs do not change: in a source, a
    token that only the target has reads the embedding of the unknown token, as in the original framework; and a token
    that only the source has can never be predicted.
    """

    tokens: list[str]
    source_rows: torch.Tensor  # [V]: the row of each token in the source's table
    target_rows: torch.Tensor  # [V]: likewise in the target's table, or the unknown token's row
    in_target: torch.Tensor  # [V]: whether the target has it
    sizes: tuple[int, int]

    def spread(self, rows: torch.Tensor, absent: float) -> torch.Tensor:
        """A target's rows in the joint numbering, with `absent` for tokens that it lacks."""
        mask = self.in_target.view(-1, *[1] * (rows.dim() - 1))
        return rows[self.target_rows].masked_fill(~mask, absent)

    def refuse_other_sizes(self, source: torch.Tensor, *target: torch.Tensor) -> None:
        """
        Raises:
            ValueError: a table does not have as many rows as its vocabulary has tokens.
        """
        for side, size, tables in (("source", self.sizes[0], [source]), ("target", self.sizes[1], target)):
            for table in tables:
                if len(table) != size:
                    raise ValueError(f"the {side} vocabulary has {size} tokens, but its table has {len(table)} rows")


def join_vocabularies(source: list[str], target: list[str], unknown: str) -> JointVocabulary | None:
    """
    The vocabulary of both sides; None if they have the same one.

    Args:
        source: the token of each id. target: likewise.
        unknown: the unknown token, which has the same name on both sides.
    """
    if source == target:
        return None
    source_ids, target_ids = ({token: number for number, token in enumerate(side)} for side in (source, target))
    tokens = [*source, *(token for token in target if token not in source_ids)]
    return JointVocabulary(
        tokens,
        torch.tensor([source_ids.get(token, source_ids[unknown]) for token in tokens]),
        torch.tensor([target_ids.get(token, target_ids[unknown]) for token in tokens]),
        torch.tensor([token in target_ids for token in tokens]),
        (len(source), len(target)),
    )


def refuse_duplicates(tokens: list[str], name: str | Path) -> None:
    """
    Raises:
        ValueError: two ids have the same token.
    """
    for token, count in Counter(tokens).items():
        if count > 1:
            raise ValueError(f"{name} contains the token {token!r} {count} times")


def pack_tokenizer(tokenizer: Tokenizer, specials: Mapping[str, str], append_eos: bool) -> VanillaTransformerTokenizer:
    """
    Makes a tokenizer that `AutoTokenizer` can load. A special token of `specials` that occurs in a text is encoded as
    text.

    Args:
        tokenizer: splits text into tokens, and joins them.
        specials: the tokens of "unk_token", "pad_token", "bos_token" and "eos_token".
        append_eos: whether sources end with eos.
    """
    if append_eos:
        eos = specials["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials.values()])
    return VanillaTransformerTokenizer(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, split_special_tokens=True, **specials
    )


def word_tokenizer(tokens: list[str], unknown: str, joiner: str | None = None) -> Tokenizer:
    """
    Splits at spaces and looks words up.

    Args:
        tokens: the word of each id.
        unknown: the token for all other words.
        joiner: the end of a subword that the next one continues, such as "@@". Decoding joins them.
    """
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    spaced = decoders.Replace(Regex("$"), " ")
    joined = [decoders.Replace(f"{joiner} ", ""), decoders.Fuse()] if joiner else [decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([spaced, *joined, decoders.Strip(" ", 0, 1)])
    return tokenizer


def character_tokenizer(tokens: list[str], unknown: str, space: str) -> Tokenizer:
    """Looks characters up. `space` is the vocabulary's token for a space."""
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unknown))
    tokenizer.normalizer = normalizers.Replace(" ", space)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(space, " ")])
    return tokenizer


def read_sentencepiece(path: str | Path) -> Any:
    """
    A sentencepiece model, as protobuf reads it.

    Raises:
        ValueError: the file is not such a model.
        ImportError: protobuf is not installed.
    """
    # Imported here, because other conversions do not need it.
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    spm = import_protobuf().ModelProto()
    try:
        spm.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    return spm


def sentencepiece_tokenizer(path: str | Path, tokens: list[str], usable: list[str], unknown: str) -> Tokenizer:
    """
    Splits as a sentencepiece model does, and looks the pieces up in a vocabulary of another order.

    Args:
        path: the `.model` file.
        tokens: the piece of each id.
        usable: the source's pieces, into which a text may be split. sentencepiece calls them its vocabulary.
        unknown: the token for text without a piece.

    Raises:
        ValueError: the file is not such a model, or has a feature that `tokenizers` lacks. The message says which.
        ImportError: protobuf is not installed.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    spm = read_sentencepiece(path)
    kinds, types = type(spm).SentencePiece, type(spm.trainer_spec)
    if own := [piece.piece for piece in spm.pieces if piece.type == kinds.USER_DEFINED]:
        raise ValueError(f"{path} has user-defined pieces such as {own[0]!r}, which are not supported")
    to_bytes = spm.trainer_spec.byte_fallback
    scores = {piece.piece: piece.score for piece in spm.pieces if piece.type == kinds.NORMAL}
    model_type = spm.trainer_spec.model_type
    allowed = set(usable)
    tokens = [token if token in allowed else f"{TARGET_ONLY}{token}" for token in tokens]
    ids = {token: number for number, token in enumerate(tokens)}
    if model_type == types.UNIGRAM:
        tokenizer = Tokenizer(
            models.Unigram([(token, scores.get(token, UNUSED)) for token in tokens], ids[unknown], to_bytes)
        )
    elif model_type == types.BPE:
        if absent := sorted(scores.keys() - allowed):
            raise ValueError(
                f"{path} merges characters to {absent[0]!r}, which the vocabulary lacks: sentencepiece would split it "
                "again, which `tokenizers` does not support"
            )
        order = {piece.piece: number for number, piece in enumerate(spm.pieces)}
        merges = generate_merges(order, list(scores.items()))
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=to_bytes))
    else:
        raise ValueError(f"{path} is a sentencepiece model of another type than unigram and bpe")
    rules = spm.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    prepend = "always" if rules.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(TARGET_ONLY, ""), decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)]
    )
    return tokenizer
