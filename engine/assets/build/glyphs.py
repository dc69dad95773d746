"""Render the broad prior's training set: digits from matplotlib's fonts, with attributes and captions."""

from __future__ import annotations

import argparse
import colorsys
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[3]
SCRATCH = ROOT / "build" / "assets"
SEED = 20_261
COUNT = 48_000
SIDE = 32
SUPER = 64
CANVAS = 96
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FONTS = {
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "cmss10"),
    "serif": (
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "DejaVuSerif-BoldItalic",
        "cmr10",
        "cmb10",
        "cmti10",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "STIXGeneralBolIta",
    ),
    "mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
        "cmtt10",
    ),
}
HUES = {
    "red": 0.0,
    "orange": 0.075,
    "yellow": 0.15,
    "green": 0.33,
    "teal": 0.49,
    "blue": 0.62,
    "purple": 0.77,
    "pink": 0.9,
}
SHADES = {"dark": (0.9, 0.36), "": (0.9, 0.85), "light": (0.38, 0.97)}
TEXTURES = ("plain", "gradient", "stripes", "checks", "noise", "dots")
FILLS = ("filled", "outlined", "striped", "mottled")
EXTRA_WORDS = (
    "the",
    "a",
    "an",
    "digit",
    "number",
    "picture",
    "image",
    "of",
    "on",
    "light",
    "dark",
    "grey",
    "colour",
    "black",
    "white",
    "bold",
    "thin",
    "slanted",
    "tilted",
    "left",
    "right",
    "large",
    "small",
    "high",
    "low",
    "blurred",
    "sharp",
    "wavy",
    "skewed",
    "background",
    "with",
    "and",
)
WORDS = (*DIGITS, *EXTRA_WORDS, *HUES, *FONTS, *TEXTURES, *FILLS)
Array = np.ndarray


@dataclass
class Look:
    """Everything that a caption may say about one glyph."""

    digit: int
    family: str
    weight: str
    slant: str
    tilt: str
    size: str
    place: str
    fill: str
    texture: str
    focus: str
    warp: str
    polarity: str
    colours: str
    grey: bool


