"""Which weights may go together: each alone, N of M neighbours, blocks, or whole channels and attention groups."""

import re
from dataclasses import dataclass
from typing import Literal

from phoenix_sparse.errors import PhoenixError

Kind = Literal["unstructured", "n:m", "block", "structured"]


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern. `first` and `second` are N and M of N:M, or a block's rows and columns; else 1 and 1."""

    kind: Kind
    first: int = 1
    second: int = 1

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.first}:{self.second}"
        return f"{self.first}x{self.second}" if self.kind == "block" else self.kind

    @property
    def sparsity(self) -> float:
        """The share of zeros of an N:M pattern."""
        return 1 - self.first / self.second

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a matrix (out, in) that the pattern doesn't divide.

        Raises:
            PhoenixError: naming the layer, its shape and the pattern.
        """
        rows = self.first if self.kind == "block" else 1
        columns = self.second if self.kind in ("n:m", "block") else 1
        if shape[0] % rows or shape[1] % columns:
            raise PhoenixError(
                f"sparsify.pattern: {self} does not divide {name}, {shape[0]}x{shape[1]} (out x in); "
                f"it needs multiples of {rows} and {columns}"
            )


UNSTRUCTURED = Pattern("unstructured")
STRUCTURED = Pattern("structured")


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured`, `structured`, `2:4` (2 of each 4 neighbours in a row are kept) or `16x1` (rows x columns).

    Raises:
        PhoenixError: the text is none of these, or keeps nothing or everything.
    """
    if text in ("unstructured", "structured"):
        return Pattern(text)  # type: ignore[arg-type]
    if found := re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", text):
        first, second = int(found[1]), int(found[3])
        if found[2] == ":" and first < second:
            return Pattern("n:m", first, second)
        if found[2] == "x" and first * second > 1:
            return Pattern("block", first, second)
    raise PhoenixError(
        f"sparsify.pattern: {text!r} is no pattern; use unstructured, N:M with N < M (2:4: keep 2 of 4), "
        "ROWSxCOLUMNS (16x1), or structured"
    )
