"""Hugging Face: import of pretrained weights, export with `python -m model.hf export RUN FOLDER`, and `use_kernels`,
which puts a table of ops under a network of transformers.

transformers' GPT-2 has the same names as ours, but stores the weights of its four projections transposed (its Conv1D
multiplies from the left).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import reprlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from common import (
    BadInput,
    atomic_folder,
    exit_on_bad_input,
    exit_on_signal,
    lenient_streams,
    print0,
    refuse_if_occupied,
    write_errors,
)
from kernels.eager import LAYER_NORM_EPS
from kernels.ops import EAGER, Ops
from model import llmc
from model.gpt import GPT, GPTConfig
from model.stored import StoredTensor, safetensors, torch_tensors
from readers import integer, mapped, open_regular, read_json, refuse_beyond_memory, text

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import GPT2LMHeadModel

GPT2_VOCAB_SIZE, END_OF_TEXT = 50257, 50256
HUB_TIMEOUT_S = 10

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in older checkpoints

# Fields of transformers' GPT2Config with the values of our network; others would be another network.
_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# Other names of the sizes in transformers.
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
_SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", *_ALIASES)
_CONFIG_FIELDS = {"model_type": text(r"[\w.-]{1,80}")} | {f"{size}?": integer(1, 2**31 - 1) for size in _SIZES}

# Weight files; the first that exists is used. An index names the files that hold the tensors.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX_FIELDS = {"weight_map": mapped(text(r"\w[\w.-]*\.(safetensors|bin)"))}


def from_pretrained(name_or_folder: str, ops: Ops = EAGER) -> GPT:
    """A network with pretrained weights, in fp32 on the CPU.

    Reads the files without transformers, which could run code that comes with a model, or download code that its
    configuration names. Names and shapes are checked before a tensor is read or the network is built.

    Args:
        name_or_folder: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another name on the hub, or a local folder that
            `save_pretrained` wrote. Links in it are followed only if they are like those of the hub's cache.
        ops: the backend.

    Raises:
        BadInput: it cannot be loaded, is not a GPT-2 like ours, or a tensor is missing, unexpected or of another shape.
    """
    folder = Path(name_or_folder) if os.path.isdir(name_or_folder) else _download(name_or_folder)
    try:
        config = _our_config(read_json(_file(folder, "config.json"), _CONFIG_FIELDS), name_or_folder)
        with contextlib.ExitStack() as opened:
            tensors = _our_tensors(_stored_tensors(folder, opened), config, name_or_folder)
            refuse_beyond_memory(4 * config.num_params())
            gpt = GPT(config, ops, init=False)
            with torch.no_grad():
                for name, param in gpt.named_parameters():
                    param.copy_(_transposed(name, tensors[name].read()))
            head = tensors.get("lm_head.weight")
            if head and not torch.equal(head.read().float(), gpt.lm_head.weight):
                raise BadInput(
                    f"{name_or_folder}: lm_head.weight differs from transformer.wte.weight, and this network "
                    "has one tensor for both; name another model"
                )
    except (OSError, ValueError) as error:
        at = (
            f"{Path(error.filename or folder).name}: {error.strerror}"
            if isinstance(error, OSError)
            else _first_line(error)
        )
        raise BadInput(
            f"{name_or_folder}: cannot load this folder: {at}; save the model again, or name another"
        ) from error
    return gpt


def to_hf(gpt: GPT) -> GPT2LMHeadModel:
    """A copy of the network as transformers' GPT2LMHeadModel, in fp32 on the CPU, in eval mode.

    The ids of begin and end of text are 50256 if the vocabulary has GPT-2's size, otherwise None.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = gpt.config
    end_of_text = END_OF_TEXT if config.vocab_size == GPT2_VOCAB_SIZE else None
    their_config = GPT2Config(
        n_positions=config.block_size,
        vocab_size=config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    state = {}
    for name, tensor in gpt.state_dict().items():
        if name != "lm_head.weight":  # tied in transformers too
            tensor = _transposed(name, tensor.to("cpu", torch.float32))
            state[name] = tensor.clone(memory_format=torch.contiguous_format)
    # Not GPT2LMHeadModel(config), which would draw initial weights and advance torch's global random state.
    with _quiet():
        return GPT2LMHeadModel.from_pretrained(None, config=their_config, state_dict=state).eval()


def export(run: str | Path, folder: str | Path, vocabulary_files: tuple[Path, Path]) -> bool:
    """Write a folder that GPT2LMHeadModel.from_pretrained and AutoTokenizer.from_pretrained can load.

    Args:
        run: a run directory, or a model file of llm.c.
        folder: a new or empty folder. Its files appear together once all are complete.
        vocabulary_files: GPT-2's encoder.json and vocab.bpe.

    Returns:
        Whether a tokenizer was written: only if the vocabulary of the network has GPT-2's size.

    Raises:
        BadInput: the weights cannot be read, or the folder is not empty or cannot be written.
    """
    from safetensors import SafetensorError
    from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]  # made at run time

    refuse_if_occupied(Path(folder), "FOLDER")  # before the weights are read
    gpt = llmc.load_model(run)
    speaks_gpt2 = gpt.config.vocab_size == GPT2_VOCAB_SIZE
    try:
        with atomic_folder(folder, "FOLDER") as part, write_errors(folder), _quiet():
            to_hf(gpt).save_pretrained(part)
            if speaks_gpt2:
                # transformers has other names for the two files.
                for file, name in zip(vocabulary_files, ("vocab.json", "merges.txt"), strict=True):
                    shutil.copyfile(file, part / name)
                tokenizer = GPT2TokenizerFast.from_pretrained(part, model_max_length=gpt.config.block_size)
                tokenizer.save_pretrained(part)
    except SafetensorError as error:  # for example when the disk is full
        raise BadInput(f"cannot write {folder}: {error}; free some space or choose another place") from error
    return speaks_gpt2


