"""The embedded data set: drawn scenes with captions that each describe a part of the scene.

It needs no download and no licence, is drawn from a seed with the same result on every machine, and is written in
the recipe's folder layout, so that it is read like real data.
"""

from __future__ import annotations

import csv
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw

from clipval.datasets import Kind, RetrievalDataset, karpathy

ANNOTATIONS = "shapes_test_karpathy.txt"
SEED_TEST = 20_001
SEED_TRAIN = 10_001
IMAGES_TEST = 1001  # with five captions each: neither count is a multiple of a batch size
CAPTIONS_PER_IMAGE = 5

Colour = Tuple[int, int, int]

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 205, 30),
    "orange": (255, 127, 14),
    "purple": (128, 50, 160),
    "pink": (245, 130, 190),
    "brown": (120, 72, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "grey": (150, 150, 150),
    "beige": (225, 210, 180),
    "teal": (70, 150, 150),
    "navy": (25, 35, 85),
    "lilac": (195, 175, 225),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "moon")
PATTERNS = ("plain", "striped", "dotted", "checked")
JITTER = 24  # brightness of an object varies by this much, of 255
CANVASES = ((320, 240), (240, 320), (300, 225), (280, 280), (360, 240))  # width, height in pixels
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
SIZES = {"small": 0.62, "large": 1.0}  # share of the cell's half side


