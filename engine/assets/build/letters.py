"""Render the digits preset's out-of-domain pool: dark letters on light paper, in the fonts and looks of the prior."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from glyphs import SIDE, draw_look, draw_mask, paint
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "digits" / "pool.webp"
COUNT, COLUMNS, SEED, QUALITY = 1200, 40, 20_268, 90
# No letter that is read as a digit in some font: O Q for 0, I J i j l for 1, Z z 2, S s 5, b G 6, B 8, g q 9.
LETTERS = "ACDEFHKLMNPRTUVWXY" + "acdefhkmnprtuvwxy"


def render(rng: np.random.Generator) -> np.ndarray:
    """Render one letter, uint8 32,32,3."""
    look = draw_look(rng)
    look.polarity = "dark on light"
    look.digit = str(rng.choice(list(LETTERS)))  # type: ignore[assignment]
    return paint(look, draw_mask(look, rng), rng)


def main() -> None:
    """Write the sheet: COUNT tiles in rows of COLUMNS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="where to write it")
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    tiles = np.stack([render(rng) for _ in range(COUNT)]).reshape(COUNT // COLUMNS, COLUMNS, SIDE, SIDE, 3)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * SIDE, 3)
    Image.fromarray(sheet).save(args.out, "WEBP", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
