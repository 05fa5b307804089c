"""Word problems with a number for an answer (MAWPS, SVAMP): the worked answer, and reading a number out of text.

A completion is the expression, its value, and a fixed closing sentence:

    (22 - 14) / 4 = 2. The answer is 2.

Numbers are written in one way throughout (`tidy_number`: three decimals, or four significant digits below one), and
that rounding is finer than the tolerance of the comparison (`numbers_agree`: within 0.001 as LLM-Adapters counts,
arXiv:2304.01933, and within a thousandth for answers below one), so a completion always scores against its own answer.
"""

import ast
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

INVALID = "[invalid]"  # what lm-eval's own filters give where nothing was found
TOLERANCE = 1e-3

# A minus is a sign only where no term stands before it: `10-5` holds 10 and 5.
_NUMBER = r"(?:(?<![\w.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
_FIND_NUMBER = re.compile(_NUMBER)
_FIND_ANSWER = re.compile(rf"the answer is\s*:?\s*({_NUMBER}(?:\s?/\s?\d[\d,]*(?:\.\d+)?)?)", re.IGNORECASE)
_OPERATORS = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.UAdd | ast.USub


def tidy_number(value: float | str) -> str:
    """Write a number the way completions do: `22.0` as 22, 1.8333333333333335 as 1.833, 0.0454545 as 0.04545.

    Raises:
        ValueError: it isn't a finite number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    number = value if isinstance(value, float) else read_number(str(value))
    if number is None or not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    if number == 0:
        return "0"
    decimals = 3 if abs(number) >= 1 else 3 - math.floor(math.log10(abs(number)))
    text = f"{number:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def read_number(text: str) -> float | None:
    """The value of a number as people write it (`1,000`, `$18`, `-3.5`, `3/4`); None where it is none."""
    plain = re.sub(r"[\s$,]", "", text.replace("−", "-")).rstrip(".")
    top, _, bottom = plain.partition("/")
    try:
        number = float(top) / float(bottom) if bottom else float(plain)
    except (ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def numbers_agree(predicted: float, gold: float) -> bool:
    """Whether an answer counts: within 0.001 of the gold answer, or a thousandth of it where that is less."""
    return abs(predicted - gold) <= max(TOLERANCE * min(1.0, abs(gold)), 1e-12 * abs(gold))


def strict_answer(text: str) -> str:
    """The number after the first "The answer is"."""
    found = _FIND_ANSWER.search(text.replace("−", "-"))
    return found.group(1).strip() if found else INVALID


def flexible_answer(text: str) -> str:
    """The last number of the text."""
    found = _FIND_NUMBER.findall(text.replace("−", "-"))
    return found[-1].strip() if found else INVALID


def tidy_expression(text: str) -> str:
    """Write an expression with tidy numbers, spaces and no needless brackets: `((22.0-14.0)/4.0)` as (22 - 14) / 4.

    What isn't arithmetic over numbers and names is kept as it stands, with its blanks and numbers tidied.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if all(_is_arithmetic(node) for node in ast.walk(tree)):
            return ast.unparse(_TidyNumbers().visit(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # an odd equation of the source, not a mistake of ours
    return re.sub(r"\d+(?:\.\d+)?", lambda found: tidy_number(found.group()), " ".join(text.split()))


def worked_answer(doc: dict[str, Any]) -> str:
    """lm-eval's `doc_to_target`: the expression, its value, and the sentence that the answer is read from.

    `x=(8.0+2.0)/5.0` gives an expression with its value; an equation that isn't solved for its unknown, as
    `(6.0+x)*(x-6.0)=189.0`, stays an equation.

    Raises:
        ValueError: the answer isn't a number, or there is no equation.
    """
    answer = tidy_number(_field(doc, "answer"))
    sides = [side.strip() for side in str(_field(doc, "equation")).lower().split("=")]
    if not all(sides):
        raise ValueError(f"the equation {_field(doc, 'equation')!r} has an empty side")
    solved = len(sides) == 1 or (len(sides) == 2 and sides[0].isidentifier())
    if solved and not re.search(r"[a-z]", sides[-1]):
        return f"{tidy_expression(sides[-1])} = {answer}. The answer is {answer}."
    return f"{' = '.join(tidy_expression(side) for side in sides)}. The answer is {answer}."


def score_number(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results`: 1 where the number that the filter found agrees with the gold answer."""
    gold = read_number(tidy_number(_field(doc, "answer")))
    predicted = read_number(results[0])
    return {"exact_match": float(gold is not None and predicted is not None and numbers_agree(predicted, gold))}


def filter_strict(responses: Iterable[Sequence[str]], _docs: Any) -> list[list[str]]:
    return [[strict_answer(text) for text in texts] for texts in responses]


def filter_flexible(responses: Iterable[Sequence[str]], _docs: Any) -> list[list[str]]:
    return [[flexible_answer(text) for text in texts] for texts in responses]


def _field(doc: dict[str, Any], name: str) -> Any:
    """MAWPS writes its fields small, SVAMP with a capital."""
    return doc[name] if name in doc else doc[name.capitalize()]


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    return isinstance(node, ast.Expression | ast.BinOp | ast.UnaryOp | ast.Name | ast.Load | _OPERATORS)


class _TidyNumbers(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        # A name is written as it stands, so that the number keeps our form and not Python's.
        assert isinstance(node.value, int | float)
        return ast.Name(id=tidy_number(node.value), ctx=ast.Load())
