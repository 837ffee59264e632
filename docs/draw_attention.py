"""Pictures of attention: forward, backward, and of one query to a cache."""

from typing import NamedTuple

from docs.canvas import FULL, MARGIN, MUTED, WIDTH, Picture, Rect
from docs.launches import B_DECODE, CAPABILITY, SHAPE, B, D, H, T, calls
from kernels import launch

PLACE = 2
"""of the program that stands out, among those of its head"""
HEADS = f"{SHAPE}: {B} × {H} heads of {T:,} × {D}, bf16; all tiles in true proportions"


class Scores(NamedTuple):
    """The tiles of a head's scores, and around them the tensors that belong to its queries and keys."""

    picture: Picture
    left: float
    top: float
    size: float
    block_m: int
    block_n: int

    @property
    def scale(self) -> float:
        """Points per query or key."""
        return self.size / T

    def staircase(self, rows: range, cols: range) -> None:
        """All tiles; those of one program, of queries `rows` and keys `cols`, stand out."""
        found: dict[tuple[str, bool], list[Rect]] = {}
        height, width = self.block_m * self.scale, self.block_n * self.scale
        for m in range(0, T, self.block_m):
            for n in range(0, T, self.block_n):
                is_full = n + self.block_n - 1 <= m
                kind = "skipped" if n >= m + self.block_m else "read" if is_full else "masked"
                mine = m in rows and n in cols and kind != "skipped"
                rect = (self.left + n * self.scale, self.top + m * self.scale, width, height)
                found.setdefault((kind, not mine), []).append(rect)
        for (kind, faint), rects in sorted(found.items(), key=lambda item: not item[0][1]):
            self.picture.boxes(kind, rects, faint, line=0.5)
        corner = self.left + self.size, self.top + self.size
        self.picture.line((self.left, self.top), corner, width=0.6)

    def down(self, kind: str, name: str, x: float, width: float, mine: range) -> None:
        """A tensor with a row per query, x to the right of the scores' left edge; `mine` stands out."""
        starts, height = range(0, T, self.block_m), self.block_m * self.scale
        rects = {m: (self.left + x, self.top + m * self.scale, width, height) for m in starts}
        self.picture.boxes(kind, [rect for m, rect in rects.items() if m not in mine], faint=True, line=0.5)
        self.picture.boxes(kind, [rect for m, rect in rects.items() if m in mine], line=0.5)
        self.picture.text(self.left + x + width / 2, self.top - 8, name, 8, ha="center", bold=True)

    def across(self, kind: str, name: str, y: float, mine: range) -> None:
        """A tensor with a column per key, y below the scores' top edge; `mine` stands out."""
        starts, width = range(0, T, self.block_n), self.block_n * self.scale
        rects = {n: (self.left + n * self.scale, self.top + y, width, D * self.scale) for n in starts}
        self.picture.boxes(kind, [rect for n, rect in rects.items() if n not in mine], faint=True, line=0.5)
        self.picture.boxes(kind, [rect for n, rect in rects.items() if n in mine], line=0.5)
        self.picture.text(self.left - 8, self.top + y + D * self.scale / 2, name, 8, ha="right", bold=True)

    def steps(self, queries: range, size: float) -> None:
        """Numbers on the tiles of a block of queries, in the order of the kernel's two loops."""
        diagonal = queries.start // self.block_n * self.block_n
        starts = [*range(diagonal, queries.stop, self.block_n), *range(0, diagonal, self.block_n)]
        y = self.top + (queries.start + self.block_m / 2) * self.scale
        for step, n in enumerate(starts):
            x = self.left + (n + self.block_n / 2) * self.scale
            self.picture.text(x, y, str(step), size, ha="center")


def _places(n_blocks: int, is_reversed: bool) -> list[int]:
    return [n_blocks - 1 - i if is_reversed else i for i in range(n_blocks)]