def use_kernels(model: GPT2LMHeadModel, ops: Ops | None = None) -> None:
    """Run transformers' GPT-2 on this project's ops, in place: attention, LayerNorm, GELU, and in training the loss.

        model = GPT2LMHeadModel.from_pretrained("gpt2", attn_pdrop=0.0)
        use_kernels(model)  # before a Trainer, DDP or FSDP wraps it

    Parameters, state_dict, hooks, saving, generation and gradient checkpointing stay as they are. A second call
    replaces the table. `without_kernels` takes all back.

    Loss: in training, a call with labels computes the loss without logits, and the output's logits are None. With
    logits_to_keep=0 as well, it returns all logits and transformers' own loss, as calls in evaluation do. So does every
    call if the model has another loss_function, or its head has hooks.

    Attention: transformers' sdpa computes what the kernels cannot, and one warning for each kind of call says so:
    padding or another mask than the causal one, dropout in training (attn_pdrop, 0.1 by default), cross-attention,
    scores of another scale, a head_dim above 128, and several queries after a cache. Under torch.compile there are no
    such warnings, and transformers turns every attention_mask into a mask, also one without padding: pass none.

    Parts that stay as they are, with a warning: attention if attn_implementation is not sdpa, transformers' default;
    an activation other than tanh-GELU; LayerNorm if layer_norm_epsilon is not 1e-5; modules whose `forward` has been
    replaced; the loss of a subclass.

    Args:
        model: the model itself, on any device, not its wrapper.
        ops: the table; None for the kernels compiled for this machine's GPU.

    Raises:
        TypeError: it is not a GPT2LMHeadModel.
        ValueError: no table is given, and there is no GPU.
    """
    from model import hf_kernels  # imports transformers

    hf_kernels.install(model, ops)


def without_kernels(model: GPT2LMHeadModel) -> None:
    """Undo `use_kernels`, if it was called: results are bitwise identical to those before it."""
    from model import hf_kernels

    hf_kernels.remove(model)


def _transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """From their layout to ours, or back."""
    return tensor.t() if name.endswith(_TRANSPOSED) else tensor


def _download(name: str) -> Path:
    """The folder in the hub's cache with a model's configuration and weights, downloaded if the hub can be reached."""
    import huggingface_hub

    source = name if "/" in name else f"openai-community/{name}"
    why_not, files = None, set()
    try:
        # The hub's client retries for half a minute if the hub cannot be reached. So try one request first; if it
        # fails, only the cache is left.
        files = {file.rfilename for file in huggingface_hub.model_info(source, timeout=HUB_TIMEOUT_S).siblings or ()}
    except huggingface_hub.errors.RepositoryNotFoundError:
        why_not = "it has no model of that name, or not for you"
    except Exception as error:  # depends on the HTTP client
        why_not = _first_line(error)
    weights = next((file for file in _WEIGHTS if file in files), _WEIGHTS[0])
    shards = ["model-*.safetensors", "pytorch_model-*.bin"] if weights.endswith(".json") else []
    showed_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    huggingface_hub.utils.disable_progress_bars()
    try:
        patterns = ["config.json", weights, *shards]
        return Path(
            huggingface_hub.snapshot_download(source, allow_patterns=patterns, local_files_only=why_not is not None)
        )
    except Exception as error:
        raise BadInput(
            f"{name}: not to be had from Hugging Face's hub: {why_not or _first_line(error)}; name a local "
            "folder, or a preset such as d12, whose weights are random"
        ) from error
    finally:
        if showed_bars:
            huggingface_hub.utils.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:;")


def _file(folder: Path, name: str) -> Path:
    """Path of a file in a folder. In the hub's cache it is a link from `snapshots` into `blobs`, which is resolved."""
    path = folder / name
    target, snapshots = Path(os.path.realpath(path)), Path(os.path.realpath(folder)).parent
    return target if snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs" else path


