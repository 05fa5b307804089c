"""What came out of a run: one HTML file, a model card, tables in the terminal."""

from phoenix_sparse.report.bench_tables import bench_tables
from phoenix_sparse.report.build import build_report
from phoenix_sparse.report.tables import compare_table, flops_table, plan_table, projection_table, summary_table

__all__ = [
    "bench_tables",
    "build_report",
    "compare_table",
    "flops_table",
    "plan_table",
    "projection_table",
    "summary_table",
]