def attention_forward() -> Picture:
    """Forward."""
    (call,) = calls("attention_forward")
    p = Picture("Causal attention, forward", HEADS, 590)
    block_m, n_blocks = call.args["BLOCK_M"], call.grid[1]
    start = (n_blocks - 1 - PLACE) * block_m
    queries = range(start, start + block_m)

    p.panel((MARGIN, 52, 380, 352), "memory", "device memory: q, k, v, o and lse of one head")
    scores = Scores(p, 84, 128, 256, block_m, call.args["BLOCK_N"])
    width, size = D * scores.scale, scores.size
    scores.staircase(queries, range(T))
    scores.down("read", "q", -22, width, queries)
    scores.down("saved", "o", size + 6, width, queries)
    scores.down("saved", "lse", size + 30, 4, queries)
    for name, below in (("kᵀ", -52), ("vᵀ", -31)):
        scores.across("read", name, below, range(queries.stop))
    scores.steps(queries, 7.5)
    for i, place in enumerate(_places(n_blocks, True)):
        p.text(44, scores.top + (i + 0.5) * block_m * scores.scale, str(place), ha="center", bold=place == PLACE)
    p.text(30, scores.top + size / 2, "place of the program in its head", 8, ha="center", turned=True, colour=MUTED)
    words = f"on tiles: the steps of the program at place {PLACE}, the diagonal first"
    p.text(scores.left, scores.top + size + 12, words, 8)

    _forward_on_chip(p, 406, 52, call)
    _order(p, 414, call)
    p.legend("read", "masked", "skipped", "saved", "sums", "values")
    return p


def _forward_on_chip(p: Picture, x: float, top: float, call: launch.Call) -> None:
    p.panel((x, top, WIDTH - MARGIN - x, 352), "chip", f"on chip: the program at place {PLACE}")
    tall, flat, deep = (length * 0.5 for length in (call.args["BLOCK_M"], call.args["BLOCK_N"], D))
    y = top + 40 + deep
    q, s, weights, acc = x + 12, x + 50, x + 96, x + 142
    for kind, left, above, w, h, name in (
        ("read", q, y, deep, tall, "q"),
        ("read", s, y - deep - 6, flat, deep, "kᵀ"),
        ("values", s, y, flat, tall, "s"),
        ("values", weights, y, flat, tall, "p"),
        ("read", acc, y - flat - 6, deep, flat, "v"),
        ("sums", acc, y, deep, tall, "acc"),
    ):
        p.box(kind, (left, above, w, h), name)
    p.arrow((s + flat, y + tall / 2), (weights, y + tall / 2))
    p.arrow((weights + flat, y + tall / 2), (acc, y + tall / 2))
    for i, name in enumerate(("m_i", "l_i")):
        p.box("sums", (acc + deep + 9 + i * 17, y, 4, tall))
        p.text(acc + deep + 11 + i * 17, y - 7, name, 7.5, ha="center")
    p.text(x + 12, y + tall + 20, f"per step, with {call.args['BLOCK_N']} keys and values:")
    said = ["s = q·kᵀ·log₂e/√D,  −∞ behind the mask", "m_new = max(m_i, max s)", "p = exp2(s − m_new)"]
    said += ["alpha = exp2(m_i − m_new)", "l_i = l_i·alpha + Σ p", "acc = acc·alpha + p·v", "m_i = m_new"]
    p.lines(x + 20, y + tall + 35, said, step=14)
    p.text(x + 12, y + tall + 138, "after the last step:")
    p.lines(x + 20, y + tall + 153, ["o = acc/l_i", "lse = m_i + log₂ l_i"], step=14)


def _order(p: Picture, top: float, call: launch.Call) -> None:
    group, n_blocks, n_groups = call.grid
    title = f"order of programs: grid ({group} heads of a group, {n_blocks} places, {n_groups} groups)"
    p.panel((MARGIN, top, FULL, 140), "chip", title)
    for i in range(n_blocks):
        y, steps = top + 25 + i * 12, (n_blocks - i) * call.args["BLOCK_M"] // call.args["BLOCK_N"]
        p.text(100, y + 5, f"{i * group:,} – {(i + 1) * group - 1:,}", 8, ha="right")
        p.box("read", (108, y, 8 * steps, 10))
        p.text(108 + 8 * steps + 5, y + 5, f"{steps} steps", 7.5)
    p.text(24, top + 128, "programs of the first group: those with the most steps start first", 8)
    for i in range(n_groups):
        words = f"{i * group}–\n{(i + 1) * group - 1}"
        p.box("read", (350 + i * 43, top + 28, 39, 30), words, 7, faint=i > 0)
    mebibytes = 2 * group * T * D * 2 // 2**20
    said = [f"{n_groups} groups of {group} heads, one after another: no more heads"]
    said += [
        "than multiprocessors, and no more keys and values",
        f"than {mebibytes} MiB at a time, so that they stay in L2",
    ]
    p.lines(350, top + 74, said)


