"""The tasks: what is asked of the network, and the figures, each derived a second time in the slow and obvious way."""

import json
import math

import numpy as np
import pytest
import torch

from common import BadInput
from data.shards import write_shard
from data.tokenizer import gpt2_encoding
from evals.hellaswag import _clean, open_hellaswag, write_bin
from evals.lambada import open_lambada
from evals.perplexity import _articles, _undo_spacing, open_bpb, open_wikitext
from evals.score import score_items
from evals.task import Score, row_of_text
from evals.tasks import open_task
from kernels.ops import EAGER
from model.gpt import GPTConfig
from model.llmc import load_model
from tests.evals import made
from tests.evals.conftest import SMALL, known_passages
from training.distributed import World

WORLD = World(0, 0, 1, torch.device("cpu"), False)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)
encode = gpt2_encoding().encode_ordinary


@pytest.fixture(scope="module")
def gpt(small):
    return load_model(small, EAGER)


def scores_of(gpt, task, n_tokens=512):
    return score_items(gpt, task, WORLD, NO_AUTOCAST, n_tokens)


@torch.no_grad()
def log_likelihoods(gpt, context: list[int], scored: list[int]) -> tuple[list[float], list[int]]:
    """Of each scored token, and the likeliest ones: in float64, from one sequence by itself."""
    tokens = torch.tensor([context + scored])
    logits, _ = gpt(tokens, tokens)
    of_scored = logits[0, len(context) - 1 : len(context) + len(scored) - 1].double()
    probabilities = of_scored.exp() / of_scored.exp().sum(-1, keepdim=True)
    found = [math.log(probabilities[t, token].item()) for t, token in enumerate(scored)]
    return found, [int(row.argmax()) for row in of_scored]


def test_hellaswag_by_llmcs_rule(gpt, tmp_path):
    path = made.hellaswag(tmp_path / "h.jsonl", 5, longest=12)
    task = open_hellaswag(path)
    scores = scores_of(gpt, task)
    right = right_norm = 0
    for line, of_item, choices in zip(path.read_text().splitlines(), scores, task.choices(scores), strict=True):
        record = json.loads(line)
        sums, means = [], []
        for ending, score in zip(record["endings"], of_item, strict=True):
            losses = [-x for x in log_likelihoods(gpt, encode(record["ctx"]), encode(" " + ending))[0]]
            sums.append(sum(losses))
            means.append(sum(losses) / len(losses))
            assert -score.log_likelihood == pytest.approx(sums[-1], rel=1e-5)
        assert choices == (int(np.argmin(sums)), int(np.argmin(means)))
        right += np.argmin(sums) == record["label"]
        right_norm += np.argmin(means) == record["label"]
    assert task.figures(scores) == {"acc": right / 5, "acc_norm": right_norm / 5}
    assert any(sum_ != mean for sum_, mean in task.choices(scores))  # the two figures are not one


def test_hellaswag_from_llmcs_file_is_the_same(tmp_path):
    path = made.hellaswag(tmp_path / "h.jsonl", 20)
    assert write_bin(tmp_path / "h.bin", path) == 20
    assert open_hellaswag(tmp_path / "h.bin").digest() == open_hellaswag(path).digest()
    assert open_hellaswag(tmp_path / "h.bin", limit=3).digest() == open_hellaswag(path, limit=3).digest()
    assert open_hellaswag(path, limit=3).digest() != open_hellaswag(path).digest()
    with pytest.raises(BadInput, match="and no text; for --rule lm-eval"):
        open_hellaswag(tmp_path / "h.bin", "lm-eval")


