"""Hugging Face: pretrained weights in, `python -m model.hf export RUN FOLDER` out.

transformers' GPT-2 has the names of ours, but keeps the weights of its four projections transposed (its Conv1D
multiplies from the left).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from common import BadInput, atomic_folder, exit_on_bad_input, lenient_streams, refuse_if_occupied, write_errors
from kernels.ops import EAGER, Ops
from model import llmc
from model.gpt import GPT, GPTConfig

if TYPE_CHECKING:  # transformers takes seconds to import, and only those who call it pay
    from transformers import GPT2LMHeadModel, PretrainedConfig

GPT2_VOCAB_SIZE, END_OF_TEXT = 50257, 50256
HUB_TIMEOUT_S = 10

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older checkpoints carry

# What our network is, in the fields of transformers' GPT2Config; another value would be another network.
_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def from_pretrained(name_or_folder: str, ops: Ops = EAGER) -> GPT:
    """A network with pretrained weights, in fp32 on the CPU.

    Args:
        name_or_folder: gpt2, gpt2-medium, gpt2-large, gpt2-xl, another name on the hub, or a local folder that
            `save_pretrained` wrote.
        ops: the backend.

    Raises:
        BadInput: it cannot be had, is no GPT-2 like ours, or a tensor is missing, unexpected or of another shape.
    """
    from transformers import AutoConfig, GPT2LMHeadModel

    with _quiet():
        source, where, why_not = _locate(name_or_folder)
        config = _ask(lambda: AutoConfig.from_pretrained(source, **where), name_or_folder, why_not)
        gpt_config = _our_config(config, name_or_folder)
        theirs, report = _ask(
            lambda: GPT2LMHeadModel.from_pretrained(
                source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **where
            ),
            name_or_folder,
            why_not,
        )
    _refuse_differences(report, name_or_folder)

    weights = theirs.state_dict()
    # transformers leaves the two apart where a file has both and they differ, whatever its config says.
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise BadInput(
            f"--model {name_or_folder}: lm_head.weight differs from transformer.wte.weight, and this network has one "
            "tensor for both; name another model"
        )
    gpt = GPT(gpt_config, ops, init=False)
    gpt.load_state_dict({name: _transposed(name, weights[name]) for name in gpt.state_dict()})
    return gpt


def to_hf(gpt: GPT) -> GPT2LMHeadModel:
    """A copy of the network as transformers' GPT2LMHeadModel, in fp32 on the CPU, in eval mode.

    The ids of begin and end of text are 50256 where the vocabulary has GPT-2's size, and None otherwise.
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
        if name != "lm_head.weight":  # tied there as well
            tensor = _transposed(name, tensor.to("cpu", torch.float32))
            state[name] = tensor.clone(memory_format=torch.contiguous_format)
    # Not GPT2LMHeadModel(config), which would draw initial weights from torch's global random state.
    with _quiet():
        return GPT2LMHeadModel.from_pretrained(None, config=their_config, state_dict=state).eval()


def export(run: str | Path, folder: str | Path, vocabulary_files: tuple[Path, Path]) -> bool:
    """Write a folder that GPT2LMHeadModel.from_pretrained and AutoTokenizer.from_pretrained take as it is.

    Args:
        run: a run directory, or a model file of llm.c.
        folder: a place where nothing is, or an empty folder. Its files appear together once all are complete.
        vocabulary_files: GPT-2's encoder.json and vocab.bpe.

    Returns:
        True where the tokenizer is in it: the vocabulary of the network has GPT-2's size.

    Raises:
        BadInput: the weights cannot be read, or the folder holds something or cannot be written.
    """
    from safetensors import SafetensorError
    from transformers import GPT2TokenizerFast

    refuse_if_occupied(Path(folder), "FOLDER")  # before the weights are read
    gpt = llmc.load_model(run)
    speaks_gpt2 = gpt.config.vocab_size == GPT2_VOCAB_SIZE
    try:
        with atomic_folder(folder, "FOLDER") as part, write_errors(folder), _quiet():
            to_hf(gpt).save_pretrained(part)
            if speaks_gpt2:
                # transformers reads the two files under its own names for them.
                for file, name in zip(vocabulary_files, ("vocab.json", "merges.txt"), strict=True):
                    shutil.copyfile(file, part / name)
                tokenizer = GPT2TokenizerFast.from_pretrained(part, model_max_length=gpt.config.block_size)
                tokenizer.save_pretrained(part)
    except SafetensorError as error:  # how it reports a full disk
        raise BadInput(f"cannot write {folder}: {error}; free some space or choose another place") from error
    return speaks_gpt2