def attention_backward() -> Picture:
    """Both kernels of backward, and the sums for the bias."""
    dq, dkdv, *sums = calls("attention_backward")
    p = Picture("Causal attention, backward", HEADS, 654)
    width = 301
    right = WIDTH - MARGIN - width
    for x, name in ((MARGIN, "dq: a program per block of queries"), (right, "dk and dv: a program per block of keys")):
        p.panel((x, 52, width, 302), "memory", f"{name}, one head")
        p.panel((x, 364, width, 134), "chip", f"on chip: the program at place {PLACE}")
    _dq(p, MARGIN, dq)
    _dkdv(p, right, dkdv)
    _bias_sums(p, 508, dq.grid[1], sums)
    p.legend("read", "masked", "skipped", "written", "sums", "values")
    return p


def _dq(p: Picture, x: float, call: launch.Call) -> None:
    block_m, block_n, n_blocks = call.args["BLOCK_M"], call.args["BLOCK_N"], call.grid[1]
    start = (n_blocks - 1 - PLACE) * block_m
    queries = range(start, start + block_m)
    scores = Scores(p, x + 90, 134, 160, block_m, block_n)
    wide, size = D * scores.scale, scores.size
    scores.staircase(queries, range(T))
    for name, left, width in (("lse", -60, 4), ("q", -49, wide), ("do", -33, wide), ("o", -17, wide)):
        scores.down("read", name, left, width, queries)
    scores.down("written", "dq", size + 6, wide, queries)
    scores.down("written", "delta", size + 30, 4, queries)
    for name, below in (("kᵀ", -50), ("vᵀ", -33)):
        scores.across("read", name, below, range(queries.stop))
    scores.steps(queries, 6)
    for i, place in enumerate(_places(n_blocks, True)):
        p.text(x + 16, scores.top + (i + 0.5) * block_m * scores.scale, str(place), 8, ha="center", bold=place == PLACE)
    said = ["at the left: place of the program in its head"]
    said += [
        f"on tiles: steps of the program at place {PLACE}, the diagonal first",
        "longest first: place 0 has the most keys",
    ]
    p.lines(x + 14, scores.top + size + 20, said, 8)

    m, n, d = (length * 0.42 for length in (block_m, block_n, D))
    y = 364 + 26 + d
    for kind, left, above, w, h, name in (
        ("read", 12, y, d, m, "q"),
        ("read", 43, y, d, m, "do"),
        ("read", 80, y - d - 4, n, d, "kᵀ"),
        ("read", 113, y - d - 4, n, d, "vᵀ"),
        ("values", 80, y, n, m, "p"),
        ("values", 113, y, n, m, "ds"),
        ("sums", 148, y, d, m, "dq"),
    ):
        p.box(kind, (x + left, above, w, h), name, 7)
    said = [
        "first: delta = Σ o·do",
        f"per step, with {block_n} keys:",
        "p = exp2(q·kᵀ·c − lse)",
        "ds = p·(do·vᵀ − delta)",
    ]
    p.lines(x + 192, 398, [*said, "dq += ds·k", "last: dq/√D", "c = log₂e/√D"], 8, 14)