def test_hellaswag_by_lm_evals_rule(tmp_path):
    record = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix it.",
        "ctx_b": "then YOU",
        "ctx": "unused",
        "endings": ["eat [step] it", "wait.  Long", "[x]", "see"],
        "label": "1",
    }
    (tmp_path / "h.jsonl").write_text(json.dumps(record))
    task = open_hellaswag(tmp_path / "h.jsonl", "lm-eval")
    texts = [gpt2_encoding().decode(row.tokens.tolist()) for row in task.items[0]]
    context = "Baking: How to bake. Mix it. Then you"
    assert texts == [f"{context} eat it", f"{context} wait. Long", f"{context} ", f"{context} see"]
    assert task.lengths == [[len("eat it"), len("wait. Long"), 0, 3]] and task.labels == [1]
    scores = [[Score(-4.0, False), Score(-9.0, False), Score(-1.0, False), Score(-3.0, False)]]
    assert task.choices(scores) == [(2, 0 if 4 / 6 < 9 / 10 else 1)]


def test_blanks_at_the_end_of_a_context_are_scored():
    assert row_of_text("A dog ", " runs").n_scored == len(encode("A dog  runs")) - len(encode("A dog")) == 3 - 1
    assert row_of_text("", " runs").tokens.tolist() == [50256, *encode(" runs")]


def test_brackets_and_blanks():
    assert _clean(" a [title] b [step] c  d    e ") == "a. b c d  e"


def test_scores_that_are_no_numbers_choose_nothing(tmp_path):
    task = open_hellaswag(made.hellaswag(tmp_path / "h.jsonl", 1))
    bad = [[Score(-1.0, False), Score(math.nan, False), Score(-2.0, False), Score(-3.0, False)]]
    assert task.choices(bad) == [(-1, -1)] and task.figures(bad) == {"acc": 0.0, "acc_norm": 0.0}


def test_lambada(gpt, tmp_path):
    path = made.lambada(tmp_path / "l.jsonl", 6)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()] + known_passages(gpt, 2)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = open_lambada(path)
    found, greedy = [], 0
    for text in texts:
        before = text.rpartition(" ")[0].rstrip()
        scored = encode(text)[len(encode(before)) :]
        each, best = log_likelihoods(gpt, encode(before), scored)
        found.append(sum(each))
        greedy += best == scored
    figures = task.figures(scores_of(gpt, task))
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(found) / len(found)), rel=1e-5)
    assert figures["acc"] == greedy / len(texts) and greedy >= 2


def test_words_longer_than_the_network_takes(tmp_path):
    path = made.lambada(tmp_path / "l.jsonl", 2)
    path.write_text(json.dumps({"text": "a " + 50 * "東"}))
    with pytest.raises(BadInput, match=r"lambada scores [0-9]+ tokens at once, and the model takes 8"):
        open_task("lambada", str(path), GPTConfig(block_size=8), WORLD)


def test_last_word_is_whole():
    task_row = row_of_text("a b", " naïvely")
    assert gpt2_encoding().decode(task_row.tokens[-task_row.n_scored :].tolist()) == " naïvely"
    assert task_row.n_scored > 1


def test_greedy_is_all_tokens_of_the_word(tmp_path):
    task = open_lambada(made.lambada(tmp_path / "l.jsonl", 2))
    figures = task.figures([[Score(-1.0, True)], [Score(-3.0, False)]])
    assert figures == {"perplexity": pytest.approx(math.exp(2)), "acc": 0.5}


ARTICLE = ' \n = Bob = \n \n It is well @-@ known , 1 @,@ 000 ( or 2 @.@ 5 ) ; " so " . \n'
ARTICLE += " = = Later = = \n \n Dogs ' 20 ° N \n"


def test_wikitext_articles_and_spacing(tmp_path):
    text = ARTICLE + ARTICLE.replace("Bob", "= Ann =").replace("Dogs", "Cats") + " = Eve = \n end"
    pages = list(_articles(text))
    assert len(pages) == 2 and pages[0].startswith(" = Bob = \n") and pages[1] == " = Eve = \n end"
    assert "Cats" in pages[0]  # a title in two signs is a section
    (page,) = _articles(ARTICLE)
    assert _undo_spacing(page) == ' = Bob =\n\nIt is well-known, 1,000 (or 2.5); "so".\n== Later ==\n\nDogs\' 20°N\n'