def _transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """From their layout to ours, or from ours to theirs."""
    return tensor.t() if name.endswith(_TRANSPOSED) else tensor


def _locate(name: str) -> tuple[str, dict[str, Any], str | None]:
    """What to ask transformers for, with which arguments, and why not from the hub (None: a folder, or it answered).

    transformers retries a hub that is out of reach for half a minute; one question first, and its own cache is all
    that is left to try.
    """
    import huggingface_hub

    if Path(name).is_dir():
        return name, {}, None
    source = name if "/" in name else f"openai-community/{name}"
    try:
        huggingface_hub.model_info(source, timeout=HUB_TIMEOUT_S)
        return source, {}, None
    except huggingface_hub.errors.RepositoryNotFoundError:
        reason = "it has no model of that name, or not for you"
    except Exception as error:  # whatever the HTTP client of the day raises
        reason = _first_line(error)
    return source, {"local_files_only": True}, reason


def _ask(load: Callable[[], Any], name: str, why_not: str | None) -> Any:
    """Call into transformers; what it cannot find or make sense of becomes one line."""
    try:
        return load()
    except Exception as error:  # broken files raise all sorts: JSON, pickle, safetensors, validation
        if Path(name).is_dir():
            raise BadInput(
                f"--model {name}: transformers cannot load this folder: {_first_line(error)}; save the model again, or "
                "name another"
            ) from error
        raise BadInput(
            f"--model {name}: not to be had from Hugging Face's hub: {why_not or _first_line(error)}; name a local "
            "folder, or start from random weights with --model d12"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:;")


def _our_config(config: PretrainedConfig, name: str) -> GPTConfig:
    if config.model_type != "gpt2":
        raise BadInput(f"--model {name}: model_type is {config.model_type}, not gpt2; name a GPT-2")
    for field, allowed in _FIXED.items():
        value = getattr(config, field)
        if value not in allowed:
            raise BadInput(
                f"--model {name}: {field} is {value}, and this network has {' or '.join(map(str, allowed))}; "
                "name another model"
            )
    if config.n_inner not in (None, 4 * config.n_embd):
        raise BadInput(
            f"--model {name}: n_inner is {config.n_inner}, and this network has 4·n_embd; name another model"
        )
    try:
        return GPTConfig(
            block_size=config.n_positions,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
        )
    except ValueError as error:
        raise BadInput(f"--model {name}: {error}; name another model") from error


def _refuse_differences(report: dict[str, Any], name: str) -> None:
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
    for kind, what in kinds.items():
        # A mismatched key comes with its two shapes.
        keys = sorted(key[0] if isinstance(key, tuple) else key for key in report[kind])
        keys = [key for key in keys if not key.endswith(_BUFFERS)]
        if keys:
            listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise BadInput(f"--model {name}: tensors {what}: {listed}; save the model again, or name another")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the screen; what matters of them is raised by name."""
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
    """The command line; see the module."""
    lenient_streams()
    from data.tokenizer import vocabulary_files  # only here: the rest of model/ knows nothing of data/

    parser = _Parser(prog="model.hf", description="Write a run's weights for transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="Write a folder for GPT2LMHeadModel and AutoTokenizer.")
    command.add_argument("run", type=Path, metavar="RUN", help="A run directory, or a model file of llm.c.")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="A new folder.")
    with exit_on_bad_input("model.hf"):
        args = parser.parse_args(argv)
        has_tokenizer = export(args.run, args.folder, vocabulary_files())
        name = repr(str(args.folder))
        if has_tokenizer:
            print(f"load it with GPT2LMHeadModel.from_pretrained({name}) and AutoTokenizer.from_pretrained({name})")
        else:
            print(f"load it with GPT2LMHeadModel.from_pretrained({name})")
            print("no tokenizer is written: the vocabulary of this network is not GPT-2's")


if __name__ == "__main__":
    main()
