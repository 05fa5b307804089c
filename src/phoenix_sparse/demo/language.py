"""The demo model's pre-training text: stories of changing quantities, and arithmetic in several notations.

It holds what the task is made of (sums up to 99, who has how many of what) and never the task's form: no `####`, no
`Question:`, no `Answer:`. A model trained on it can't do the task until it is fine-tuned, and has all that it needs.
"""

from collections.abc import Callable, Iterator

from phoenix_sparse.demo.stories import draw_event, draw_numbers, story
from phoenix_sparse.demo.words import COLOURS, DAYS, HOLDERS, MOST, OPERATIONS, THINGS, Dice, cast

# What marks the task's form: none of it may stand in a document.
FORBIDDEN = ("###", "Question:", "Answer:")

# Opening, the sum in it, how its result is told, how the rest is told (in a sale {c} coins leave again).
COST, GOT = (
    ("The {things} cost {inner} coins.", "{A} paid {n} coins."),
    ("{A} got {inner} coins.", "That brings {n} coins."),
)
REST = ("{She} has {outer} coins left.", "{rest} coins are left.", "{She} kept {outer} coins.")
LEFT = ("There are {outer} {things} left.", "{outer} are left.", "{She} has {rest} left.")
NEED = ("{She} still needs {outer} {things}.", "{outer} are missing.", "{She} needs {rest} more.")
HAS, USED = ("{A} has {inner} {things}.", "Now {she} has {n}."), ("{A} used {inner} {things}.", "That is {n} {things}.")
STAGES = (
    ("{A} had {whole} coins. {She} bought {a} {things} for {b} coins each.", "*", COST, REST),
    ("{A} had {whole} coins and paid {b} coins for each of {a} {things}.", "*", COST, REST),
    ("{A} sold {a} {things} for {b} coins each. {She} gave {c} coins to {B}.", "*", GOT, REST),
    ("{B} bought {a} {things} from {A} for {b} coins each. {A} lost {c} coins.", "*", GOT, REST),
    ("{A} had {whole} {things}. {She} used {a} each day for {b} days.", "*", USED, LEFT),
    (
        "{A} had {whole} {things}. For {b} days {she} gave {a} each day to {B}.",
        "*",
        ("{B} got {inner} {things}.",),
        LEFT,
    ),
    ("{A} wants {whole} {things}. {She} has {a} and {B} gives {her} {b} more.", "+", HAS, NEED),
    ("{B} asks {A} for {whole} {things}. {A} has {a} and finds {b}.", "+", HAS, NEED),
)


def two_people(dice: Dice) -> str:
    """Two quantities compared and put together."""
    words = cast(dice)
    small = dice.between(2, 45)
    large = small + dice.between(2, min(40, MOST - small))
    swapped = dice.chance(0.5)
    first, second = (small, large) if swapped else (large, small)
    rich, poor = (words["B"], words["A"]) if swapped else (words["A"], words["B"])
    total, gap = f"{first} + {second} = {first + second}", f"{large} - {small} = {large - small}"
    parts = [dice.pick(("{A} has {a} {things} and {B} has {b}.", "{A} has {a} {things}. {B} has {b} {things}."))]
    if dice.chance(0.7):
        parts.append(
            dice.pick(
                ("Together they have {total} {things}.", "In all there are {total} {things}.", "Together {both}.")
            )
        )
    if dice.chance(0.7):
        parts.append(
            dice.pick(
                (
                    "{rich} has {gap} more than {poor}.",
                    "{large} is {less} more than {small}.",
                    "{poor} has {less} fewer than {rich}.",
                    "{poor} still needs {gap} {things} to have as many as {rich}.",
                    "{poor} needs {less} more to reach {large}.",
                )
            )
        )
    numbers = {"a": first, "b": second, "large": large, "small": small, "less": large - small, "both": first + second}
    return " ".join(parts).format(total=total, gap=gap, rich=rich, poor=poor, **numbers, **words)


def related(dice: Dice) -> str:
    """One quantity given through another, then both together."""
    words = cast(dice)
    sign = dice.pick("+-*")
    a, b = draw_numbers(dice, sign)
    if sign == "*":
        b = min(b, 5)
    n = OPERATIONS[sign](a, b)
    phrase = {"+": "{b} more than", "-": "{b} fewer than", "*": "{b} times as many as"}[sign]
    text = "{B} has {a} {things}. {A} has " + phrase + " {B}."
    text += dice.pick(
        (
            " {A} has {sum} {things}.",
            " So {A} has {n}.",
            " {sum}, so {A} has {n} {things}.",
            "\n{A} has {sum} {things}.",
        )
    )
    if a + n <= 150:
        text += dice.pick((" ", "\n")) + dice.pick(
            ("Together they have {all} {things}.", "In all there are {all} {things}.", "Together that is {all}.")
        )
    return text.format(a=a, b=b, n=n, sum=f"{a} {sign} {b} = {n}", all=f"{a} + {n} = {a + n}", **words)


