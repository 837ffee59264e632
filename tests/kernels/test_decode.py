"""Attention of one query to a cache: lengths around a tile, up to many tiles, unlike ones in a batch, strides of all
sorts, and bits that depend on a sequence alone."""

import pytest
import torch

from kernels import accuracy, decode, eager, launch
from kernels.attention import causal_attention
from kernels.decode import decode_attention
from tests.conftest import DEVICE, needs_interpreter
from tests.kernels.conftest import DTYPES, assert_no_worse, dtypes, normal
from tests.kernels.test_attention import STRIDED

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def inputs_of(
    lengths: list[int], H: int, T: int, D: int, dtype: torch.dtype = FP32, int_dtype: torch.dtype = torch.int64
) -> dict[str, torch.Tensor]:
    B = len(lengths)
    return {
        "q": normal(B, H, D, dtype=dtype, seed=1),
        "k_cache": normal(B, H, T, D, dtype=dtype, seed=2),
        "v_cache": normal(B, H, T, D, dtype=dtype, seed=3),
        "lengths": torch.tensor(lengths, dtype=int_dtype, device=DEVICE),
    }


def assert_decode_no_worse(inputs: dict[str, torch.Tensor]) -> None:
    assert_no_worse(accuracy.compare_op(decode_attention, eager.decode_attention, inputs, []))


@dtypes
def test_lengths_around_a_tile(dtype):
    """In one batch, in a cache whose length no tile divides."""
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 100]
    assert_decode_no_worse(inputs_of(lengths, 1, 101, 64, dtype))


@pytest.mark.parametrize("D", [1, 16, 20, 33, 80, 128])
@dtypes
def test_head_dims(dtype, D):
    assert_decode_no_worse(inputs_of([70, 7], 3, 70, D, dtype, torch.int32))


@pytest.mark.parametrize(
    ("T", "dtype"), [(1000, FP32), (1024, torch.float16), (16384, BF16)], ids=["1000", "1024", "16384"]
)
def test_many_tiles(T, dtype):
    """The second kernel takes more than one step; T = 16,384 is 256 tiles."""
    assert_decode_no_worse(inputs_of([T], 1, T, 16, dtype))


@dtypes
def test_scores_far_out(dtype):
    """Scores to ±100, so that tiles differ by factors that overflow, and the largest is in the last of three."""
    inputs = inputs_of([150, 150], 1, 150, 64, dtype)
    inputs["q"] *= 12.0
    inputs["k_cache"][:, :, -1] = inputs["q"] / 12.0
    assert (inputs["k_cache"].float() @ inputs["q"].float()[..., None]).abs().max() / 8 > 60
    assert_decode_no_worse(inputs)


