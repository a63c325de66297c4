"""A comparison of runs as one HTML file: tables, a plot, and texts coloured by uncertainty.

This module fills in the $names of report.html. It escapes all texts and names, and the page's
Content Security Policy allows no script, so they may contain anything.
"""

import base64
import html
import string
from pathlib import Path

from engine.base.files import write_text
from engine.eval.scored_text import ScoredText, coloured_html
from engine.eval.table import Table

CAPTION = (
    "Calibration: on the diagonal a prediction is right as often as its confidence says, above it "
    "more often. Error bars: 95 % intervals. Bars: share of tokens."
)

Texts = dict[str, dict[str, ScoredText]]  # title -> run -> the text with this run's scores


def write_report(
    folder: Path,
    title: str,
    note: str,
    tables: list[Table],
    rows: dict[str, dict],
    texts: Texts,
) -> None:
    """Write reliability.png and report.html. rows: what evaluate.py writes for each run."""
    from engine.eval.plots import reliability_figure, save  # takes half a second: matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    parts = [table_html(table) for table in tables]
    plot = folder / "reliability.png"
    save(reliability_figure(rows), plot)
    source = f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"
    image = f'<img src="{source}" alt="{CAPTION}">'
    parts.append(f"<figure>{image}<figcaption>{CAPTION}</figcaption></figure>")
    write_page(folder / "report.html", title, note, "\n".join(parts), texts)


def write_page(path: Path, title: str, note: str, body: str, texts: Texts) -> None:
    """Fill in report.html with this body (HTML) and these texts."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(
        title=html.escape(title),
        note=html.escape(note),
        body=body,
        texts=texts_html(texts) if texts else "",
    )
    write_text(path, page)


def table_html(table: Table) -> str:
    lines = []
    for cells in (table.header, *table.lines):
        first, *others = map(html.escape, cells)
        lines.append(f"<tr><th>{first}</th><td>{'</td><td>'.join(others)}</td></tr>")
    body = "\n".join(lines)
    return f'<h3>{html.escape(table.title)}</h3>\n<div class="wide"><table>\n{body}\n</table></div>'


def texts_html(texts: Texts) -> str:
    parts = ["<h2>Token by token</h2>"]
    for title, runs in texts.items():
        parts.append(f"<h3>{html.escape(title)}</h3>")
        for run, text in runs.items():
            summary = f"<summary>{html.escape(run)}</summary>"
            parts.append(f"<details open>{summary}{coloured_html(text)}</details>")
    return "\n".join(parts)