def two_stages(dice: Dice) -> str:
    """A product or a sum, and then what it leaves of another number: prices, sales, daily use, wishes."""
    words = cast(dice)
    opening, sign, middles, ends = dice.pick(STAGES)
    a, b = draw_numbers(dice, sign)
    n = OPERATIONS[sign](a, b)
    sold = "{c}" in opening
    # What is left: of the sale's coins n when some are given away, else of a larger number that was there before.
    whole, part = (n, dice.between(2, max(2, n - 2))) if sold else (dice.between(n + 2, max(n + 2, MOST)), n)
    gap = dice.pick((" ", "\n"))
    text = gap.join((opening, dice.pick((*middles, "{inner}.")), dice.pick((*ends, "{outer}."))))
    sums = {"inner": f"{a} {sign} {b} = {n}", "outer": f"{whole} - {part} = {whole - part}"}
    return text.format(a=a, b=b, c=part, n=n, whole=whole, rest=whole - part, **sums, **words)


def facts(dice: Dice) -> str:
    """A few sums, each in one of several notations, or a chain where each sum goes on from the last."""
    if dice.chance(0.5):
        state, lines = dice.between(2, 60), []
        for _ in range(dice.between(2, 6)):
            _, sign, number = draw_event(dice, state)
            result = OPERATIONS[sign](state, number)
            lines.append(f"{state} {sign} {number} = {result}")
            state = result
        return dice.pick((" , ", "\n", ". ")).join(lines)
    lines = []
    for _ in range(dice.between(2, 7)):
        sign = dice.pick("++--**/")
        a, b = draw_numbers(dice, sign)
        n = OPERATIONS[sign](a, b)
        word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[sign]
        lines.append(
            dice.pick(
                (f"{a} {sign} {b} = {n}", f"{a} {sign} {b} = {n}", f"{a} {word} {b} is {n}", f"{n} = {a} {sign} {b}")
            )
        )
    return dice.pick((" , ", "\n", ". ")).join(lines)


def two_sums(dice: Dice) -> str:
    """Two groups counted apart and put together."""
    words = cast(dice)
    a, b, c, d = (dice.between(2, 9) for _ in range(4))
    p, q = a * b, c * d
    text = dice.pick(
        (
            "{A} has {a} {holders} with {b} {things} in each. {B} has {c} {holders} with {d} {things} in each.",
            "{A} sold {a} {holders} of {b} {things}, {B} sold {c} {holders} of {d}.",
        )
    )
    gap = dice.pick((" ", "\n"))
    text += gap + dice.pick(("{A} has {one} {things}.", "{one}.", "{A}: {p}.")) + gap
    text += dice.pick(("{B} has {two} {things}.", "{two}.", "{B}: {q}.")) + gap
    text += dice.pick(
        ("Together that is {all}.", "In all there are {all} {things}.", "Together they have {all} {things}.")
    )
    one, two, both = f"{a} * {b} = {p}", f"{c} * {d} = {q}", f"{p} + {q} = {p + q}"
    return text.format(a=a, b=b, c=c, d=d, p=p, q=q, one=one, two=two, all=both, **words)


def lists(dice: Dice) -> str:
    """Counting in steps, and headed lists of who has how many."""
    if dice.chance(0.4):
        step, start = dice.between(1, 9), dice.between(1, 30)
        return ", ".join(str(start + step * index) for index in range(dice.between(4, 8)))
    (thing, things), (holder, _) = dice.pick(THINGS), dice.pick(HOLDERS)
    title = dice.pick(("Question time", "Answer them all", things.capitalize(), thing.capitalize()))
    lines = [f"{dice.pick(('#', '##'))} {title}"]
    total = 0
    for number in range(1, dice.between(2, 4) + 1):
        count = dice.between(2, 24)
        total += count
        label = dice.pick(
            (f"{holder.capitalize()} {number}", f"{dice.pick(COLOURS).capitalize()} {holder}", dice.pick(DAYS))
        )
        lines.append(f"{label}: {count} {things}")
    return "\n".join([*lines, dice.pick((f"In all: {total}", f"# {total}", f"## {total} {things}"))])


KINDS: tuple[Callable[[Dice], str], ...] = (
    *(story,) * 9, *(related,) * 2, two_people, *(two_stages,) * 4, *(facts,) * 3, two_sums, lists,
)  # fmt: skip


def documents(key: str) -> Iterator[str]:
    """Endless documents, always the same for the same key."""
    dice = Dice(f"language {key}")
    while True:
        yield dice.pick(KINDS)(dice)
