"""Draw one training step, the data's way in six stages: `python scripts/docs/draw_step.py docs/images/step.svg`."""

import sys
from pathlib import Path

WIDTH, LANE, TOP, NUM_RANKS = 960, 86, 74, 3
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of the layers; after Okabe and Ito
INK, PALE, BAND = "#263238", "#eceff1", "#cfd8dc"
# Left edge and title of each stage, and what travels or is computed there.
COLUMNS = (
    (16, 92, "", "slots of the batch"),
    (126, 120, "1 forward", "A of each layer"),
    (264, 132, "2 backward", "G, F and gradients"),
    (414, 96, "3", "ReduceScatterV"),
    (530, 166, "4 invert, 5 precondition", "the layers that the rank owns"),
    (714, 96, "6", "AllGatherV"),
    (828, 116, "update", "the same on all"),
)


def draw() -> str:
    """The picture as SVG: a lane for each rank, a column for each stage, a colour for each layer."""
    height = TOP + NUM_RANKS * LANE + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img" '
        'aria-label="One training step: every rank computes its share of all layers, ReduceScatterV leaves each layer '
        'on its owner, owners invert and precondition, AllGatherV brings the results back to all">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for left, width, title, text in COLUMNS:
        centre = left + width / 2
        parts += [_text(centre, 28, title, 14, bold=True), _text(centre, 48, text, 12)]
    for rank in range(NUM_RANKS):
        parts += _lane(rank)
    for left, width in ((414, 96), (714, 96)):
        parts += _exchange(left, width, gathers=left > 500)
    parts.append(
        _text(WIDTH / 2, height - 16, "colours: layers; each rank sees its own images, and owns its own layers", 12)
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lane(rank: int) -> list[str]:
    top = TOP + rank * LANE
    middle = top + LANE / 2
    own = COLOURS[rank]
    parts = [f'<rect x="8" y="{top + 4}" width="{WIDTH - 16}" height="{LANE - 8}" rx="6" fill="{PALE}"/>']
    parts += [_text(62, middle + 22, f"rank {rank}", 13, bold=True)]
    parts += [_square(34 + 20 * slot, middle - 22, INK, 14) for slot in range(3)]
    for left, width in ((126, 120), (264, 132), (828, 116)):
        start = left + width / 2 - 46
        parts += [_square(start + 34 * layer, middle - 12, colour, 24) for layer, colour in enumerate(COLOURS)]
    parts += [_square(530 + 26, middle - 17, own, 34), _square(530 + 106, middle - 17, own, 34)]
    parts += [
        _text(530 + 43, middle + 5, "F⁻¹", 13, colour="#ffffff"),
        _text(530 + 123, middle + 5, "F⁻¹∇", 11, colour="#ffffff"),
    ]
    for start, end in ((108, 128), (238, 272), (594, 632)):
        parts.append(_arrow(start, middle, end, middle))
    return parts


def _exchange(left: int, width: int, gathers: bool) -> list[str]:
    """Lines from every rank to every rank: a layer's colour is that of its owner."""
    top, bottom = TOP + 2, TOP + NUM_RANKS * LANE - 2
    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{bottom - top}" rx="6" fill="{BAND}"/>']
    for source in range(NUM_RANKS):
        for target in range(NUM_RANKS):
            colour = COLOURS[source if gathers else target]
            y1, y2 = (TOP + rank * LANE + LANE / 2 for rank in (source, target))
            parts.append(
                f'<line x1="{left + 4}" y1="{y1 + 6 * (target - 1):g}" x2="{left + width - 4}" y2="{y2:g}" '
                f'stroke="{colour}" stroke-width="2.5"/>'
            )
    return parts


def _square(x: float, y: float, colour: str, size: int) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{size}" height="{size}" rx="3" fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: int, bold: bool = False, colour: str = INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="{colour}"{weight}>{text}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g} M{x2 - 6:g} {y2 - 5:g} L{x2:g} {y2:g} L{x2 - 6:g} {y2 + 5:g}" '
        f'stroke="{INK}" stroke-width="2" fill="none"/>'
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: draw_step.py FILE.svg")
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
