"""Against lm-evaluation-harness itself, where it is installed: the same choices and figures on files made here.

It runs its own task code on the same weights through transformers. The network is random, with weights enlarged so that
its likelihoods differ by much more than rounding.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from data.tokenizer import vocabulary_files
from evals.__main__ import main
from evals.hellaswag import open_hellaswag
from evals.lambada import open_lambada
from evals.perplexity import open_wikitext
from kernels.ops import EAGER
from model import hf, llmc
from model.gpt import GPT, GPTConfig
from tests.evals import made
from tests.evals.conftest import known_passages, results_of

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, see CONTRIBUTING.md")

pytestmark = pytest.mark.slow

BLOCK_SIZE = 96
"""longer than the questions, and shorter than the articles"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network in both formats, and a file for each task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    gpt = GPT(GPTConfig(block_size=BLOCK_SIZE, n_layer=2, n_head=2, n_embd=32), EAGER)
    with torch.no_grad():
        for param in gpt.parameters():
            if param.dim() == 2:
                param.mul_(6)
    llmc.write_model(folder / "gpt.bin", gpt)
    hf.export(folder / "gpt.bin", folder / "hf", vocabulary_files())
    made.hellaswag(folder / "hellaswag.jsonl", 220)
    known = "".join(json.dumps({"text": text}) + "\n" for text in known_passages(gpt, 10))
    passages = made.lambada(folder / "lambada.jsonl", 110)
    passages.write_text(passages.read_text(encoding="utf-8") + known, encoding="utf-8")
    made.wikitext(folder / "wiki.test.raw", 5)
    return folder


@pytest.fixture
def theirs(folder):
    """What lm-evaluation-harness gives for one of its tasks on a file of JSON lines: (figures, samples by number)."""

    def evaluate(task: str, file) -> tuple[dict, list]:
        from lm_eval.models.huggingface import HFLM

        files = dict.fromkeys(("train", "validation", "test"), str(file))
        (own,) = (Path(lm_eval.__file__).parent / "tasks").glob(f"*/{task}.yaml")
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config = {"include": str(own), "task": task} | local
        (folder / f"{task}.yaml").write_text(json.dumps(config))  # JSON is YAML
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=8, dtype="float32"),
            tasks=[str(folder / f"{task}.yaml")],
            log_samples=True,
            bootstrap_iters=0,
        )
        figures = {name.removesuffix(",none"): value for name, value in found["results"][task].items()}
        return figures, sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

    return evaluate


def ours(task: str, folder, data, *flags):
    """The results of our command line, and the scores of all items."""
    output = folder / f"out_{task}"
    argv = [task, folder / "hf", "--data", data, "--device", "cpu", "--batch_size", 4, "--output_dir", output, *flags]
    assert main([str(word) for word in argv]) == 0
    return results_of(output)


def test_hellaswag(folder, theirs):
    data = folder / "hellaswag.jsonl"
    results, scores = ours("hellaswag", folder, data, "--rule", "lm-eval")
    figures, samples = theirs("hellaswag", data)
    task = open_hellaswag(data, "lm-eval")
    assert len(samples) == len(scores) == 220
    for choices, item, sample in zip(task.choices(scores), scores, samples, strict=True):
        their_sums = [float(ll) for ll, _ in sample["filtered_resps"]]
        lengths = [len(choice) for choice in sample["doc"]["choices"]]
        assert [score.log_likelihood for score in item] == pytest.approx(their_sums, rel=1e-5)
        assert choices[0] == max(range(4), key=their_sums.__getitem__)
        assert choices[1] == max(range(4), key=lambda k: their_sums[k] / lengths[k])
    for name in ("acc", "acc_norm"):
        print(f"hellaswag {name}: {results['figures'][name]!r}, lm-eval {figures[name]!r}")
        assert results["figures"][name] == pytest.approx(figures[name], abs=1e-6)


def test_lambada(folder, theirs):
    data = folder / "lambada.jsonl"
    results, scores = ours("lambada", folder, data)
    figures, samples = theirs("lambada_openai", data)
    assert len(samples) == len(scores) == len(open_lambada(data).items) == 120
    for (score,), sample in zip(scores, samples, strict=True):
        ((log_likelihood, greedy),) = sample["filtered_resps"]
        assert score.log_likelihood == pytest.approx(float(log_likelihood), rel=1e-5)
        assert score.greedy == (str(greedy) == "True")
    assert figures["acc"] > 0.05
    for name in ("perplexity", "acc"):
        print(f"lambada {name}: {results['figures'][name]!r}, lm-eval {figures[name]!r}")
        assert results["figures"][name] == pytest.approx(figures[name], rel=1e-6, abs=1e-6)


def test_wikitext(folder, theirs):
    source = (folder / "wiki.test.raw").read_text(encoding="utf-8")
    pages = [page for page in re.split(r"(?m)^(?= = [^=\n]+ = $)", source) if page.strip()]
    pages = [page.removesuffix("\n") for page in pages[:-1]] + pages[-1:]  # the line break before a title is between
    (folder / "wiki.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
    results, _ = ours("wikitext", folder, folder / "wiki.test.raw")
    figures, samples = theirs("wikitext", folder / "wiki.jsonl")
    assert len(samples) == len(pages) == 5
    assert len(open_wikitext(folder / "wiki.test.raw", BLOCK_SIZE).items) > 20
    for name in ("word_perplexity", "bits_per_byte"):
        print(f"wikitext {name}: {results['figures'][name]!r}, lm-eval {figures[name]!r}")
        assert results["figures"][name] == pytest.approx(figures[name], rel=1e-6)
    assert math.log2(figures["byte_perplexity"]) == pytest.approx(results["figures"]["bits_per_byte"], rel=1e-6)
