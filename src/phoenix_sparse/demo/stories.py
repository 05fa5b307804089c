"""Stories of one quantity that changes: counted as it goes, counted afterwards, or told only at the end."""

from phoenix_sparse.demo.phrases import ASKS, CLOSINGS, DEEDS, EVENTS, OPENINGS, RETELL, STATES
from phoenix_sparse.demo.words import MOST, OPERATIONS, Dice, cast


def draw_numbers(dice: Dice, sign: str) -> tuple[int, int]:
    """Two numbers above 1 whose result lies in 2..MOST."""
    if sign == "+":
        a = dice.between(2, dice.pick((15, 40, MOST - 2)))
        return a, dice.between(2, min(MOST - a, dice.pick((10, 40, MOST))))
    if sign == "-":
        a = dice.between(4, dice.pick((20, 50, MOST)))
        return a, dice.between(2, a - 2)
    while True:
        a, b = dice.between(2, 12), dice.between(2, 12)
        if dice.chance(0.25):
            a = dice.between(2, 40)
        if a * b <= MOST:
            return (a, b) if sign == "*" else (a * b, b)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(2, min(12, number // 2) + 1) if number % divisor == 0]


def draw_event(dice: Dice, state: int) -> tuple[str, str, int]:
    """Draw what happens to a quantity: a kind of EVENTS, its operation and its number."""
    for kind in (dice.pick("++---**h/"), dice.pick("+-")):
        if kind == "+" and state <= MOST - 2:
            return "+", "+", dice.between(2, min(MOST - state, 40))
        if kind == "-" and state >= 4:
            return "-", "-", dice.between(2, state - 2)
        if kind == "*" and state <= MOST // 2:
            return "*", "*", dice.between(2, min(MOST // state, 9))
        if kind == "h" and state >= 4 and state % 2 == 0:
            return "half", "/", 2
        if kind == "/" and (divisors := _divisors(state)):
            return "/", "/", dice.pick(divisors)
    return ("+", "+", 2) if state <= MOST - 2 else ("-", "-", 2)


def _state(dice: Dice, kind: str) -> str:
    own = STATES.get("-" if kind == "half" else kind)
    return dice.pick(own) if own and (kind == "/" or dice.chance(0.6)) else dice.pick(STATES["all"])


def story(dice: Dice) -> str:
    """A quantity, told by one of OPENINGS, and what happens to it: none to three EVENTS."""
    words = cast(dice)
    told, counts, state = _tell(dice, words)
    manner = dice.pick(("counted", "counted", "retold", "retold", "retold", "silent"))
    last = dice.pick(ASKS + CLOSINGS).format(n=state, **words)
    if manner == "silent":
        return " ".join([*told, last])
    end = [last] if dice.chance(0.4) else []
    if manner == "counted":
        # A count stands after each sentence that it belongs to, but for some that are left out.
        pairs = zip(told, counts, strict=True)
        return " ".join(
            [text for pair in pairs for text in (pair[0], *pair[1]) if text] + (end or [last][: dice.between(0, 1)])
        )
    opener = [dice.pick(RETELL)] if dice.chance(0.5) else []
    lines = [*opener, *(line for group in counts for line in group), *end]
    if dice.chance(0.5):
        return " ".join(told) + "\n" + "\n".join(lines)
    return " ".join([*told, *lines])


def _tell(dice: Dice, words: dict[str, str]) -> tuple[list[str], list[list[str]], int]:
    """Draw a story: its sentences, for each the counts that follow from it, and the last quantity."""
    sign = dice.pick("===++-***/")
    state, number = draw_numbers(dice, "+" if sign == "=" else sign)
    told, counts = [dice.pick(OPENINGS[sign]).format(a=state, b=number, **words)], []
    if sign == "=":
        first = dice.pick(("{A} had {n}.", "First {n}.", "It begins with {n}.")) if dice.chance(0.15) else ""
        counts.append([first.format(n=state, **words)] if first else [])
    else:
        # "3 more than 5" and "5 boxes of 3" are also counted with the numbers the other way round.
        if sign in "+*" and dice.chance(0.25):
            state, number = number, state
        line, state = _count(dice, words, "all" if sign == "/" else sign, (state, sign, number))
        counts.append([line])
    deeds: list[str] = []
    lines: list[str] = []
    joined = dice.chance(0.35)
    for _ in range(dice.between(1, 3) if sign == "=" else dice.between(0, 2)):
        kind, sign, number = draw_event(dice, state)
        deed = dice.pick((DEEDS if joined else EVENTS)[kind]).format(b=number, **words)
        line, state = _count(dice, words, kind, (state, sign, number))
        if joined:
            deeds.append(deed)
            lines.append(line)
        else:
            told.append(deed)
            counts.append([line])
        if kind == "/":
            break
    if joined and deeds:
        told.append(f"{dice.pick((words['She'], words['A']))} {_join(deeds, dice.chance(0.2))}.")
        counts.append(lines)
    return told, counts, state


def _count(dice: Dice, words: dict[str, str], kind: str, sum_: tuple[int, str, int]) -> tuple[str, int]:
    """One sentence that tells the result of a sum, and the result."""
    left, sign, right = sum_
    result = OPERATIONS[sign](left, right)
    own = STATES.get("-" if kind == "half" else kind)
    phrase = dice.pick(own) if own and (kind == "/" or dice.chance(0.6)) else dice.pick(STATES["all"])
    return phrase.format(n=result, sum=f"{left} {sign} {right} = {result}", **words), result


def _join(parts: list[str], then: bool) -> str:
    """Join as `a, b and c` or `a, b and then c`."""
    last = " and then " if then else " and "
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
