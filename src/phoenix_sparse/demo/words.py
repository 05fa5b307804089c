"""The words that the pre-training text and the task share, and the dice that choose among them."""

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

WOMEN = ("Mia", "Ana", "Lena", "Zoe", "Ruth", "Nora", "Eva", "Iris", "Kim", "Lily", "Rosa", "Jane")
MEN = ("Ben", "Tom", "Max", "Omar", "Leo", "Sam", "Paul", "Ivan", "Finn", "Jack", "Noah", "Adam")
# Singular and plural of what is owned, and of what it is kept in.
THINGS = (
    ("marble", "marbles"), ("pen", "pens"), ("book", "books"), ("apple", "apples"), ("card", "cards"),
    ("sticker", "stickers"), ("shell", "shells"), ("egg", "eggs"), ("cake", "cakes"), ("stone", "stones"),
    ("flower", "flowers"), ("toy", "toys"), ("ball", "balls"), ("hat", "hats"), ("cup", "cups"), ("kite", "kites"),
    ("stamp", "stamps"), ("bead", "beads"), ("plum", "plums"), ("nut", "nuts"), ("button", "buttons"),
    ("pear", "pears"), ("ring", "rings"), ("key", "keys"),
)  # fmt: skip
HOLDERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("tray", "trays"))
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
GROUPS = ("friends", "children", "neighbours", "cousins")

MOST = 99  # the largest number of the task; few sums of the pre-training text go beyond
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


class Dice:
    """Random choices keyed by a text, from `random.random` alone: the one method that no Python version changes."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self._random() * len(items))]

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def two(self, items: Sequence[Item]) -> tuple[Item, Item]:
        """Two different items."""
        first = int(self._random() * len(items))
        second = int(self._random() * (len(items) - 1))
        return items[first], items[second + (second >= first)]


def cast(dice: Dice) -> dict[str, str]:
    """Draw the words of one story: two people, a thing, a holder, two colours, two days, a group."""
    people = WOMEN + MEN
    (person, other), (thing, things) = dice.two(people), dice.pick(THINGS)
    (holder, holders), (colour, colour2), (day, day2) = dice.pick(HOLDERS), dice.two(COLOURS), dice.two(DAYS)
    she, her = ("she", "her") if person in WOMEN else ("he", "him")
    return {
        "A": person, "B": other, "she": she, "She": she.capitalize(), "her": her,
        "thing": thing, "things": things, "holder": holder, "holders": holders,
        "colour": colour, "colour2": colour2, "day": day, "day2": day2, "group": dice.pick(GROUPS),
    }  # fmt: skip