@functools.cache
def glyph_canvas(font: str, digit: int) -> Array:
    """Draw one digit of one font, scaled to a fixed height, centred on a square canvas of 0..1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    big = Image.new("L", (256, 256))
    face = ImageFont.truetype(str(folder / f"{font}.ttf"), 160)
    ImageDraw.Draw(big).text((128, 128), str(digit), font=face, fill=255, anchor="mm")
    crop = big.crop(big.getbbox())
    height = 72
    width = max(8, min(84, round(crop.width * height / crop.height)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(crop.resize((width, height), Image.Resampling.BOX), ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return np.asarray(canvas, dtype=np.float32) / 255.0


def warp_field(look: Look, shear: float, angle: float, scale: Array, centre: Array, bend: Array) -> Array:
    """Give the canvas coordinates that each pixel of the supersampled image reads."""
    axis = np.linspace(-1, 1, SUPER, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    y, x = y - centre[0], x - centre[1]
    depth = 1 + bend[0] * x + bend[1] * y if look.warp == "skewed" else 1.0
    c, s = np.cos(angle), np.sin(angle)
    u, v = (c * x + s * y) / depth, (-s * x + c * y) / depth
    u, v = (u + shear * v) / scale[1], v / scale[0]
    if look.warp == "wavy":
        u = u + bend[2] * np.sin(bend[4] + 4.0 * v)
        v = v + bend[3] * np.sin(bend[5] + 4.0 * u)
    return np.stack([v, u]) * 36.0 + (CANVAS - 1) / 2


def elastic(rng: np.random.Generator, strength: float) -> Array:
    """Draw a smooth random displacement field in canvas pixels."""
    coarse = rng.normal(0, strength, (2, 5, 5)).astype(np.float32)
    return np.stack([ndimage.zoom(c, SUPER / 5, order=1) for c in coarse])


def restroke(mask: Array, weight: str, rng: np.random.Generator) -> Array:
    """Thicken or thin the strokes; refuse to thin a glyph away."""
    if weight == "bold":
        return ndimage.grey_dilation(mask, size=(int(rng.integers(3, 6)),) * 2)
    if weight == "thin":
        thin = ndimage.grey_erosion(mask, size=(3, 3))
        return thin if thin.sum() > 0.45 * mask.sum() else mask
    return mask


def fill_mask(mask: Array, fill: str, rng: np.random.Generator) -> Array:
    """Turn a solid glyph into an outlined, striped or mottled one."""
    if fill == "outlined":
        grown = ndimage.grey_dilation(mask, size=(5, 5))
        return np.clip(grown - 0.95 * ndimage.grey_erosion(mask, size=(3, 3)), 0, 1)
    if fill == "striped":
        return mask * (0.72 + 0.28 * stripes(SUPER, rng, 5.0, 9.0))
    if fill == "mottled":
        return mask * (0.75 + 0.25 * blotches(SUPER, rng, 2.0))
    return mask


def stripes(side: int, rng: np.random.Generator, low: float, high: float) -> Array:
    """Make sine stripes of a random direction in -1..1."""
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(low, high), rng.uniform(0, 6.28)
    y, x = np.mgrid[:side, :side]
    return np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period + phase).astype(np.float32)


def blotches(side: int, rng: np.random.Generator, sigma: float) -> Array:
    """Make smooth noise scaled to about -1..1."""
    field = ndimage.gaussian_filter(rng.normal(size=(side, side)), sigma, mode="wrap")
    return np.clip(field / (1.5 * field.std()), -1, 1).astype(np.float32)


def checks(rng: np.random.Generator, dots: bool) -> Array:
    """Make a checkerboard or a grid of dots in -1..1."""
    cell, oy, ox = rng.integers(4, 9), *rng.integers(0, 8, 2)
    y, x = np.mgrid[:SIDE, :SIDE]
    if dots:
        wave = np.cos((y + oy) * 2 * np.pi / cell) + np.cos((x + ox) * 2 * np.pi / cell)
        return np.clip(wave * 1.5 - 1.2, -1, 1).astype(np.float32)
    return ((((y + oy) // cell) + ((x + ox) // cell)) % 2 * 2.0 - 1).astype(np.float32)


def backdrop(texture: str, rng: np.random.Generator) -> Array:
    """Make the background's modulation in -1..1."""
    if texture == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
        return ((np.cos(angle) * x + np.sin(angle) * y) * 0.9).astype(np.float32)
    if texture == "stripes":
        return stripes(SIDE, rng, 4.0, 12.0)
    if texture in ("checks", "dots"):
        return checks(rng, texture == "dots")
    if texture == "noise":
        return blotches(SIDE, rng, rng.uniform(0.4, 2.0))
    return np.zeros((SIDE, SIDE), dtype=np.float32)


def luminance(rgb: Array) -> float:
    """Weigh a colour's brightness."""
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def draw_colour(rng: np.random.Generator) -> tuple[str, Array]:
    """Draw a named colour and its jittered value."""
    if rng.random() < 0.2:
        name = str(rng.choice(["black", "white", "grey"]))
        level = {"black": 0.06, "white": 0.95, "grey": 0.5}[name] + rng.uniform(-0.06, 0.05)
        return name, np.full(3, level)
    hue, shade = str(rng.choice(list(HUES))), str(rng.choice(list(SHADES)))
    sat, val = SHADES[shade]
    jitter = rng.uniform(-1, 1, 3) * (0.02, 0.08, 0.05)
    rgb = colorsys.hsv_to_rgb((HUES[hue] + jitter[0]) % 1, min(1, sat + jitter[1]), min(1, val + jitter[2]))
    return f"{shade} {hue}".strip(), np.array(rgb)


def colour_pair(light_on_dark: bool, rng: np.random.Generator) -> tuple[str, Array, Array]:
    """Draw a glyph colour and a background colour that obey the polarity."""
    while True:
        (name_f, fore), (name_b, back) = draw_colour(rng), draw_colour(rng)
        gap = luminance(fore) - luminance(back)
        dark, light = sorted((luminance(fore), luminance(back)))
        if (gap if light_on_dark else -gap) > 0.3 and dark < 0.45 and light > 0.4:
            return f"{name_f} on {name_b}", fore, back


