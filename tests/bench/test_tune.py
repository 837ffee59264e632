"""The sweep of launch configurations: what is tried, dropped and timed, and when a row is worth pasting."""

import itertools

import pytest
import torch

from bench import __main__ as cli
from bench import harness, ops, results, tune
from bench.chips import CHIPS
from bench.machine_code import MachineCode
from bench.tune import Candidate, Case, Sweep, Tunable
from common import BadInput
from kernels import launch
from tests.bench.conftest import Doubling

GOOD = MachineCode(128, 0, 65536, 256, 128, 128, "wgmma", True, False)
PRESENT = (1024, 4)
"""block_n and num_warps of GELU's row"""


def arguments(*words: str):
    return cli.parser().parse_args(["tune", *words])


def case_of(op: str, capability: int = 90) -> Case:
    benchmark = next(benchmark for benchmark in ops.BENCHMARKS if benchmark.op == op)
    return Case(benchmark, benchmark.shapes[0], capability)


# What is tried.


def test_the_present_row_comes_first_and_once():
    for capability in (80, 90, 100, 120):
        for op, tunables in tune.TUNABLES.items():
            for tunable in tunables:
                configs = tune.candidates(tunable, case_of(op, capability))
                assert configs[0] in launch.CONFIGS and configs[0].op == tunable.config
                launched = [config[3:] for config in configs]
                assert len(set(launched)) == len(launched) > 5
                assert {config.capability for config in configs[1:]} == {capability}


def test_tiles_have_enough_for_each_thread_and_not_too_much():
    case = case_of("layer_norm")  # 768 columns, in blocks of 1024
    tunable = Tunable("layer_norm", "", "forward", Sweep((1, 2, 8, 64), (0,), (4, 8)))
    assert [config[4:7] for config in tune.candidates(tunable, case)[1:]] == [
        *((1, 0, 4), (2, 0, 4), (2, 0, 8), (8, 0, 4), (8, 0, 8))
    ]


def test_numbers_of_programs_are_tried_where_they_share_rows():
    tunable = Tunable("layer_norm", "", "forward", Sweep((8,), (0,), (8,), (3,), programs=(1, 3)))
    names = [tune.name(config) for config in tune.candidates(tunable, case_of("layer_norm"))]
    assert names == [f"layer_norm {row}" for row in ("4×0 w8 s3 r128 p2", "8×0 w8 s3", "8×0 w8 s3 p3")]


def test_a_limit_of_registers_is_tried_beside_none():
    tunable = Tunable("attention", "", "forward", Sweep((128,), (64,), (4, 8), (3,), {4: 168}))
    names = [tune.name(config) for config in tune.candidates(tunable, case_of("attention"))]
    assert names == [f"attention 128×64 {rest}" for rest in ("w8 s3 r128", "w4 s3", "w4 s3 r168", "w8 s3")]


def test_a_row_is_printed_as_it_stands_in_the_table():
    for config in launch.CONFIGS:
        text = tune.source(config)
        assert eval(text, {"LaunchConfig": launch.LaunchConfig, "ANY": launch.ANY}) == (config,)


# What is dropped.


@pytest.mark.parametrize(
    ("code", "present", "reason"),
    [
        (GOOD._replace(shared=227 * 1024), GOOD, ""),
        (GOOD._replace(shared=227 * 1024 + 1), GOOD, "does not fit shared memory"),
        (GOOD._replace(spills=8), None, "spills"),
        (GOOD._replace(spills=8), GOOD._replace(spills=8), ""),
        (GOOD._replace(spills=16), GOOD._replace(spills=8), "spills"),
        (GOOD._replace(serialised=True), GOOD, "wgmma serialised"),
    ],
)
def test_why_a_candidate_is_dropped(code, present, reason):
    assert tune.reason_to_drop(code, present, CHIPS["H100"]) == reason


@pytest.fixture
def machine_code(monkeypatch):
    """Instead of compiling: gives the machine code of a launch by `code(options)`, and lists what was compiled."""
    compiled = []

    def use(code=lambda options: GOOD):
        def read(call):
            compiled.append(call.kernel.fn.__name__)
            return code(call.options)

        monkeypatch.setattr(tune, "specialise", lambda call, capability: call)
        monkeypatch.setattr(tune, "read", read)
        return compiled

    return use


FAILED = "does not compile: RuntimeError: ptxas failed with error 255"