def test_it_is_the_last_row_of_causal_attention():
    q, k, v = (normal(2, 3, 70, 24, seed=i) for i in range(3))
    got = decode_attention(q[:, :, -1], k, v, torch.tensor([70, 70], device=DEVICE))
    torch.testing.assert_close(got, causal_attention(q, k, v)[:, :, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", STRIDED)
def test_any_strides(of):
    """q, keys, values and lengths each in another layout, which rotate; the same bits as contiguous."""
    views, i = list(STRIDED.values()), list(STRIDED).index(of)
    inputs = inputs_of([40, 70, 2], 3, 70, 24, BF16)
    strided = {
        "q": views[i](inputs["q"][:, :, None])[:, :, 0],
        "k_cache": views[(i + 1) % 5](inputs["k_cache"]),
        "v_cache": views[(i + 2) % 5](inputs["v_cache"]),
        "lengths": inputs["lengths"].repeat_interleave(2)[::2],
    }
    assert_decode_no_worse(strided)
    contiguous = {name: x.contiguous() for name, x in strided.items()}
    assert torch.equal(decode_attention(*strided.values()), decode_attention(*contiguous.values()))


@pytest.mark.parametrize("D", [24, 64])
def test_what_lies_beyond_a_length_is_not_read(D):
    inputs = inputs_of([1, 64, 65, 130], 1, 130, D, BF16)
    want = decode_attention(*inputs.values())
    for b, length in enumerate(inputs["lengths"].tolist()):
        inputs["k_cache"][b, :, length:] = inputs["v_cache"][b, :, length:] = float("nan")
    assert torch.equal(decode_attention(*inputs.values()), want)


def test_the_bits_of_a_sequence_depend_on_it_alone():
    """Not on the room in the cache, the sequences beside it, or the run."""
    q, k, v, lengths = inputs_of([200, 70, 1], 2, 300, 32, BF16).values()
    together = decode_attention(q, k, v, lengths)
    assert torch.equal(together, decode_attention(q, k, v, lengths))
    for b, length in enumerate(lengths.tolist()):
        alone = decode_attention(q[[b]], k[[b], :, :length], v[[b], :, :length], lengths[[b]])
        assert torch.equal(alone, together[[b]])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0/0, as on a GPU
def test_a_length_that_the_cache_cannot_have_gives_nan_and_reads_nothing():
    inputs = inputs_of([0, -1, 71, 2**40, 70], 1, 70, 16)
    wrong = decode_attention(*inputs.values())
    assert wrong[:4].isnan().all() and wrong[4].isfinite().all()


def test_nan_in_a_key_shows():
    inputs = inputs_of([70, 70], 1, 70, 16)
    inputs["k_cache"][0, 0, 3, 0] = float("nan")
    out = decode_attention(*inputs.values())
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.usefixtures("overflow_is_reported")
@pytest.mark.parametrize("spread", [0, 1, 2], ids=["batch", "head", "position"])
def test_offsets_past_int32(spread):
    """Two steps of 2^30 elements along one dimension. No memory is committed for what lies between."""
    shape, close = [1, 1, 1, 16], [16, 16, 16, 1]
    shape[spread], close[spread] = 3, 2**30
    inputs = inputs_of([shape[2]] * shape[0], shape[1], shape[2], 16, BF16)
    want = decode_attention(*inputs.values())
    for name in ("k_cache", "v_cache"):
        far = torch.empty_strided(shape, close, dtype=BF16, device=DEVICE)
        inputs[name] = far.copy_(inputs[name])
    assert torch.equal(decode_attention(*inputs.values()), want)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
def test_autocast_casts_it(dtype):
    inputs = inputs_of([9, 3], 2, 9, 16)
    with torch.autocast(DEVICE, dtype):
        got = decode_attention(*inputs.values())
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    assert got.dtype == dtype and torch.equal(got, decode_attention(*rounded.values()))


def test_float64():
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs_of([40, 3], 2, 40, 16).items()}
    torch.testing.assert_close(decode_attention(*inputs.values()), eager.decode_attention(*inputs.values()))


def test_gradients_are_refused():
    inputs = inputs_of([9], 1, 9, 16)
    inputs["k_cache"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        decode_attention(*inputs.values())


def test_nothing_to_do():
    assert decode_attention(*inputs_of([], 2, 9, 16).values()).shape == (0, 2, 16)
    assert decode_attention(*inputs_of([3], 0, 9, 16).values()).shape == (1, 0, 16)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q": normal(2, 2, 129), "k_cache": normal(2, 2, 9, 129), "v_cache": normal(2, 2, 9, 129)}, "head_dim"),
        ({"q": normal(2, 2, 8)}, r"takes q \(B, H, D\)"),
        ({"q": normal(2, 2, 1, 16)}, r"takes q \(B, H, D\)"),
        ({"v_cache": normal(2, 2, 8, 16)}, r"takes q \(B, H, D\)"),
        ({"k_cache": normal(2, 2, 0, 16), "v_cache": normal(2, 2, 0, 16)}, r"takes q \(B, H, D\)"),
        ({"lengths": torch.ones(3, dtype=torch.int64, device=DEVICE)}, r"takes q \(B, H, D\)"),
        ({"lengths": torch.ones(2, device=DEVICE)}, "integers for lengths"),
        ({"v_cache": normal(2, 2, 9, 16, dtype=BF16)}, "one dtype"),
        ({"q": torch.ones(2, 2, 16, dtype=torch.int64, device=DEVICE)}, "takes fp32, fp16 or bf16"),
    ],
)
def test_what_does_not_fit_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        decode_attention(*(inputs_of([9, 3], 2, 9, 16) | changes).values())


def test_opcheck_and_compile():
    inputs = tuple(inputs_of([9, 3], 2, 9, 16).values())
    torch.library.opcheck(
        torch.ops.tritongpt.decode_attention.default, inputs, test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), decode_attention(*inputs))


@needs_interpreter
def test_traffic_is_the_keys_that_there_are():
    """The bytes of the formula, and the sums of the tiles, which are written once and read once."""
    from tests.budgets.test_traffic import counting

    lengths, H, T, D = [100, 1, 64], 2, 500, 64
    inputs = inputs_of(lengths, H, T, D, BF16)
    with counting() as counts:
        decode_attention(*inputs.values())
    cost = decode.forward_cost(sum(lengths), len(lengths), H, D, 2)
    n_tiles = H * (2 + 1 + 1)
    queries_again = (n_tiles - len(lengths) * H) * D * 2
    lengths_again = 8 * H * (launch.cdiv(T, 64) + 1) * len(lengths) - 8 * len(lengths)
    assert counts.total() == cost.bytes + 2 * n_tiles * (D + 2) * 4 + queries_again + lengths_again
    assert cost.flops == 4 * D * H * 165


def test_rows_of_every_chip():
    """One configuration serves all: no matrix instruction is asked for, and 16 KiB of keys fit any of them."""
    assert {c.capability for c in launch.CONFIGS if c.op == "decode_attention"} == {0}
    for dtype in DTYPES.values():
        config = launch.lookup("decode_attention", torch.device("cpu"), dtype.itemsize, 128)
        assert config.block_n * 128 * dtype.itemsize <= 2**14
