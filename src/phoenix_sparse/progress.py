"""How long work tells of itself: two plain callbacks, so that no room knows of terminals."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, done, all) while work goes on."""

Announce = Callable[[str, str], None]
"""Called with (stage, `started` | `kept` | seconds as text) when a stage of a run begins, is skipped or ends."""