def _dkdv(p: Picture, x: float, call: launch.Call) -> None:
    block_m, block_n, n_blocks = call.args["BLOCK_M"], call.args["BLOCK_N"], call.grid[1]
    start = PLACE * block_n
    keys, queries = range(start, start + block_n), range(start, T)
    scores = Scores(p, x + 90, 134, 160, block_m, block_n)
    wide, size = D * scores.scale, scores.size
    scores.staircase(range(T), keys)
    for name, left, width in (("q", -75, wide), ("do", -58, wide), ("lse", -38, 4.0), ("delta", -18, 4.0)):
        scores.down("read", name, left, width, queries)
    for kind, name, y in (
        ("read", "kᵀ", -50),
        ("read", "vᵀ", -33),
        ("written", "dkᵀ", size + 6),
        ("written", "dvᵀ", size + 22),
    ):
        scores.across(kind, name, y, keys)
    for i, place in enumerate(_places(n_blocks, False)):
        p.text(
            scores.left + (i + 0.5) * block_n * scores.scale,
            scores.top - 12,
            str(place),
            8,
            ha="center",
            bold=place == PLACE,
        )
    at = scores.left + (start + block_n / 2) * scores.scale
    p.arrow((at, scores.top + start * scores.scale + 3), (at, scores.top + size - 4))
    p.text(x + 14, scores.top + size + 46, "longest first: place 0 has the most queries", 8)

    m, n, d = (length * 0.42 for length in (block_m, block_n, D))
    y = 364 + 26 + d
    for kind, left, above, w, h, name in (
        ("read", 12, y, d, n, "k"),
        ("read", 43, y, d, n, "v"),
        ("read", 80, y - d - 4, m, d, "qᵀ"),
        ("read", 102, y - d - 4, m, d, "doᵀ"),
        ("values", 80, y, m, n, "pᵀ"),
        ("values", 102, y, m, n, "dsᵀ"),
        ("sums", 126, y, d, n, "dk"),
        ("sums", 157, y, d, n, "dv"),
    ):
        p.box(kind, (x + left, above, w, h), name, 7 if w > 20 else 6)
    said = [f"per step, with {block_m} queries:", "pᵀ = exp2(k·qᵀ·c − lse)", "dv += pᵀ·do", "dsᵀ = pᵀ·(v·doᵀ − delta)"]
    p.lines(x + 192, 398, [*said, "dk += dsᵀ·q", "last: dk/√D"], 8, 14)


def _bias_sums(p: Picture, top: float, n_blocks: int, sums: list[launch.Call]) -> None:
    title = "device memory: column sums of dq, dk and dv, for the bias of c_attn, fp32, in true proportions"
    p.panel((MARGIN, top, FULL, 112), "memory", title)
    scale = 0.085
    left: float = 28
    for call, names in zip(sums, (("dq",), ("dk", "dv")), strict=True):
        n_rows, n_cols = call.args["partials_ptr"].shape
        w, h = n_cols * scale, n_rows * scale
        p.column_sums((left, top + 34, w, h), n_rows, call.args["BLOCK_M"], call.grid[0], top + 92)
        for i, name in enumerate(names):
            words = f"{n_rows} × {n_cols // len(names)}: {name}"
            p.text(left + w * (i + 0.5) / len(names), top + 27, words, 7.5, ha="center")
        left += w + 12
    said = [f"a program writes its {D} columns of row b·{n_blocks} + block; then"]
    said += [" and ".join(str(call.grid[0]) for call in sums) + f" programs of {sums[0].args['BLOCK_N']} columns add"]
    said += [f"{sums[0].args['BLOCK_M']} rows per step, in the same order in every run"]
    p.lines(left + 8, top + 42, said, 8, 15)


