"""A worker: a job as JSON in, an answer as JSON out, in the environment that has cerebras_pytorch."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import write_json

MARK = "phoenix worker: "


def serve(work: Callable[..., dict[str, Any]]) -> None:
    """Do the job that the command line names, and write the answer beside it.

    Bad input is one marked line and exit code 2; anything else a traceback, its last line marked, and 3.
    """
    job, answer = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        write_json(answer, work(**json.loads(job.read_text(encoding="utf-8"))))
    except PhoenixError as error:
        print(f"{MARK}{error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        print(f"{MARK}{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        sys.exit(3)
