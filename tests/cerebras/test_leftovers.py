import pytest

from phoenix_sparse.cerebras_runs import _made


def test_a_directory_that_was_made_for_nothing_is_gone(tmp_path):
    place = tmp_path / "a" / "b"
    with pytest.raises(KeyError), _made(place):
        raise KeyError
    assert not place.exists()
    place.mkdir(parents=True)
    with pytest.raises(KeyError), _made(place):
        raise KeyError
    assert place.exists()  # it was there before
    with _made(tmp_path / "c"):
        pass
    assert (tmp_path / "c").exists()