def grey_pair(light_on_dark: bool, rng: np.random.Generator) -> tuple[str, Array, Array]:
    """Draw two grey levels that obey the polarity."""
    dark, light = rng.uniform(0.0, 0.32), rng.uniform(0.6, 1.0)
    if rng.random() < 0.4:
        dark, light = rng.uniform(0.0, 0.06), rng.uniform(0.85, 1.0)
    fore, back = (light, dark) if light_on_dark else (dark, light)
    return "", np.full(3, fore), np.full(3, back)


def pick(rng: np.random.Generator, options: dict[str, float]) -> str:
    """Choose one key by its probability."""
    return str(rng.choice(list(options), p=np.array(list(options.values())) / sum(options.values())))


def draw_look(rng: np.random.Generator) -> Look:
    """Draw the captioned attributes of one glyph."""
    return Look(
        digit=int(rng.integers(10)),
        family=pick(rng, {"sans": 0.4, "serif": 0.4, "mono": 0.2}),
        weight=pick(rng, {"": 0.45, "bold": 0.33, "thin": 0.22}),
        slant=pick(rng, {"": 0.6, "slanted": 0.4}),
        tilt=pick(rng, {"": 0.6, "tilted left": 0.2, "tilted right": 0.2}),
        size=pick(rng, {"": 0.4, "large": 0.4, "small": 0.2}),
        place=pick(rng, {"": 0.72, "left": 0.07, "right": 0.07, "high": 0.07, "low": 0.07}),
        fill=pick(rng, {"filled": 0.68, "outlined": 0.12, "striped": 0.1, "mottled": 0.1}),
        texture=pick(rng, dict(zip(TEXTURES, (0.36, 0.18, 0.12, 0.1, 0.14, 0.1), strict=True))),
        focus=pick(rng, {"": 0.45, "sharp": 0.3, "blurred": 0.25}),
        warp=pick(rng, {"": 0.55, "wavy": 0.25, "skewed": 0.2}),
        polarity=pick(rng, {"light on dark": 0.55, "dark on light": 0.45}),
        colours="",
        grey=bool(rng.random() < 0.42),
    )


def draw_mask(look: Look, rng: np.random.Generator) -> Array:
    """Draw the glyph's coverage in 0..1 at the final size."""
    canvas = glyph_canvas(str(rng.choice(FONTS[look.family])), look.digit)
    shear = rng.uniform(0.15, 0.45) if look.slant else rng.uniform(-0.08, 0.08)
    angle = {"": 0.0, "tilted left": -1.0, "tilted right": 1.0}[look.tilt] * rng.uniform(0.15, 0.42)
    angle += rng.uniform(-0.08, 0.08)
    low, high = {"": (0.66, 0.8), "large": (0.82, 0.98), "small": (0.48, 0.62)}[look.size]
    scale = rng.uniform(low, high) * rng.uniform((0.95, 0.85), (1.0, 1.2))
    slack = max(0.0, 0.96 - scale.max())
    shift = {"left": (0, -1), "right": (0, 1), "high": (-1, 0), "low": (1, 0)}.get(look.place, (0, 0))
    centre = np.array(shift) * max(slack, 0.12) + rng.uniform(-0.05, 0.05, 2)
    bend = np.concatenate([rng.uniform(-0.3, 0.3, 2), rng.uniform(0.08, 0.2, 2), rng.uniform(0, 6.28, 2)])
    field = warp_field(look, shear, angle, scale, centre, bend) + elastic(rng, rng.uniform(0.3, 1.8))
    mask = ndimage.map_coordinates(canvas, field, order=1, mode="constant")
    mask = fill_mask(restroke(mask, look.weight, rng), look.fill, rng)
    blur = {"": (0.5, 1.1), "sharp": (0.0, 0.4), "blurred": (1.6, 3.2)}[look.focus]
    mask = ndimage.gaussian_filter(mask, rng.uniform(*blur))
    return mask.reshape(SIDE, 2, SIDE, 2).mean((1, 3))


