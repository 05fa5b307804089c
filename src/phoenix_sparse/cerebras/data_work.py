"""Worker: token arrays as HDF5 in the layout that ModelZoo's GptHDF5MapDataProcessor reads. Needs no ModelZoo."""

from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras.worker import serve
from phoenix_sparse.files import atomic_path


def work(arrays: dict[str, str]) -> dict[str, Any]:
    """Write `data`, (examples, 3, length) int32, of each .npy file to an .h5 file.

    Args:
        arrays: .npy files by the .h5 files to write.
    """
    import h5py
    import numpy as np

    for target, source in arrays.items():
        data = np.load(source, allow_pickle=False)
        with atomic_path(Path(target)) as temporary, h5py.File(temporary, "w") as file:
            file.attrs["n_examples"] = data.shape[0]
            file.create_dataset("data", data=data, dtype="int32", chunks=(1, *data.shape[1:]), compression="gzip")
    return {"examples": {target: int(np.load(source, mmap_mode="r").shape[0]) for target, source in arrays.items()}}


if __name__ == "__main__":
    serve(work)