def test_a_survey_keeps_the_present_row_and_drops_what_is_worse(machine_code):
    def code(options):
        if options["num_warps"] == 4 and options["num_stages"] == 3:
            raise RuntimeError("ptxas failed\nwith error 255")
        spills = 8 if options["num_stages"] == 3 else 16
        registers = 120 if options["num_warps"] == 4 else 200
        return GOOD._replace(registers=registers, spills=spills, serialised=options["maxnreg"] == 128)

    compiled = machine_code(code)
    sweep = Sweep((128,), (64,), (4, 8), (2, 3), {4: 168, 8: 128})
    found = tune.survey(Tunable("attention", "_attention_fwd_kernel", "forward", sweep), case_of("attention"))
    assert {tune.name(c.config).partition(" ")[2]: c.dropped for c in found} == {
        "128×64 w8 s3 r128": "",
        "128×64 w4 s2": "spills",
        "128×64 w4 s2 r168": "limit is no use",
        "128×64 w4 s3": FAILED,
        "128×64 w4 s3 r168": FAILED,
        "128×64 w8 s2": "spills",
        "128×64 w8 s2 r128": "limit is no use",
        "128×64 w8 s3": "",
    }
    assert compiled == ["_attention_fwd_kernel"] * 6
    _, present, *_, last = tune.listing(found, CHIPS["H100"]).splitlines()
    assert present.split() == ["128", "64", "8", "3", "128", "1", "200", "8", "65,536", "1", "12%", "present", "row"]
    counts = "2 × spills, 2 × limit is no use, 2 × does not compile"
    assert last == f"2 of 8 are left within the limits of H100; dropped: {counts}"


@pytest.mark.parametrize("op", tune.TUNABLES)
def test_each_op_launches_the_kernels_that_are_named(op, machine_code):
    compiled = machine_code()
    case = case_of(op)
    small = case.shape.small | ({"n_cols": 61, "width": 16} if op == "linear_cross_entropy" else {})
    for tunable in tune.TUNABLES[op]:
        compiled.clear()
        only_present = tunable._replace(sweep=Sweep((), (), ()))
        found = tune.survey(only_present, case._replace(shape=case.shape._replace(small=small)))
        assert [c.dropped for c in found] == [""]
        two = tunable.pass_name == "both" or op == "decode_attention"  # which has a second one for the sums of tiles
        assert len(compiled) == (2 if two else 1)


def test_two_kernels_of_a_row_have_the_larger_need(machine_code):
    needs = iter([GOOD._replace(registers=40, shared=1), GOOD._replace(registers=30, shared=2)])
    machine_code(lambda options: next(needs))
    (found,) = tune.survey(Tunable("gelu", "_gelu_", "both", Sweep((), (), ())), case_of("gelu"))
    assert found.code == GOOD._replace(registers=40, shared=2)


# What is timed.


@pytest.fixture
def timing(device, toy, tmp_path, monkeypatch):
    """Tunes a toy op that launches with GELU's row, on a device whose clock counts.

    `milliseconds` and `factors` (2 is right) are by (block_n, num_warps); a list of times goes round and round. Each
    call of the harness takes a minute. Returned is what was timed, call by call.
    """
    now, turns = [0.0], []
    time_in_turns = harness.time_in_turns

    def slowly(device, calls, seconds):
        now[0] += 60.0
        turns.append([variant.partition(" ")[2] for variant in calls])
        return time_in_turns(device, calls, seconds)

    monkeypatch.setattr(harness, "time_in_turns", slowly)
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(tune, "GROUP", 2)
    monkeypatch.setattr(tune, "survey", lambda tunable, case: [Candidate(c) for c in tune.candidates(tunable, case)])

    def run(milliseconds, factors=None, minutes="100", commit="c1", n_tunables=1) -> list[list[str]]:
        endless = {
            key: itertools.cycle(value if isinstance(value, list) else [value]) for key, value in milliseconds.items()
        }

        def kernel(x):
            config = launch.lookup("gelu", x.device, 2)
            key = config.block_n, config.num_warps
            is_small = x.shape[0] == 2
            forward_ms = 0.0 if is_small else next(endless[key])
            return Doubling.apply(x, device, forward_ms, 1.0, (factors or {}).get(key, 2.0))

        for module in (harness, results):
            monkeypatch.setattr(module, "commit", lambda: commit)
        tunable = Tunable("gelu", "_gelu_", "forward", Sweep((1,), (1024, 2048), (2, 4, 8)))
        monkeypatch.setattr(tune, "TUNABLES", {"toy": (tunable, tunable._replace(pass_name="both"))[:n_tunables]})
        monkeypatch.setattr(tune, "BENCHMARKS", [toy()._replace(kernel=kernel)])
        turns.clear()
        assert tune.main(arguments("toy", "--minutes", minutes), device, tmp_path, clock=lambda: now[0]) == 0
        return list(turns)

    return run


FAST_2048 = {PRESENT: 2.0, (1024, 2): 3.0, (2048, 2): 2.5, (2048, 4): 1.0, (2048, 8): 4.0}
GROUPS = [["1×1024 w4 s1", "1×1024 w2 s1"], ["1×2048 w2 s1", "1×2048 w4 s1"], ["1×2048 w8 s1"]]
FINAL = ["1×1024 w4 s1", "1×2048 w4 s1", "1×2048 w2 s1", "1×1024 w2 s1", "1×2048 w8 s1"]
WINNER = '    LaunchConfig("gelu", 90, ANY, 8, 1, 2048, 4, 1),'


