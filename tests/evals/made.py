"""Items in the shape of HellaSwag, LAMBADA and WikiText, drawn with a seed: blanks, brackets, capitals and characters
of several bytes stand wherever the rules treat them."""

import json
import random
from pathlib import Path

WORDS = "a the man woman dog Paris O'Neil 1984 don't naïve 東京 roof, ladder. runs jumps (slowly) she's over under café"


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS.split(), k=rng.randint(low, high)))


def hellaswag(path: Path, n: int, longest: int = 30, seed: int = 7) -> Path:
    """n questions with all fields of HellaSwag's JSON lines, of at most so many words before their endings."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        ctx_a = _text(rng, 3, longest)
        ctx_b = _text(rng, 1, 3).upper() if i % 3 == 0 else ""
        if i % 4 == 1:
            ctx_a = f"[header] How to {ctx_a} [title] {_text(rng, 2, 6)} [step] {_text(rng, 2, 6)}"
        if i % 5 == 2:
            ctx_a += " [substeps]"  # a blank is left at the end
        endings = [_text(rng, 1, 14) for _ in range(4)]
        if i % 6 == 3:
            endings[1] = f"{endings[1]} [title] {endings[2]}  [step] [x"
        record = {
            "ind": i,
            "activity_label": _text(rng, 1, 3).capitalize(),
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}" if ctx_b else ctx_a,
            "endings": endings,
            "label": rng.randrange(4),
        }
        lines.append(json.dumps(record, ensure_ascii=bool(i % 2)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def lambada(path: Path, n: int, seed: int = 7) -> Path:
    """n passages; some end in a punctuated word, or have two blanks or a line break before the last word."""
    rng = random.Random(seed)
    ends = [" dog", " 東京", "  roof", "\n the roof", " naïvely", " don't"]
    texts = [_text(rng, 10, 60) + ends[i % len(ends)] for i in range(n)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def wikitext(path: Path, n: int, seed: int = 7) -> Path:
    """n articles of raw WikiText, each with a title and a section."""
    rng = random.Random(seed)
    odd = (
        " 1 @,@ 000 @.@ 5 years , a \" quoted \" word ; ( Bob 's book ) : the dogs ' [ own ] well @-@ known 20 ° N . \n"
    )
    text = ""
    for i in range(n):
        text += f" \n = {_text(rng, 1, 3)} = \n \n {_text(rng, 5, 300)} {odd}\n = = Section {i} = = \n \n {odd} "
        text += f"{_text(rng, 5, 200)} ! \n = = = Deeper = = = \n {{ {_text(rng, 2, 9)} }} ? \n"
    path.write_text(text, encoding="utf-8")
    return path
