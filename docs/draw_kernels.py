"""`python -m docs.draw_kernels`: draws the pictures of docs/kernels.md, and writes the numbers between its markers."""

from pathlib import Path

from common import exit_on_bad_input
from docs.draw_attention import attention_backward, attention_forward, decode
from docs.draw_rows import cross_entropy, embedding, gelu, layer_norm, sublayer
from docs.launches import put_numbers

DOCUMENT = Path(__file__).parent / "kernels.md"
PICTURES = Path(__file__).parent / "pictures"
DRAWN = {
    draw.__name__: draw
    for draw in (gelu, layer_norm, attention_forward, attention_backward, decode, cross_entropy, embedding, sublayer)
}


def main() -> int:
    """Draw and write all."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        draw().save(PICTURES / f"{name}.svg")
    put_numbers(DOCUMENT)
    print(f"{DOCUMENT} and {len(DRAWN)} pictures in {PICTURES}")
    return 0


if __name__ == "__main__":
    with exit_on_bad_input("docs.draw_kernels"):
        raise SystemExit(main())
