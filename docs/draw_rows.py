"""Pictures of the kernels whose programs take rows: GELU, LayerNorm, cross-entropy, embedding; and half a block."""

from docs.canvas import FULL, MARGIN, MUTED, WIDTH, Picture, Rect
from docs.launches import SHAPE, B, C, H, N, T, V, calls, saved
from kernels import launch
from kernels.cross_entropy import GRADIENT_SCALE

CHIP = 350
"""left edge of the panels at the right"""
INSIDE = CHIP + 12
POWER = str(int(GRADIENT_SCALE).bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _panels(p: Picture, top: float, height: float, memory: str, chip: str) -> None:
    p.panel((MARGIN, top, 318, height), "memory", memory)
    p.panel((CHIP, top, WIDTH - MARGIN - CHIP, height), "chip", chip)


def _tile(p: Picture, kind: str, rect: Rect, n_rows: int, words: str) -> None:
    """A tile with words on it; its rows are marked at both ends."""
    p.box(kind, rect, words)
    x, y, w, h = rect
    for i in range(1, n_rows):
        at = y + i * h / n_rows
        p.line((x, at), (x + 7, at), width=0.4)
        p.line((x + w - 7, at), (x + w, at), width=0.4)


def _shared_rows(p: Picture, columns: list[tuple[str, str, float, float, int]], y: float, n_programs: int) -> float:
    """Matrices whose tiles of rows are shared by programs in turns; those of program 0 stand out.

    Args:
        columns: kind, name, left, width and number of blocks of columns of each matrix.
        y: middle of the names.
        n_programs: that share the rows.

    Returns:
        The bottom.
    """
    height, gap, top = 14, 10, y + 9
    tiles: dict[int, float] = {}
    dots = []
    for first in (0, n_programs - 1):
        tiles |= {first + i: top + i * height for i in range(3)}
        dots.append(top + 3 * height + 5)
        top += 3 * height + gap
    for tile, above in tiles.items():
        p.text(22, above + 7, f"tile {tile}", 7.5, colour=MUTED)
    for kind, name, x, width, n_blocks in columns:
        p.text(x + width / 2, y, name, 8, ha="center", bold=True)
        for at in dots:
            p.text(x + width / 2, at, "⋮", 8, ha="center")
        w = width / n_blocks
        cells = {(tile, i): (x + i * w, above, w, height) for tile, above in tiles.items() for i in range(n_blocks)}
        p.boxes(kind, [rect for (tile, i), rect in cells.items() if tile % n_programs or i], faint=True)
        p.boxes(kind, [rect for (tile, i), rect in cells.items() if not tile % n_programs and not i])
        for (tile, i), rect in cells.items():
            if width > 20:
                program = f"{tile % n_programs}" if n_blocks == 1 else f"{i}, {tile % n_programs}"
                p.text(rect[0] + w / 2, rect[1] + 7, program, 7, ha="center")
    return top


def _ranges(n_rows: int, step: int) -> str:
    return ", ".join(f"{start}–{min(start + step, n_rows) - 1}" for start in range(0, n_rows, step))


def gelu() -> Picture:
    """Forward, backward, and the sums for the bias."""
    forward, backward, sums = calls("gelu")
    rows, cols = backward.args["x_ptr"].shape
    p = Picture("GELU, and the gradient of the bias before it", f"{SHAPE}: x is {rows:,} × {cols:,}, bf16", 484)
    _gelu_forward(p, 52, forward)
    _gelu_backward(p, 158, backward)

    top, n_rows, step, width = 346, sums.args["n_partials"], sums.args["BLOCK_M"], 400
    title = f"device memory: sums, {n_rows} × {cols:,} in fp32, in true proportions, and dbias"
    p.panel((MARGIN, top, FULL, 98), "memory", title)
    p.column_sums((24, top + 26, width, width * n_rows / cols), n_rows, step, sums.grid[0], top + 74)
    said = [f"{sums.grid[0]} programs of {sums.args['BLOCK_N']} columns. Each adds", f"rows {_ranges(n_rows, step)},"]
    p.lines(24 + width + 12, top + 34, [*said, "in this order in every run."])
    p.legend("read", "written", "sums", "values")
    return p


def _gelu_forward(p: Picture, top: float, call: launch.Call) -> None:
    _panels(p, top, 96, "forward: device memory", "on chip: program 2")
    for kind, name, y in (("read", "x", top + 26), ("written", "y", top + 58)):
        p.text(26, y + 9, name, bold=True)
        for i in range(9):
            p.box(kind, (40 + i * 24, y, 24, 18), str(i), 8, faint=i != 2)
        p.text(40 + 9 * 24 + 6, y + 9, f"…  {call.grid[0] - 1:,}", 8)
    p.box("read", (INSIDE, top + 28, 66, 18), "x")
    p.arrow((INSIDE + 66, top + 37), (INSIDE + 88, top + 37))
    p.box("values", (INSIDE + 88, top + 28, 78, 18), "x·σ(2u)")
    p.arrow((INSIDE + 166, top + 37), (INSIDE + 188, top + 37))
    p.box("written", (INSIDE + 188, top + 28, 66, 18), "y")
    n = call.args["BLOCK_N"]
    p.lines(INSIDE, top + 63, [f"program i takes elements {n:,}·i to {n:,}·i + {n - 1:,}:", "one load, one store"])


def _gelu_backward(p: Picture, top: float, call: launch.Call) -> None:
    n_rows, (n_blocks, n_programs) = call.args["BLOCK_M"], call.grid
    _panels(p, top, 178, "backward: device memory", "on chip: program 0, 0")
    columns = [("read", "x and dy", 66.0, 120.0, n_blocks), ("written", "dx", 200.0, 120.0, n_blocks)]
    bottom = _shared_rows(p, columns, top + 30, n_programs)
    p.text(22, bottom + 10, f"a tile: {n_rows} rows × {call.args['BLOCK_N']:,} columns; on it, its program", 8)
    for x, above, below in ((INSIDE, ("read", "x"), ("written", "dx")), (496, ("read", "dy"), ("sums", "sums += dx"))):
        _tile(p, above[0], (x, top + 24, 120, 22), n_rows, above[1])
        p.arrow((x + 60, top + 46), (x + 60, top + 58))
        p.arrow((x + 60, top + 78), (x + 60, top + 90))
        _tile(p, below[0], (x, top + 90, 120, 22), n_rows, below[1])
    p.box("values", (INSIDE, top + 58, 254, 20), "dx = dy·(s + x·s·(1 − s)·2u′),   s = σ(2u)")
    said = [f"tiles 0, {n_programs}, {2 * n_programs}, … in this order; the next one is"]
    said += ["loaded meanwhile. After the last one the rows of", "sums are added, and written once"]
    p.lines(INSIDE, top + 130, said)


def layer_norm() -> Picture:
    """Forward, backward, and the sums over rows."""
    forward, backward, sums = calls("layer_norm")
    rows, cols = backward.args["x_ptr"].shape
    subtitle = f"{SHAPE}: {rows:,} rows of {cols:,}; stream fp32, branch and y bf16"
    p = Picture("LayerNorm behind an addition", subtitle, 566)
    _layer_norm_forward(p, 52, forward)
    _layer_norm_backward(p, 238, backward)

    top, n_rows, step, width = 424, sums.args["n_partials"], sums.args["BLOCK_M"], 190
    title = f"device memory: partial sums, {sums.grid[1]} × {n_rows} × {cols:,} in fp32, in true proportions"
    p.panel((MARGIN, top, FULL, 106), "memory", f"{title}, and their sums")
    for i, name in enumerate(("dweight", "dbias", "dbranch_bias")):
        left = 26 + i * (width + 10)
        p.column_sums((left, top + 24, width, width * n_rows / cols), n_rows, step, sums.grid[0], top + 72)
        p.text(left + width, top + 65, name, 8, ha="right")
    said = f"{sums.grid[0]} × {sums.grid[1]} programs of {sums.args['BLOCK_N']} columns; each adds rows"
    p.text(26, top + 93, f"{said} {_ranges(n_rows, step)}, in this order in every run.")
    p.legend("read", "written", "saved", "sums", "values")
    return p


def _row_tiles(p: Picture, y: float, call: launch.Call, words: str, steps: list[tuple[str, str]]) -> None:
    """A tile of rows with its masked lanes, in true proportions, and what becomes of it."""
    lanes, cols = call.args["BLOCK_N"], call.args["N_COLS"]
    width = 254 * cols / lanes
    _tile(p, "read", (INSIDE, y, width, 22), call.args["BLOCK_M"], words)
    p.box("skipped", (INSIDE + width, y, 254 - width, 22), "masked")
    y += 22
    for kind, step in steps:
        p.arrow((INSIDE + width / 2, y), (INSIDE + width / 2, y + 10))
        p.box(kind, (INSIDE, y + 10, width, 18), step, 8)
        y += 28


def _layer_norm_forward(p: Picture, top: float, call: launch.Call) -> None:
    _panels(p, top, 176, "forward: device memory", "on chip: program 0")
    columns = [("read", "residual", 66.0, 54.0, 1), ("read", "branch", 126.0, 54.0, 1), ("saved", "r", 190.0, 54.0, 1)]
    columns += [("written", "y", 250.0, 54.0, 1), ("saved", "stats", 310.0, 12.0, 1)]
    bottom = _shared_rows(p, columns, top + 30, call.grid[0])
    p.text(22, bottom + 10, f"a tile: {call.args['BLOCK_M']} rows; on it, its program. stats: mean, rstd", 8)
    steps = [("saved", "r = residual + (branch + bias)"), ("values", "mean, r − mean, variance, rstd")]
    _row_tiles(p, top + 24, call, "residual, branch", [*steps, ("written", "y = (r − mean)·rstd·weight + bias")])
    said = [f"a tile has {call.args['BLOCK_N']:,} lanes for {call.args['N_COLS']:,} columns. The three"]
    p.lines(INSIDE, top + 145, [*said, "vectors are loaded once per program"])


def _layer_norm_backward(p: Picture, top: float, call: launch.Call) -> None:
    _panels(p, top, 176, "backward: device memory", "on chip: program 0")
    columns = [("read", name, 66.0 + 44 * i, 40.0, 1) for i, name in enumerate(("dy", "r", "dr"))]
    columns += [
        ("read", "stats", 198.0, 12.0, 1),
        ("written", "dx", 224.0, 46.0, 1),
        ("written", "dbranch", 274.0, 46.0, 1),
    ]
    bottom = _shared_rows(p, columns, top + 30, call.grid[0])
    p.text(22, bottom + 10, f"a tile: {call.args['BLOCK_M']} rows. dr: gradient of r from later layers", 8)
    _row_tiles(
        p, top + 24, call, "dy, r, dr", [("values", "x_hat, and two means per row"), ("written", "dx and dbranch")]
    )
    for i, name in enumerate(("Σ dy·x_hat", "Σ dy", "Σ dx")):
        _tile(p, "sums", (INSIDE + i * 86, top + 112, 82, 20), call.args["BLOCK_M"], name)
    p.lines(
        INSIDE,
        top + 146,
        ["three sums stay in registers over all tiles of a", "program; their rows are written once, at the end"],
    )


def cross_entropy() -> Picture:
    """The head: chunks of logits, and the two passes over a row."""
    first, *others, mean = calls("cross_entropy")
    chunk, stride = first.grid[0], first.args["stride_row"]
    p = Picture("Cross-entropy of the tied head", f"{SHAPE}: {N:,} rows, {V:,} classes, width {C}; bf16", 574)
    _chunks(p, 52, chunk, 1 + len(others))

    top = 52
    p.panel(
        (CHIP, top, WIDTH - MARGIN - CHIP, 314),
        "memory",
        f"per chunk, in one buffer of {chunk * stride * 2 / 1e6:,.0f} MB",
    )
    for i, (kind, words, how) in enumerate(
        (
            ("buffer", "logits = hidden·weightᵀ", "torch's matmul"),
            ("buffer", f"logits ← (p − onehot)·2{POWER}", f"one kernel, {chunk:,} programs"),
            ("saved", "dhidden = logits·weight", "torch's matmul, result in fp32"),
            ("saved", "dweight += logitsᵀ·hidden", "torch's matmul, result in fp32"),
        )
    ):
        y = top + 32 + i * 50
        p.box(kind, (CHIP + 30, y, 232, 20), words)
        p.text(CHIP + 17, y + 10, str(i + 1), bold=True, ha="center")
        p.text(CHIP + 30, y + 29, how, 8, colour=MUTED)
    said = [f"All logits would take {N * stride * 2 / 1e9:.2f} GB, and their gradient"]
    said += ["as much again. In backward one pass scales both", f"saved gradients by dloss/(n_counted·2{POWER})."]
    p.lines(INSIDE, top + 246, said, step=15)

    _row_passes(p, 376, first, mean)
    p.legend("read", "written", "saved", "buffer", "masked")
    return p


def _chunks(p: Picture, top: float, chunk: int, n_chunks: int) -> None:
    """Hidden states, weight, gradients and logits in true proportions."""
    p.panel((MARGIN, top, 318, 314), "memory", "device memory, in true proportions")
    x, y, height, now = 78, top + 58, 204, 3
    scale = height / N
    wide, thin = V * scale, C * scale
    rects = [(x, y + s * scale, wide, min(chunk, N - s) * scale) for s in range(0, N, chunk)]
    p.boxes("skipped", [rect for i, rect in enumerate(rects) if i != now], faint=True)
    p.boxes("buffer", [rects[now]])
    for i, (_, above, _, h) in enumerate(rects):
        words = f"{i}: the buffer, {chunk:,} × {V:,}" if i == now else str(i)
        p.text(x + wide / 2, above + h / 2, words, 7.5, ha="center")
    for kind, name, left, at in (
        ("read", f"hidden, {N:,} × {C}", x - 14, x - 22),
        ("saved", "dhidden", x + wide + 12, x + wide + 24),
    ):
        p.boxes(kind, [(left, y, thin, height)], faint=True, line=0.4)
        p.boxes(kind, [(left, rects[now][1], thin, rects[now][3])], line=0.4)
        p.text(at, y + height / 2, name, 8, ha="center", turned=True)
    p.boxes("read", [(x, y - 12, wide, thin)], line=0.4)
    p.text(x + wide / 2, y - 21, f"weightᵀ, {C} × {V:,}", 8, ha="center")
    p.boxes("saved", [(x, y + height + 10, wide, thin)], line=0.4)
    p.text(x + wide / 2, y + height + 23, "dweightᵀ: every chunk adds to it, in fp32", 8, ha="center")
    p.text(MARGIN + 9, top + 302, f"{n_chunks} chunks, one after another; the grey ones are not in memory", 8)


def _row_passes(p: Picture, top: float, call: launch.Call, mean: launch.Call) -> None:
    p.panel((MARGIN, top, FULL, 162), "chip", "step 2, on chip: program r has row r of the chunk")
    x, scale, block, target = 90, 500 / V, call.args["BLOCK_N"], V * 5 // 13
    for kind, y, words in (("read", top + 30, "first pass"), ("written", top + 62, "second pass")):
        p.text(x - 8, y + 9, words, 8, ha="right")
        for i, start in enumerate(range(0, V, block)):
            is_whole = start + block <= V
            rect = (x + start * scale, y, min(block, V - start) * scale, 18)
            p.box(kind if is_whole else "masked", rect, str(i), 8)
        p.line((x + target * scale, y - 4), (x + target * scale, y + 22), width=1.6)
    p.text(x + target * scale, top + 94, "target", 8, ha="center")
    said = [
        f"steps of {block:,} logits, the last of {V % block:,}. First pass: m = max, rest = Σ exp(x − m) without target"
    ]
    said += [f"Second pass, mostly from L2: (p − onehot)·2{POWER} over the logits; −rest/l·2{POWER} at the target"]
    said += [f"Then one program adds all {N:,} losses in a fixed order, {mean.args['BLOCK_N']:,} per step"]
    p.lines(24, top + 114, said, 7.9, 15)


def embedding() -> Picture:
    """Forward of one program, and an example of torch's backward."""
    (call,) = calls("embedding")
    n_rows = call.args["BLOCK_M"]
    p = Picture("Embedding of tokens and positions", f"{SHAPE}: {B} sequences of {T:,} ids, width {C}, fp32", 482)
    _gather(p, 52, call)

    x, top = 394, 52
    p.panel((x, top, WIDTH - MARGIN - x, 226), "chip", "on chip: program (2, 0, 0)")
    _tile(p, "read", (x + 12, top + 28, 208, 32), n_rows, f"token rows, {n_rows} × {call.args['BLOCK_N']}")
    p.text(x + 116, top + 70, "+", 10, ha="center", bold=True)
    p.box("read", (x + 12, top + 80, 208, 8))
    p.text(x + 12, top + 99, "row 2 of position_weight, read once for all", 8)
    p.arrow((x + 116, top + 108), (x + 116, top + 122))
    _tile(p, "written", (x + 12, top + 122, 208, 32), n_rows, f"y, {n_rows} × {call.args['BLOCK_N']}")
    p.lines(x + 12, top + 172, ["added in fp32, rounded once. An id outside", "the vocabulary clears a flag"], 8, 14)

    _sorted_sums(p, 288)
    p.legend("read", "written")
    return p


def _gather(p: Picture, top: float, call: launch.Call) -> None:
    n_rows, (n_positions, n_blocks, n_strips) = call.args["BLOCK_M"], call.grid
    p.panel((MARGIN, top, 370, 226), "memory", "forward: device memory")
    x, y, side, tokens, positions, width, height = 46, top + 46, 9, 150, 272, 96, 144
    ids = {(t, b): (x + t * side, y + b * side, side, side) for t in range(9) for b in range(2 * n_rows)}
    mine = [(2, b) for b in range(n_rows)]
    p.boxes("read", [rect for at, rect in ids.items() if at not in mine], faint=True, line=0.4)
    p.boxes("read", [ids[at] for at in mine])
    p.text(x + 2.5 * side, y + 2 * n_rows * side + 9, "t = 2", 8, ha="center")
    strip = width / n_strips
    for left, tall in ((tokens, height), (positions, T * width / C)):
        p.boxes("read", [(left, y, width, tall)], faint=True)
        for i in range(1, n_strips):
            p.line((left + i * strip, y), (left + i * strip, y + tall), width=0.3, dashed=True)
    for b in range(n_rows):
        row = y + height * (0.07 + 0.86 * ((b * 5 + 3) % n_rows) / n_rows)
        p.boxes("read", [(tokens, row, strip, 3)], line=0.4)
        p.line((x + 3 * side, y + (b + 0.5) * side), (tokens, row + 1.5), colour=MUTED, width=0.4)
    p.boxes("read", [(positions, y + 2.5 * width / C, strip, 3)], line=0.4)
    for middle, name, *shape in (
        (x + 4.5 * side, "idx", B, T),
        (tokens + width / 2, "token_weight", V, C),
        (positions + width / 2, "position_weight", T, C),
    ):
        p.text(middle, y - 20, str(name), 8, bold=True, ha="center")
        p.text(middle, y - 8, " × ".join(f"{size:,}" for size in shape), 8, ha="center")
    words = f"grid ({n_positions:,} positions, {n_blocks} blocks of sequences, {n_strips} blocks of columns)"
    p.text(24, top + 214, words, 8)


def _sorted_sums(p: Picture, top: float) -> None:
    ids = (7, 3, 7, 5, 3, 9, 7, 5)
    p.panel((MARGIN, top, FULL, 158), "memory", f"backward, by torch's kernels: an example of {len(ids)} ids")
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    x, w = 130, 54
    for y, words in ((37, "ids"), (75, "sorted"), (107, "sums per id")):
        p.text(x - 10, top + y, words, 8, ha="right")
    for place, i in enumerate(order):
        p.box("read", (x + i * w, top + 28, w - 4, 18), f"{i}: id {ids[i]}", 8)
        p.line((x + i * w + 25, top + 46), (x + place * w + 25, top + 66), width=0.6, colour=MUTED)
        p.box("read", (x + place * w, top + 66, w - 4, 18), f"dy[{i}]", 8)
    for token in sorted(set(ids)):
        places = [place for place, i in enumerate(order) if ids[i] == token]
        left, right = x + places[0] * w, x + (places[-1] + 1) * w - 4
        p.arrow(((left + right) / 2, top + 84), ((left + right) / 2, top + 98))
        p.box("written", (left, top + 98, right - left, 18), f"dtoken[{token}]", 7.5)
    said = "The rows of an id are added in their order, and nothing is added by atomics: the same bits in every run."
    p.lines(24, top + 134, [said, "dposition[t] is the sum of dy[b, t] over b."], 8, 14)


def sublayer() -> Picture:
    """Half a block: attention, and the MLP."""
    p = Picture("Half a block as one op", f"{SHAPE}: heights of boxes are elements per token, in C", 600)
    _half(p, 52, "attention", "attention", "c_attn", H)
    _half(p, 310, "MLP", "GELU", "c_fc", None)
    p.legend("read", "written", "saved", "sums")
    p.arrow((470, 585), (500, 585), colour="#7c3aed")
    p.text(506, 585, "backward reads it again", 8)
    return p


def _half(p: Picture, top: float, name: str, op: str, linear: str, n_head: int | None) -> None:
    """What the forward pass writes, from left to right; below it what backward writes, from right to left."""
    p.panel((MARGIN, top, FULL, 250), "memory", f"{name}: what is in device memory, and the ops between")
    width, gap, unit = 64, 62, 17
    kept = saved(n_head, 0)
    h, x = kept["h"], kept["x"]
    columns = (
        ([("read", "residual", 1), ("read", "branch", 1)], [("written", "dresidual", 1), ("written", "dbranch", 1)]),
        ([("saved", "r", 1), ("saved", "normed", 1)], [("written", "dnormed", 1)]),
        ([("saved", f"h: {h}·C", h)], [("written", "dh", h)]),
        ([("saved", f"x: {x}·C", x)], [("written", "dx", x)]),
        ([("written", "out", 1)], [("read", "dout", 1)]),
    )
    between = (
        ("add,\nLayerNorm", "LayerNorm"),
        (f"matmul\n{linear}", "matmuls"),
        (op, op),
        ("matmul\nc_proj", "matmuls"),
    )
    forward, backward = top + 64, top + 164
    for i, stacks in enumerate(columns):
        left, ends = 35 + i * (width + gap), []
        for middle, stack in zip((forward, backward), stacks, strict=True):
            y = middle - (sum(n for _, _, n in stack) * unit + 4 * (len(stack) - 1)) / 2
            ends.append(y)
            for kind, words, n in stack:
                p.box(kind, (left, y, width, n * unit), words, 8)
                y += n * unit + 4
            ends.append(y - 4)
        if 0 < i < len(columns) - 1:
            p.arrow((left + width / 2, ends[1]), (left + width / 2, ends[2]), colour="#7c3aed")
    for i, (there, back) in enumerate(between):
        left, right = 38 + i * (width + gap) + width, 32 + (i + 1) * (width + gap)
        p.arrow((left, forward), (right, forward))
        p.text((left + right) / 2, forward - (16 if "\n" in there else 9), there, 7.5, ha="center")
        p.arrow((right, backward), (left, backward))
        p.text((left + right) / 2, backward - 9, back, 7.5, ha="center")
    p.box("sums", (35, top + 206, width + gap, 16), "Σ: dw, db, dbranch_bias", 8)
    p.box("sums", (35 + 2 * (width + gap), top + 206, width, 16), "Σ dh: dbias", 8)
    said = ", ".join(f"{sum(saved(n_head, level).values())}·C at level {level}" for level in range(3))
    p.text(24, top + 238, f"saved per token, by level of recomputation: {said}", 8)
