import sys

import pytest
import torch

from phoenix_sparse.runtime import resident
from phoenix_sparse.runtime.resident import growth

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_what_is_held_for_a_moment_is_counted():
    earlier = torch.ones(400 * MIB, dtype=torch.uint8)  # a higher mark than any below
    del earlier
    kept = torch.ones(100 * MIB, dtype=torch.uint8)
    if growth(lambda: None) is None:
        pytest.skip("this system doesn't tell")
    found = [growth(lambda size=size: torch.ones(size * MIB, dtype=torch.uint8)[0]) for size in (60, 200, 60)]
    assert found[0] == pytest.approx(60 * MIB, abs=20 * MIB)
    assert found[1] == pytest.approx(200 * MIB, abs=20 * MIB)
    assert found[2] == pytest.approx(60 * MIB, abs=20 * MIB)
    assert growth(lambda: kept[0]) < 20 * MIB


def test_where_the_system_does_not_tell_the_work_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "RESET", tmp_path / "none" / "clear_refs")
    done = []
    assert growth(lambda: done.append(1)) is None
    assert done == [1]
