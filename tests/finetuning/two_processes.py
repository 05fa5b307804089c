"""What each of two processes runs: the trainings that the test did alone, on shared batches."""

import sys
from pathlib import Path

import torch
import torch.distributed
from test_sampling import DISTRIBUTED, losses_of, trained


def main(directory: Path) -> None:
    found = {}
    for name, changes in DISTRIBUTED.items():
        factors, record, seen = trained(directory / name, **changes, micro_batch_size=1)
        found[name] = {"factors": factors, "seen": seen, "losses": losses_of(record)}
    torch.save(found, directory / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