def _stored_tensors(folder: Path, opened: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Tensors in the weight files of a folder, by their names there. The files stay open in `opened`."""
    weights = next((name for name in _WEIGHTS if os.path.lexists(folder / name)), None)
    if weights is None:
        raise ValueError(f"there is none of {', '.join(_WEIGHTS)}")
    names, kind = [weights], weights.removesuffix(".index.json").rpartition(".")[2]
    if weights.endswith(".json"):
        names = sorted(set(read_json(_file(folder, weights), _INDEX_FIELDS)["weight_map"].values()))
    tensors: dict[str, StoredTensor] = {}
    n_bytes = 0
    for name in names:
        file = opened.enter_context(open_regular(_file(folder, name)))
        n_bytes += os.fstat(file.fileno()).st_size
        try:
            found = safetensors(file) if kind == "safetensors" else torch_tensors(file)
            if not isinstance(found, dict) or not all(
                isinstance(key, str) and isinstance(tensor, StoredTensor) for key, tensor in found.items()
            ):
                raise ValueError("it holds something else than tensors by name")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{name}: {twice[0]} is in another file as well")
        tensors |= found
    for key, tensor in tensors.items():
        n_bytes -= tensor.nbytes if not key.endswith(("lm_head.weight", *_BUFFERS)) else 0
    if n_bytes < 0:
        raise ValueError("its tensors are larger than their files")
    return tensors


def _our_tensors(stored: dict[str, StoredTensor], config: GPTConfig, name: str) -> dict[str, StoredTensor]:
    """The tensors under our names, including `lm_head` if there is one.

    Raises:
        BadInput: tensors are missing, unexpected or of other shapes.
    """
    # Older files, and those of the network without its head, have no prefix.
    tensors = {
        key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}": tensor
        for key, tensor in stored.items()
        if not key.endswith(_BUFFERS)
    }
    shapes = {
        key: shape[::-1] if key.endswith(_TRANSPOSED) else shape for key, shape in llmc.tensor_shapes(config).items()
    }
    head = {"lm_head.weight": shapes["transformer.wte.weight"]}
    wrong = {
        "missing": shapes.keys() - tensors.keys(),
        "unexpected": tensors.keys() - shapes.keys() - head.keys(),
        "of another shape": [k for k, shape in (shapes | head).items() if k in tensors and tensors[k].shape != shape],
        "of a type that is not floating": [k for k, tensor in tensors.items() if not tensor.dtype.is_floating_point],
    }
    for what, keys in wrong.items():
        if keys:
            listed = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise BadInput(f"{name}: tensors {what}: {listed}; save the model again, or name another")
    return tensors


def _our_config(given: dict[str, Any], name: str) -> GPTConfig:
    fields = {_ALIASES.get(field, field): value for field, value in given.items()}
    if fields["model_type"] != "gpt2":
        raise BadInput(f"{name}: model_type is {fields['model_type']}, not gpt2; name a GPT-2")
    for field, allowed in _FIXED.items():
        value = fields.get(field, allowed[0])
        if value not in allowed:
            raise BadInput(
                f"{name}: {field} is {reprlib.repr(value)}, and this network has "
                f"{' or '.join(map(str, allowed))}; name another model"
            )
    default = GPTConfig()
    width = fields.get("n_embd", default.n_embd)
    if fields.get("n_inner") not in (None, 4 * width):
        raise BadInput(
            f"{name}: n_inner is {reprlib.repr(fields['n_inner'])}, and this network has 4·n_embd; name another model"
        )
    try:
        return GPTConfig(
            block_size=fields.get("n_positions", default.block_size),
            vocab_size=fields.get("vocab_size", default.vocab_size),
            n_layer=fields.get("n_layer", default.n_layer),
            n_head=fields.get("n_head", default.n_head),
            n_embd=width,
        )
    except ValueError as error:
        raise BadInput(f"{name}: {error}; name another model") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings and progress bars. We check what matters, and raise."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python -m model.hf --help")


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    lenient_streams()
    from data.tokenizer import vocabulary_files  # only the command line needs data/

    parser = _Parser(prog="model.hf", description="Write a run's weights for transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="Write a folder for GPT2LMHeadModel and AutoTokenizer.")
    command.add_argument("run", type=Path, metavar="RUN", help="A run directory, or a model file of llm.c.")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="A new folder.")
    with exit_on_bad_input("model.hf"), exit_on_signal("model.hf"):
        args = parser.parse_args(argv)
        has_tokenizer = export(args.run, args.folder, vocabulary_files())
        name = repr(str(args.folder))
        if has_tokenizer:
            print0(f"load it with GPT2LMHeadModel.from_pretrained({name}) and AutoTokenizer.from_pretrained({name})")
        else:
            print0(f"load it with GPT2LMHeadModel.from_pretrained({name})")
            print0("no tokenizer is written: the vocabulary of this network is not GPT-2's")


if __name__ == "__main__":
    main()
