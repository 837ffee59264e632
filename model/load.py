"""Load a network by a name or path."""

import os
from pathlib import Path

from common import BadInput
from kernels.ops import EAGER, Ops
from model import hf, llmc
from model.gpt import GPT, PRESETS

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def load(model: str, ops: Ops = EAGER) -> GPT:
    """Build a network, in fp32 on the CPU.

    Args:
        model: a preset (random weights), one of OpenAI's names, a run directory, a `.bin` file of llm.c, a folder that
            transformers wrote, or `owner/name` on Hugging Face's hub.
        ops: the backend.

    Raises:
        BadInput: it does not exist, or cannot be used. The message begins with the name or path.
    """
    if model in PRESETS:
        return GPT(PRESETS[model], ops)
    if model in PRETRAINED:
        return hf.from_pretrained(model, ops)
    path = Path(model)
    if model.endswith(".bin") or os.path.exists(path / llmc.RUN_WEIGHTS):
        return llmc.load_model(path, ops)
    looks_like_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~", "runs/"))
    if os.path.isdir(path) or (looks_like_hub_name and not os.path.exists(path)):
        return hf.from_pretrained(model, ops)
    known = ", ".join((*PRESETS, *PRETRAINED))
    raise BadInput(f"{model} is neither a path nor a name that is known; choose from {known}, or give a path")