def paint(look: Look, mask: Array, rng: np.random.Generator) -> Array:
    """Colour a coverage mask over its background; write the colour names into the look."""
    light_on_dark = look.polarity == "light on dark"
    look.colours, fore, back = (grey_pair if look.grey else colour_pair)(light_on_dark, rng)
    gap = abs(luminance(fore) - luminance(back))
    wave = backdrop(look.texture, rng) * rng.uniform(0.3, 0.55) * min(gap, 0.4)
    base = np.clip(back + wave[..., None], 0, 1)
    image = base + mask[..., None] * (fore - base)
    image = image + rng.normal(0, 1, (SIDE, SIDE, 1)) * (0.012 if rng.random() < 0.3 else 0.0)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def render(rng: np.random.Generator) -> tuple[Array, Look]:
    """Render one random glyph."""
    look = draw_look(rng)
    image = paint(look, draw_mask(look, rng), rng)
    return image, look


def caption(look: Look, rng: np.random.Generator, limit: int = 26) -> str:
    """Say some of what the look holds, with words and commas counted up to a limit."""
    kind = rng.random()
    if kind < 0.1:
        return ""
    word = DIGITS[look.digit]
    heads = {
        f"the digit {word}": 0.55,
        f"a {word}": 0.15,
        word: 0.1,
        f"the number {word}": 0.1,
        f"a picture of the digit {word}": 0.05,
        f"an image of the digit {word}": 0.05,
    }
    parts = [pick(rng, heads)]
    if kind > 0.25:
        facts = caption_facts(look, rng, keep=float(rng.choice([0.25, 0.5, 0.8])))
        parts += [facts[i] for i in rng.permutation(len(facts))] if rng.random() < 0.35 else facts
    while sum(len(p.split()) for p in parts) + len(parts) - 1 > limit:
        parts.pop(int(rng.integers(1, len(parts))))
    return ", ".join(parts)


def caption_facts(look: Look, rng: np.random.Generator, keep: float) -> list[str]:
    """List the phrases that are true of a look, each kept with some probability."""
    texture = f"{look.texture} background" if rng.random() < 0.4 else look.texture
    facts = [
        look.weight,
        look.family,
        look.slant,
        look.tilt,
        look.size,
        look.place,
        look.fill,
        look.warp,
        look.colours,
    ]
    chosen = [f for f in facts if f and rng.random() < keep]
    chosen += [look.polarity] if rng.random() < max(keep, 0.6) else []
    chosen += ["grey" if look.grey else "colour"] if rng.random() < max(keep, 0.5) else []
    return chosen + [f for f in (texture, look.focus) if f and rng.random() < keep]


def build(count: int, seed: int, folder: Path) -> Path:
    """Render the whole set once and cache it."""
    target = folder / f"glyphs_{count}_{seed}.npz"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pairs = [render(rng) for _ in range(count)]
    looks = json.dumps([asdict(look) for _, look in pairs])
    np.savez(target, images=np.stack([image for image, _ in pairs]), looks=np.array(looks))
    return target


def load(count: int = COUNT, seed: int = SEED, folder: Path = SCRATCH) -> tuple[Array, list[Look]]:
    """Load (or first render) the set: uint8 images N,32,32,3 and their looks."""
    with np.load(build(count, seed, folder)) as data:
        return data["images"], [Look(**fields) for fields in json.loads(str(data["looks"]))]


def sheet(images: Array, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Save a contact sheet of uint8 images."""
    rows = len(images) // columns
    grid = images[: rows * columns].reshape(rows, columns, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(rows * SIDE, columns * SIDE, 3))
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Render from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT, help="how many glyphs to render")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the renderer")
    args = parser.parse_args()
    images, looks = load(args.count, args.seed)
    sheet(images[:160], SCRATCH / "glyphs.png")
    rng = np.random.default_rng(1)
    print("\n".join(caption(look, rng) for look in looks[:12]))


if __name__ == "__main__":
    main()
