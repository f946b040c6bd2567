"""Draw a folder of images: 60 classes of shapes, and images of five other classes to try a trained learner on.

``python shapes.py FOLDER`` writes 20 images of each class to ``FOLDER/classes/CLASS``. For each of the five, it writes
one image to ``FOLDER/support/CLASS``, and four images to ``FOLDER/new``. The names of these four begin with the class.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = [*itertools.product(("polygon", "star", "rays"), range(3, 8), ("plain", "dot", "circle", "box"))]
OTHERS = [("polygon", 8, "dot"), ("polygon", 9, "box"), ("star", 8, "plain"), ("star", 9, "circle"), ("rays", 8, "box")]


def draw(form: str, corners: int, mark: str, random: np.random.Generator) -> Image.Image:
    """Draw a shape with dark ink on white paper. Place, size and direction are random, and so is the image's size."""
    side = int(random.integers(48, 97))
    image = Image.new("L", (side, side), 255)
    pen, ink, width = ImageDraw.Draw(image), int(random.integers(0, 80)), side // 16
    centre, radius = side * random.uniform(0.46, 0.54, 2), side * random.uniform(0.24, 0.32)

    def points(number, radius, turn):
        angles = turn + 2 * np.pi * np.arange(number) / number
        return [tuple(centre + radius * np.array([np.sin(angle), -np.cos(angle)])) for angle in angles]

    turn = random.uniform(-0.2, 0.2)
    tips, dents = points(corners, radius, turn), points(corners, 0.35 * radius, turn + np.pi / corners)
    if form == "rays":
        for tip in tips:
            pen.line([tuple(centre), tip], ink, width)
    else:
        outline = tips if form == "polygon" else [*itertools.chain(*zip(tips, dents, strict=True))]
        pen.line([*outline, *outline[:2]], ink, width, joint="curve")
    reach = (0.25 if mark == "dot" else 1.4) * radius
    box = [*(centre - reach), *(centre + reach)]
    if mark == "box":
        pen.rectangle(box, outline=ink, width=width)
    elif mark != "plain":
        pen.ellipse(box, fill=ink if mark == "dot" else None, outline=ink, width=width)
    return image


def main(folder: Path) -> None:
    """Write all images, which are the same in every call."""
    random = np.random.default_rng(0)
    for shape in CLASSES + OTHERS:
        name = "-".join(map(str, shape))
        paths = [folder / "classes" / name / f"{number}.png" for number in range(20)]
        if shape in OTHERS:
            paths = [folder / "support" / name / "0.png", *(folder / "new" / f"{name}-{i}.png" for i in range(4))]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(*shape, random).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
