"""Bytes that ranks send, and the tables of docs/runs.md."""

import pytest

from model.gpt import PRESETS
from tests.training import scaling, sent


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_send_what_the_formulas_say(tmp_path, ranks):
    counts = sent.count_on(ranks, tmp_path)
    assert len(counts) == ranks
    for of_rank in counts:
        for stage, of_stage in enumerate(of_rank):
            by_kind = dict.fromkeys(scaling.RING, 0)
            for message in scaling.messages(sent.SMALL, stage, sent.MICRO_STEPS):
                by_kind[message.collective] += message.size
            found = {kind: of_stage.get(kind, 0) for kind in scaling.RING}
            assert found == pytest.approx(by_kind, rel=0.02, abs=64)  # 64: loss and norm, on which ranks agree
            on_ring, by_gloo = scaling.formulas_for_small(stage, ranks)
            assert scaling.found(of_stage, ranks) == pytest.approx((on_ring, by_gloo), rel=0.02)


@pytest.mark.parametrize("stage", sent.STAGES)
def test_communication_hides_from_so_many_tokens_on(stage):
    config, ranks = PRESETS["d24"], 32
    tokens = scaling.tokens_to_hide(config, stage, ranks)
    unhidden = [message for message in scaling.messages(config, stage, 2) if message.behind is None]
    least = scaling.bytes_sent(unhidden, ranks) / scaling.NETWORK
    assert scaling.seconds_added(config, stage, ranks, 1.001 * tokens, 2) == pytest.approx(least)
    assert scaling.seconds_added(config, stage, ranks, 0.9 * tokens, 2) > 1.01 * least


def test_tables_of_the_document_are_those_that_the_command_computes():
    document = scaling.DOCUMENT.read_text(encoding="utf-8")
    for name, text in scaling.on_paper().items():
        command = f"{scaling.COMMAND}, {name}"
        assert f"<!-- written by {command}: begin -->\n\n{text}\n\n<!-- written by {command}: end -->" in document, (
            f"docs/runs.md shows other figures; run {scaling.COMMAND}"
        )
