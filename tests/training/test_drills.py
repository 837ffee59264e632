"""Memory by ZeRO stage, and the cost of a save, on small networks."""

import pytest

from model.gpt import GPTConfig
from tests.training import stalls, zero

SMALL = GPTConfig(block_size=64, vocab_size=1009, n_layer=3, n_head=4, n_embd=64)


def test_formula_is_the_papers():
    assert [zero.formula(10, stage, 1) for stage in (0, 1, 3)] == [160] * 3
    assert [zero.formula(10, stage, 4) for stage in range(4)] == [160, 100, 80, 40]


@pytest.mark.parametrize(("zero_stage", "ranks"), [(0, 2), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (3, 1), (3, 4)])
def test_ranks_hold_what_the_paper_says(zero_stage, ranks):
    held = [zero.held(SMALL, zero_stage, rank, ranks) for rank in range(ranks)]
    paper = zero.formula(SMALL.num_params(), zero_stage, ranks)
    assert sum(rank.total for rank in held) / ranks == pytest.approx(paper, rel=0.01)
    assert max(rank.total for rank in held) == pytest.approx(paper, rel=0.03)
    whole = 4 * SMALL.num_params()
    assert held[0].gradients == pytest.approx(whole if zero_stage < 2 else whole / ranks, rel=0.01)


def test_background_save_holds_the_loop_up_for_less_than_one_that_is_waited_for(tmp_path):
    figures = stalls.measure("nano", 2, tmp_path)
    waited, held = (
        figures[name] for name in ("a save that is waited for", "the loop is held up by a save in the background")
    )
    assert 0 < held < waited / 2
    assert next((tmp_path / "checkpoints").iterdir()).name.startswith("step_")