def test_perplexities_of_short_documents(gpt, tmp_path):
    """Without windows: the sums are what the network's own loss says of each document after end-of-text."""
    (tmp_path / "w.raw").write_text(ARTICLE + ARTICLE.replace("Bob", "Ann"), encoding="utf-8")
    task = open_wikitext(tmp_path / "w.raw", 1024)
    pages = list(_articles((tmp_path / "w.raw").read_text(encoding="utf-8")))
    nats, n_tokens = 0.0, 0
    for page in pages:
        tokens = encode(_undo_spacing(page))
        nats -= sum(log_likelihoods(gpt, [50256], tokens)[0])
        n_tokens += len(tokens)
    figures = task.figures(scores_of(gpt, task))
    n_words = sum(len(page.split()) + 1 + page[-1:].isspace() for page in pages)  # blanks at the ends count too
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / n_words), rel=1e-5)
    assert figures["token_perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)
    bits = nats / math.log(2) / sum(len(page.encode()) for page in pages)
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_bits_per_byte_of_text_lines_and_shards(gpt, tmp_path):
    texts = ["Naïve 東京 dogs.", "", "She <|endoftext|> runs\n\nand runs under the roof.", "x"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = open_bpb(str(tmp_path / "t.jsonl"), 1024)
    nats = -sum(sum(log_likelihoods(gpt, [50256], encode(text))[0]) for text in texts if text)
    figures = task.figures(scores_of(gpt, task))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    tokens = [token for text in texts for token in (50256, *encode(text))]
    write_shard(tmp_path / "s_0.bin", np.array(tokens, np.uint16))
    assert open_bpb(str(tmp_path / "s_*.bin"), 1024).digest() == task.digest()
    write_shard(tmp_path / "r_0.bin", np.array(tokens[1:], np.uint16))  # it starts inside a document
    assert open_bpb(str(tmp_path / "r_0.bin"), 1024).digest() == task.digest()

    (tmp_path / "t.txt").write_text(texts[0])
    assert open_bpb(str(tmp_path / "t.txt"), 1024).digest() == open_bpb(str(tmp_path / "t.jsonl"), 1024, 1).digest()


@pytest.mark.parametrize(
    ("task", "content", "told"),
    [
        ("hellaswag", '{"ctx": ""\n', "line 1: Expecting"),
        ("hellaswag", "GOOD\n\nGOOD{}\n", "line 3: Extra data"),
        ("hellaswag", "GOOD\n[]", r"line 2: its content is \[\], and must be an object"),
        ("hellaswag", {"endings": ["a", "b", "c"]}, "line 1: endings is .* must be a list of 4 to 4 values"),
        ("hellaswag", {"endings": ["a", "b", "c", 4]}, "line 1: endings is .* must be a list of 4 to 4 values"),
        ("hellaswag", {"label": 4}, "line 1: label is 4, and must be an integer from 0 to 3"),
        ("hellaswag", {"label": ""}, "line 1: label is ''"),
        ("hellaswag", {"ctx": ""}, "line 1: ctx is empty"),
        ("hellaswag", "", "is empty"),
        ("lambada", "\n\n", "is empty"),
        ("lambada", '{"text": "word"}', "line 1: text is 'word', and must be a string with a blank in it"),
        ("lambada", '{"words": "a b"}', "line 1: text is missing"),
        ("wikitext", "only text\n", "no line like ' = Title = '"),
        ("wikitext", b"\xff = a = ", "byte 0 is no UTF-8"),
        ("bpb", "", "is empty"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, task, content, told):
    good = json.loads(made.hellaswag(tmp_path / "good.jsonl", 1).read_text())
    if isinstance(content, dict):
        content = json.dumps(good | content)
    path = tmp_path / "file.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.replace("GOOD", json.dumps(good)).encode())
    openers = {
        "hellaswag": lambda: open_hellaswag(path),
        "lambada": lambda: open_lambada(path),
        "wikitext": lambda: open_wikitext(path, SMALL.block_size),
        "bpb": lambda: open_bpb(str(path), SMALL.block_size),
    }
    with pytest.raises(BadInput, match=told) as refused:
        openers[task]()
    assert str(path) in str(refused.value)
