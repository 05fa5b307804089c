"""The compiler's front end on an export, offline: what sparsity does it see?"""

import tempfile
from pathlib import Path
from typing import Any

from phoenix_sparse.cerebras.cirh import annotations, compared
from phoenix_sparse.cerebras.environment import Environment
from phoenix_sparse.cerebras.layout import PARAMS, RUNNER, read_record
from phoenix_sparse.errors import PhoenixError

# Where the front end's work ends and a cluster would begin.
NO_SYSTEM = "mgmt_address has no default value"
CIRH = "cerebras_logs/*/executors/*/cirh.mlir"


def trace(export: Path, environment: Environment) -> dict[str, Any]:
    """Compile an export's training step for CSX as far as that goes without a system, and read the CIRH.

    Args:
        export: a directory that `export` wrote.
        environment: with ModelZoo.

    Returns:
        As `cirh.compared`, with `mode`.

    Raises:
        PhoenixError: the front end stopped for another reason than the missing system.
    """
    environment.require_modelzoo("a trace")
    record = read_record(export)
    with tempfile.TemporaryDirectory(prefix="phoenix-trace-") as work:
        arguments = [RUNNER, "train", PARAMS, "--compile-only", "--model-dir", work]
        done = environment.run(arguments, cwd=export)
        written = [path for path in Path(work).glob(CIRH) if not path.parent.is_symlink()]
        written = sorted({path.resolve() for path in written})
        if done.returncode == 0 and not written:
            raise PhoenixError("trace: the compiler ended well and wrote no CIRH, which hasn't been seen before")
        if not written or (done.returncode != 0 and NO_SYSTEM not in done.stderr + done.stdout):
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise PhoenixError(f"trace: the compiler's front end failed ({lines[-1][:200] if lines else 'no message'})")
        seen = annotations(written[-1].read_text(encoding="utf-8"))
    return {"mode": record["mode"]} | compared(seen, record["weights"])
