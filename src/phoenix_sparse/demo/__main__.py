"""`python -m phoenix_sparse.demo`: write the bundled task's files again."""

from phoenix_sparse.demo import task_directory
from phoenix_sparse.demo.task import write_task


def main() -> None:
    write_task(task_directory())


if __name__ == "__main__":
    main()