def test_the_fastest_of_the_best_is_printed_as_a_row(timing, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "FINALISTS", 3)
    assert timing(FAST_2048, n_tunables=2)[:4] == [*GROUPS, FINAL[:4]]
    lines = capsys.readouterr().out.splitlines()
    assert WINNER in lines
    times = [line.split() for line in lines if line.startswith("gelu 1×")][:5]
    assert [(cells[1], cells[2], cells[5], cells[7]) for cells in times] == [
        ("1×2048", "w4", "1", "-50.0%"),
        ("1×1024", "w4", "2", "+0.0%"),
        ("1×2048", "w2", "2.5", "+25.0%"),
        ("1×1024", "w2", "3", "+50.0%"),
        ("1×2048", "w8", "4", "+100.0%"),
    ]
    rows = results.read(tmp_path / "nvidia-fake-1" / "tune" / "toy.csv")
    of_pass = {row.pass_name: round(row.p50, 3) for row in rows if row.variant == "gelu 1×2048 w4 s1"}
    assert of_pass == {"forward": 1.0, "both": 2.0}


@pytest.mark.parametrize(
    ("milliseconds", "factors", "final", "said"),
    [
        ({}, {(2048, 4): 2.1}, [FINAL[0], *FINAL[2:]], "the present row stays: nothing is faster beyond both spreads"),
        ({}, {PRESENT: 2.1}, FINAL[1:], "the present row has no time"),
        ({(2048, 4): [0.5, 0.5, 0.5, 2.5, 2.5]}, {}, FINAL, "the present row stays: nothing is faster beyond both"),
    ],
)
def test_what_is_wrong_or_not_clearly_faster_is_no_row(timing, capsys, milliseconds, factors, final, said):
    turns = timing(FAST_2048 | milliseconds, factors)
    assert turns[-1] == final
    assert not any(f"1×{block_n} w{num_warps} s1" in calls for block_n, num_warps in factors for calls in turns)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(said) and "LaunchConfig" not in out
    wrong = {line.split()[1] + " " + line.split()[2] for line in out.splitlines() if "wrong: out0" in line}
    assert wrong == {f"1×{block_n} w{num_warps}" for block_n, num_warps in factors}


def test_it_stops_in_time_and_resumes_at_the_same_commit(timing, capsys):
    def last_line() -> str:
        return capsys.readouterr().out.splitlines()[-1]

    assert timing(FAST_2048, minutes="2.5") == GROUPS[:2]
    assert last_line() == "candidates left: 1; the same command resumes"
    assert timing(FAST_2048, minutes="1.5") == GROUPS[2:]
    assert last_line() == "candidates left: 5; the same command resumes"
    assert timing(FAST_2048) == [FINAL]
    assert timing(FAST_2048) == []
    assert last_line() == WINNER
    assert timing(FAST_2048, commit="c2", minutes="0.5", n_tunables=2) == GROUPS[:1]
    out = capsys.readouterr().out
    assert out.count("blocks per SM") == 1  # nothing is compiled when time is over
    assert out.splitlines()[-1] == "candidates left: 8; the same command resumes"
    assert timing(FAST_2048, commit="c2+") == [*GROUPS, FINAL]
    assert timing(FAST_2048, commit="c2+", minutes="0.5") == GROUPS[:1]
    assert last_line() == "candidates left: 3; the same command starts over, as the tree has changes"


# The command line.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gelo", "OP 'gelo' is none that can be tuned; choose from all, add_layer_norm, attention, "),
        ("gelu --shape 8x8", "--shape 8x8 is none of gelu; choose from 65536×3072, "),
        ("gelu --capability 0", "--capability 0 is too low"),
        ("gelu --minutes nan", "--minutes nan leaves no time"),
    ],
)
def test_bad_arguments(words, said):
    with pytest.raises(BadInput) as bad:
        tune.parse(arguments(*words.split()), 90)
    assert str(bad.value).startswith(said)


def test_all_ops_or_those_that_are_named():
    assert {case.benchmark.op for case in tune.parse(arguments("all"), 90)} == set(tune.TUNABLES)
    (case,) = tune.parse(arguments("gelu", "gelu", "--shape", "8192x3072", "--capability", "80"), 90)
    assert (case.shape.name, case.capability) == ("8192×3072", 80)
    chips = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100", 99: "H100", 100: "B200", 120: "RTX 5090"}
    assert {capability: case_of("gelu", capability).chip.name for capability in chips} == chips


def test_without_a_gpu_candidates_are_listed(machine_code, monkeypatch, capsys):
    machine_code()
    tunable = Tunable("gelu", "_gelu_", "both", Sweep((1,), (2048,), (4,)))
    monkeypatch.setattr(tune, "TUNABLES", {"gelu": (tunable,)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "compile_kernels", lambda command: None)  # this process may interpret
    assert cli.main(["tune", "gelu", "--capability", "80"]) == 0
    _, title, _, present, _, counts, _, last = capsys.readouterr().out.splitlines()
    assert title == "gelu 65536×3072, bfloat16, sm_80: gelu (pass: both)"
    assert present.split()[:4] == ["1", "1,024", "4", "1"] and present.endswith("present row")
    assert counts == "2 of 2 are left within the limits of A100; dropped: none"
    assert last.startswith("a GPU of compute capability 8.0 times")
