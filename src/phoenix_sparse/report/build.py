"""Build a run's report and model card from its files."""

from pathlib import Path

from phoenix_sparse.files import write_text
from phoenix_sparse.report.card import render_card
from phoenix_sparse.report.facts import read_facts
from phoenix_sparse.report.html import render_html


def build_report(run_directory: Path) -> Path:
    """Write report.html and README.md (the model card) into a run directory; give the report's path.

    Both show what the directory's files say, and say «not measured» or leave the section out where a file is missing.

    Raises:
        PhoenixError: not a run directory, or one of its files is damaged.
    """
    run_directory = Path(run_directory)
    facts = read_facts(run_directory)
    html, card = render_html(facts), render_card(facts)
    write_text(run_directory / "README.md", card)
    write_text(run_directory / "report.html", html)
    return run_directory / "report.html"
