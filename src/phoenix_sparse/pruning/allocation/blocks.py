"""Which decoder block a layer belongs to, by its name."""

import re
from collections.abc import Iterable

from phoenix_sparse.errors import PhoenixError


def block_of(name: str) -> str:
    """`model.layers.3.mlp.down_proj` -> `model.layers.3`: up to the first number that stands alone.

    Raises:
        PhoenixError: the name has no number.
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    if found is None:
        raise PhoenixError(f"sparsify.allocation: {name} names no decoder block; a name like model.layers.3.… does")
    return found[0]


def by_blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by decoder block, the blocks in the order of their numbers.

    Raises:
        PhoenixError: a name has no number.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)

    def place(block: str) -> tuple[str, int]:
        prefix, _, number = block.rpartition(".")
        return prefix, int(number)

    return {block: found[block] for block in sorted(found, key=place)}
