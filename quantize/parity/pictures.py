"""Pictures to ask models about, drawn here: shapes, numbers, charts and lines of text, the same ones for one seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

SIDE = 336
"""Pixels: 24 patches of 14, and whole patches of 16 and 28."""
DPI = 100
COLOURS = {
    "red": "#d62728",
    "green": "#2ca02c",
    "blue": "#1f5fd6",
    "orange": "#ff8c1a",
    "purple": "#8e44ad",
    "black": "#1a1a1a",
}
BACKGROUNDS = ("#ffffff", "#f3efe4", "#e4eef6", "#eaf3e3")
CORNERS = {"circle": 64, "triangle": 3, "square": 4, "hexagon": 6}
PLACES = ((0.25, 0.72), (0.72, 0.74), (0.26, 0.27), (0.74, 0.26))
"""Centres of shapes, as shares of the width and of the height from below."""
NUMBER_WORDS = ("no", "one", "two", "three", "four")
FRUITS = ("apples", "pears", "plums", "figs", "limes", "dates")
DAYS = ("Monday", "Tuesday", "Thursday", "Friday", "Sunday")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank")
THINGS = ("a letter", "two books", "the keys", "a green coat", "some bread", "an old map")
DEEDS = ("brings", "finds", "sells", "carries", "forgets", "keeps")
DESCRIBE = "Describe this picture in one sentence."

Exercise = tuple[str, str]
"""A question and its right answer."""


@dataclass(frozen=True)
class Picture:
    """A picture [SIDE, SIDE, 3] in 8-bit RGB, what is asked about it, and all that could be, with the right answers."""

    kind: str
    question: str
    exercises: tuple[Exercise, ...]
    pixels: NDArray[np.uint8]


def draw(count: int, seed: int) -> list[Picture]:
    """The first `count` pictures of a seed, all kinds in turn; a picture does not depend on how many there are."""
    return [picture(seed, number) for number in range(count)]


def picture(seed: int, number: int) -> Picture:
    """One picture of a seed, by its place in their order."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chance = random.Random(f"picture {number} of seed {seed}")
    kind, drawing = list(DRAWINGS.items())[number % len(DRAWINGS)]
    with style.context("default"):  # whatever the user's own settings are
        figure = Figure(figsize=(SIDE / DPI, SIDE / DPI), dpi=DPI, facecolor=chance.choice(BACKGROUNDS))
        canvas: Any = FigureCanvasAgg(figure)
        exercises = drawing(figure, chance)
        canvas.draw()
    question, _ = chance.choice(exercises)
    return Picture(kind, question, exercises, np.array(canvas.buffer_rgba())[..., :3])


def digest(pictures: Iterable[Picture]) -> str:
    """One sha256 of all pixels and questions."""
    content = hashlib.sha256()
    for item in pictures:
        content.update(item.question.encode())
        content.update(item.pixels.tobytes())
    return content.hexdigest()


def _shapes(figure: Any, chance: random.Random) -> tuple[Exercise, ...]:
    """One to four shapes, each of another form and colour."""
    from matplotlib.patches import RegularPolygon

    axes = _sheet(figure)
    count = chance.randint(1, len(PLACES))
    forms, colours = chance.sample(list(CORNERS), count), chance.sample(list(COLOURS), count)
    places = [(0.5, 0.5)] if count == 1 else chance.sample(PLACES, count)
    for form, colour, place in zip(forms, colours, places, strict=True):
        turn = np.pi / 4 if form == "square" else 0.0
        radius = (0.38 if count == 1 else 0.2) * chance.uniform(0.8, 1.0)
        axes.add_patch(RegularPolygon(place, CORNERS[form], radius=radius, orientation=turn, color=COLOURS[colour]))
    named = [f"{_article(colour)} {colour} {form}" for form, colour in zip(forms, colours, strict=True)]
    counted = "There is one shape." if count == 1 else f"There are {NUMBER_WORDS[count]} shapes."
    return (
        ("How many shapes are in this picture?", counted),
        (f"Which colour is the {forms[0]}?", f"The {forms[0]} is {colours[0]}."),
        (f"Which shape is {colours[-1]}?", f"The {forms[-1]} is {colours[-1]}."),
        (DESCRIBE, f"The picture shows {_listed(sorted(named))}."),
    )


def _number(figure: Any, chance: random.Random) -> tuple[Exercise, ...]:
    """A whole number of one to four digits in large type."""
    axes = _sheet(figure)
    digits, colour = chance.randint(1, 4), chance.choice(list(COLOURS))
    number = chance.randint(10 ** (digits - 1), 10**digits - 1)
    place = chance.uniform(0.42, 0.58)
    counted = "It has one digit." if digits == 1 else f"It has {NUMBER_WORDS[digits]} digits."
    axes.text(0.5, place, str(number), ha="center", va="center", fontsize=110 / digits**0.75, color=COLOURS[colour])
    return (
        ("Which number is in this picture?", f"The number is {number}."),
        ("How many digits does the number have?", counted),
        (DESCRIBE, f"The picture shows the number {number} in {colour}."),
    )


def _chart(figure: Any, chance: random.Random) -> tuple[Exercise, ...]:
    """Three or four named bars of different heights, with an axis to read them by."""
    axes = figure.add_axes((0.13, 0.13, 0.84, 0.82))
    names = chance.sample(FRUITS, chance.randint(3, 4))
    values = chance.sample(range(1, 10), len(names))
    colour = chance.choice(list(COLOURS))
    axes.bar(names, values, color=COLOURS[colour])
    axes.set(ylim=(0, 10), yticks=range(0, 11, 2))
    axes.set_facecolor(figure.get_facecolor())
    axes.tick_params(labelsize=11)
    asked = chance.randrange(len(names))
    largest, smallest = names[int(np.argmax(values))], names[int(np.argmin(values))]
    listed = _listed([f"{name} {value}" for name, value in zip(names, values, strict=True)])
    return (
        ("Which bar is the highest?", f"The highest bar is {largest}."),
        ("Which bar is the lowest?", f"The lowest bar is {smallest}."),
        (f"How high is the bar for {names[asked]}?", f"The bar for {names[asked]} is {values[asked]} high."),
        (DESCRIBE, f"The bars are {listed}."),
    )


def _text(figure: Any, chance: random.Random) -> tuple[Exercise, ...]:
    """A sentence on three lines."""
    axes = _sheet(figure)
    who, deed, thing, day = (chance.choice(words) for words in (PEOPLE, DEEDS, THINGS, DAYS))
    colour = COLOURS[chance.choice(list(COLOURS))]
    family, place = chance.choice(("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")), chance.uniform(0.4, 0.6)
    lines = f"{who} {deed}\n{thing}\non {day}."
    axes.text(0.5, place, lines, ha="center", va="center", fontsize=24, color=colour, family=family)
    return (
        ("What does the text say?", f"{who} {deed} {thing} on {day}."),
        ("Which day does the text name?", f"The text names {day}."),
        ("Whose name is in the text?", f"The name is {who}."),
    )


DRAWINGS: dict[str, Callable[[Any, random.Random], tuple[Exercise, ...]]] = {
    "shapes": _shapes,
    "numbers": _number,
    "charts": _chart,
    "text": _text,
}


def _sheet(figure: Any) -> Axes:
    """Axes over the whole picture, from 0 to 1 both ways, without any lines of their own."""
    axes: Axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    return axes


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _listed(items: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)