class Thing(NamedTuple):
    """One object of a scene; `row` and `column` count cells of a 3 x 3 grid from the top left."""

    size: str
    colour: str
    shape: str
    row: int
    column: int

    @property
    def short(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def full(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        if (self.row, self.column) == (1, 1):
            return "in the centre"
        return f"at the {ROWS[self.row]} {COLUMNS[self.column]}"


class Scene(NamedTuple):
    """The content of one image, enough to draw and caption it."""

    canvas: Tuple[int, int]
    background: str
    pattern: str
    things: Tuple[Thing, ...]


def make_scene(rng: random.Random) -> Scene:
    """Two to four objects in different cells, no two of the same colour and shape."""
    count = rng.randint(2, 4)
    cells = rng.sample(range(9), count)
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    things = tuple(
        Thing(rng.choice(list(SIZES)), colour, shape, cell // 3, cell % 3)
        for cell, (colour, shape) in zip(cells, kinds)
    )
    return Scene(rng.choice(CANVASES), rng.choice(list(BACKGROUNDS)), rng.choice(PATTERNS), things)


def caption_scene(scene: Scene, rng: random.Random) -> List[str]:
    """Five captions, each describing another part; some have commas and double quotes."""
    things = list(scene.things)
    rng.shuffle(things)
    first, second = things[:2]
    ground = f"{scene.pattern} {scene.background} background"
    names = [_a(thing.full) for thing in things]
    captions = [
        f"{_listing(names)} on {scene.background}",
        f"{_relation(*rng.sample(things, 2))}, {len(things)} shapes on a {ground}",
        f"there is {_a(first.short)} {first.place} and {_a(second.short)} {second.place} of a {ground}",
        f'a drawing called "{second.short} and {first.short}", with {len(things)} shapes on a {ground}',
        f"{len(things)} shapes on {scene.background}: {', '.join(thing.short for thing in things)}",
    ]
    rng.shuffle(captions)
    return captions


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw one scene as an RGB image of the scene's own size."""
    width, height = scene.canvas
    image = Image.new("RGB", scene.canvas, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    _draw_pattern(pen, scene)
    for thing in scene.things:
        # The model sees only the centre square (the shorter side), so the grid is inside it.
        side = min(width, height)
        cell = side / 3
        x = (width - side) / 2 + (thing.column + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        y = (height - side) / 2 + (thing.row + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        ink = _shade(COLOURS[thing.colour], rng.randint(-JITTER, JITTER))
        _draw_shape(pen, thing.shape, (x, y, SIZES[thing.size] * cell * 0.44), ink, BACKGROUNDS[scene.background])
    return image


def scenes(seed: int, count: int) -> List[Tuple[Image.Image, List[str]]]:
    """The first `count` images and captions of a seed; image n does not depend on `count`."""
    return [_numbered_scene(seed, index) for index in range(count)]


def _numbered_scene(seed: int, index: int) -> Tuple[Image.Image, List[str]]:
    rng = random.Random(seed * 1_000_003 + index)
    scene = make_scene(rng)
    return draw_scene(scene, rng), caption_scene(scene, rng)


def off(dataset: RetrievalDataset) -> np.ndarray:
    """How far each picture of a data set is from the one drawn here for its id.

    Compared in blocks of 16 x 16 pixels, whose means JPEG hardly changes. Measured on 1000 scenes, in grey levels:
    quality 90 of Pillow 13 changes a block by 3 and their mean by 0.5, quality 50 by 10 and 2; the smallest change of
    one object's colour changes a block by 37, a missing pattern the mean by 2.7.

    Returns:
        float64 [n], as a share of what is allowed: 16 grey levels of a block, 2 of the mean. Inf for a picture of
        another size, and for an unknown id.
    """
    drawn = {str(number): n for n, number in enumerate(_ids(len(dataset.image_ids)))}

    def compare(n: int) -> float:
        index = drawn.get(dataset.image_ids[n])
        if index is None:
            return math.inf
        wanted, _ = _numbered_scene(SEED_TEST, index)
        with Image.open(dataset.image_paths[n]) as stored:
            if stored.size != wanted.size:
                return math.inf
            stored.draft("RGB", (wanted.width // 8, wanted.height // 8))  # JPEG can be decoded at an eighth of its size
            found = stored.convert("RGB")
        found = found.reduce(8) if found.size == wanted.size else found
        apart = np.abs(np.asarray(found.reduce(2), np.float64) - np.asarray(wanted.reduce(8).reduce(2), np.float64))
        return float(max(apart.max() / 16, apart.mean() / 2))

    with ThreadPoolExecutor(4) as pool:
        return np.array(list(pool.map(compare, range(len(dataset.image_ids)))))


def write(folder: Path, *, seed: int = SEED_TEST, count: int = IMAGES_TEST) -> None:
    """Write `count` JPEGs and their annotation file into `folder` in the recipe's layout.

    Ids are shuffled numbers like Flickr's, so that name order, drawing order and annotation order all differ, which
    catches a stage that pairs by order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: List[Tuple[str, str]] = []
    for number, (image, captions) in zip(_ids(count, seed), scenes(seed, count)):
        name = f"{number}.jpg"
        image.save(folder / name, quality=90)
        rows.extend((name, caption) for caption in captions)
    with open(folder / ANNOTATIONS, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "caption"))
        writer.writerows(rows)


def _ids(count: int, seed: int = SEED_TEST) -> List[int]:
    return random.Random(seed).sample(range(10**8, 10**9), count)


def _listing(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}"


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _relation(one: Thing, other: Thing) -> str:
    if one.column != other.column:
        where = "to the left of" if one.column < other.column else "to the right of"
    else:
        where = "above" if one.row < other.row else "below"
    return f"{_a(one.full)} {where} {_a(other.full)}"


def _shade(colour: Colour, by: int) -> Colour:
    red, green, blue = (max(0, min(255, part + by)) for part in colour)
    return red, green, blue


def _draw_pattern(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    width, height = scene.canvas
    ink = _shade(BACKGROUNDS[scene.background], 28)
    if scene.pattern == "striped":
        for y in range(0, height, 24):
            pen.rectangle((0, y, width, y + 11), fill=ink)
    elif scene.pattern == "dotted":
        for y in range(10, height, 28):
            for x in range(10, width, 28):
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=ink)
    elif scene.pattern == "checked":
        for y in range(0, height, 40):
            for x in range((y // 40 % 2) * 40, width, 80):
                pen.rectangle((x, y, x + 39, y + 39), fill=ink)


def _corners(x: float, y: float, radii: Sequence[float], turn: float) -> List[Tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (x + radius * math.sin(turn + n * step), y - radius * math.cos(turn + n * step))
        for n, radius in enumerate(radii)
    ]


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, at: Tuple[float, float, float], ink: Colour, ground: Colour
) -> None:
    x, y, r = at
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        pen.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=ink)
    elif shape == "triangle":
        pen.polygon(_corners(x, y, [r * 1.1] * 3, 0.0), fill=ink)
    elif shape == "diamond":
        pen.polygon(_corners(x, y, [r * 1.1, r * 0.7, r * 1.1, r * 0.7], 0.0), fill=ink)
    elif shape == "star":
        pen.polygon(_corners(x, y, [r * 1.1, r * 0.45] * 5, 0.0), fill=ink)
    elif shape == "cross":
        pen.rectangle((x - r, y - r * 0.33, x + r, y + r * 0.33), fill=ink)
        pen.rectangle((x - r * 0.33, y - r, x + r * 0.33, y + r), fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=max(2, int(r * 0.35)))
    else:  # a moon is a disc with a bite of the background
        pen.ellipse(box, fill=ink)
        pen.ellipse((x - r * 0.4, y - r * 1.05, x + r * 1.4, y + r * 0.75), fill=ground)


KIND = Kind(
    "shapes",
    karpathy.HOLDS,
    find=lambda folder: [],
    read=karpathy.read,
    draw=lambda folder, count: write(folder, count=count),
    off=off,
)