LENGTHS = (T, T * 5 // 8 + 30, T // 10)
"""of the sequences that are drawn, in keys: examples"""
CHOSEN = (1, 4)
"""sequence and tile of the program that stands out"""


def decode() -> Picture:
    """One query per head: both kernels."""
    tiles, combine = calls("decode")
    subtitle = f"d12, a cache of {T:,} keys, launched for sm_{CAPABILITY}: {B_DECODE} × {H} heads of one query"
    p = Picture("Decode attention", subtitle, 560)
    _cache(p, 52, tiles)
    _decode_on_chip(p, 52, tiles)
    _tile_sums(p, 330, combine)
    p.legend("read", "masked", "skipped", "sums", "written", "values")
    return p


def _cache(p: Picture, top: float, call: launch.Call) -> None:
    n_tiles, block_n = call.args["n_tiles"], call.args["BLOCK_N"]
    p.panel((MARGIN, top, 410, 268), "memory", "device memory: keys and values of head 0, in true proportions")
    left, width, height = 64, block_n * 0.34, D * 0.34
    for b, length in enumerate(LENGTHS):
        y = top + 46 + b * 72
        p.text(left, y - 10, f"sequence {b}: {length:,} keys", 8, bold=True)
        for name, above in (("k", y), ("v", y + height + 3)):
            found: dict[tuple[str, bool], list[Rect]] = {}
            for tile in range(n_tiles):
                keys = length - tile * block_n
                kind = "skipped" if keys <= 0 else "read" if keys >= block_n else "masked"
                found.setdefault((kind, (b, tile) != CHOSEN), []).append((left + tile * width, above, width, height))
            for (kind, faint), rects in sorted(found.items(), key=lambda item: item[0][0] != "skipped"):
                p.boxes(kind, rects, faint)
            p.text(left - 10, above + height / 2, name, bold=True, ha="right")
        for tile in range(n_tiles):
            p.text(left + (tile + 0.5) * width, y + height / 2, str(b * H * n_tiles + tile), 7, ha="center")
    p.text(left, top + 256, f"on a tile: its program, ((sequence·{H}) + head)·{n_tiles} + tile", 8)


def _decode_on_chip(p: Picture, top: float, call: launch.Call) -> None:
    x, y, (sequence, tile) = 432, top + 46, CHOSEN
    program = sequence * H * call.args["n_tiles"] + tile
    p.panel((x, top, WIDTH - MARGIN - x, 268), "chip", f"on chip: program {program}")
    deep, tall = D * 0.5, call.args["BLOCK_N"] * 0.5
    for kind, left, above, w, h, name in (
        ("read", 12, y, deep, tall, "k"),
        ("read", 104, y, deep, tall, "v"),
        ("read", 12, y - 12, deep, 4, ""),
        ("values", 62, y, 4, tall, ""),
        ("values", 86, y, 4, tall, ""),
        ("sums", 104, y + tall + 8, deep, 4, ""),
    ):
        p.box(kind, (x + left, above, w, h), name)
    p.text(x + 17 + deep, y - 10, "q", 8)
    p.text(x + 64, y - 6, "s", 8, ha="center")
    p.text(x + 88, y - 6, "p", 8, ha="center")
    p.text(x + 109 + deep, y + tall + 10, "acc", 8)
    p.arrow((x + 12 + deep, y + tall / 2), (x + 62, y + tall / 2))
    p.arrow((x + 66, y + tall / 2), (x + 86, y + tall / 2))
    p.arrow((x + 104 + deep / 2, y + tall), (x + 104 + deep / 2, y + tall + 8))
    said = ["s = k·q·log₂e/√D", "m = max s", "p = exp2(s − m)", "l = Σ p", "acc = Σ p·v, over the keys"]
    p.lines(x + 12, top + 112, said, step=15)
    said = ["No matrix instructions: with one", "query they would not help.", "Tiles beyond the length of a"]
    p.lines(x + 12, top + 200, [*said, "sequence are not read."], step=15)


def _tile_sums(p: Picture, top: float, call: launch.Call) -> None:
    """What the tiles of each sequence leave in memory, and the kernel that adds it."""
    n_tiles, height, y = call.args["n_tiles"], 7, top + 48
    p.panel((MARGIN, top, 410, 194), "memory", "device memory: acc, m and l of each tile, fp32")
    for b, length in enumerate(LENGTHS):
        left, n_used, below = 64 + b * 122, launch.cdiv(length, call.args["BLOCK_N"]), y + n_tiles * height
        for kind, rows in (("skipped", range(n_used, n_tiles)), ("sums", range(n_used))):
            for at, width in ((0, 64), (70, 5), (82, 5)):
                p.boxes(kind, [(left + at, y + row * height, width, height) for row in rows], line=0.5)
        p.text(left, y - 20, f"sequence {b}", 8, bold=True)
        for middle, name in ((32, "acc"), (72.5, "m"), (84.5, "l")):
            p.text(left + middle, y - 7, name, 8, ha="center")
        p.arrow((left + 32, below), (left + 32, below + 14))
        p.box("written", (left, below + 14, 64, 6))
        p.text(left + 70, below + 17, "o", 8)
    for tile in (0, n_tiles - 1):
        p.text(58, y + (tile + 0.5) * height, f"tile {tile}", 7, ha="right", colour=MUTED)

    x = 432
    p.panel((x, top, WIDTH - MARGIN - x, 194), "chip", f"on chip: {call.grid[0]} programs, one per head")
    p.text(x + 12, top + 36, f"per step, of {call.args['BLOCK_M']} tiles in their order:")
    said = ["m_new = max(m_i, max m)", "alpha = exp2(m_i − m_new)", "w = exp2(m − m_new)"]
    p.lines(x + 20, top + 52, [*said, "l_i = l_i·alpha + Σ w·l", "o = o·alpha + Σ w·acc"], step=15)
    said = ["last: o/l_i", "Tiles start at the same keys in", "every call: so do their sums."]
    p.lines(x + 12, top + 136, said, step=15)
