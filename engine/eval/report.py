"""A comparison of runs as one HTML file that needs nothing else: table, pictures, and texts coloured by uncertainty.

report.html beside this file is the page; {{names}} in it are filled in here. Texts and names are data that may hold
anything: the page gets them escaped, or as JSON that its script shows as text, and its policy runs no other script.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine.base.files import atomic_write
from engine.eval.plots import draw, label
from engine.eval.reading import Token
from engine.eval.table import Table

COLOURINGS = ("epistemic", "aleatoric", "total", "nll")
LOWER = {
    "nll",
    "perplexity",
    "bits",
    "ece",
    "brier",
    "aurc",
    "fpr95",
}  # words of a column whose least value is best
HIGHER = {"accuracy", "auroc", "recall", "lrap"}
CAPTIONS = {  # how to read a picture
    "val_nll": "Validation nll while training: lower is better, left for the same tokens, right for the same time.",
    "reliability": "Calibration: on the diagonal it is right as often as it says, above it more often; with 95 % "
    "intervals, as bars the share of tokens.",
    "risk_coverage": "Answering only where it is surest: the deeper a line falls to the left, the better it knows "
    "where it is wrong.",
    "uncertainty": "How sure the predictions are, filled in the run's own domain, outlined outside. AUROC: how often "
    "text from outside is the less certain one of a pair; 0.5 is chance.",
}
NUMBERS = '<h2>Numbers</h2>\n{}\n<p class="pale">★ the best of a column</p>'
OWN_DOMAIN = "How sure the predictions are: the share of tokens at each value."


@dataclass(frozen=True)
class Document:
    """A text as each run reads it."""

    title: str
    tokens: dict[str, list[Token]]  # run -> its reading


def write_report(
    folder: Path,
    title: str,
    note: str,
    tables: list[Table],
    rows: dict[str, dict],
    curves: dict[str, list[dict]],
    documents: list[Document],
) -> list[Path]:
    """Write the pictures and report.html; returns all files. rows: what evaluate.py writes of each run; curves: its
    metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(folder, rows, curves)
    captions = (
        CAPTIONS
        if any("ood" in row for row in rows.values())
        else CAPTIONS | {"uncertainty": OWN_DOMAIN}
    )
    body = [NUMBERS.format("\n".join(as_html(table, rows) for table in tables))] if tables else []
    body += [figure(captions[name], svg) for name, (_, svg) in pictures.items()]
    write_page(folder / "report.html", title, note, "\n".join(body), documents, rows)
    return [*(path for files in pictures.values() for path in files), folder / "report.html"]


def write_page(
    path: Path,
    title: str,
    note: str,
    body: str,
    documents: list[Document],
    rows: Mapping[str, dict] = MappingProxyType({}),
) -> None:
    """Write report.html with this body (HTML) and these texts."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    parts = {
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": html.escape(title),
        "note": html.escape(note),
        "body": body,
        "data": page_data(documents, rows),
    }
    page = re.sub(
        r"{{(\w+)}}", lambda found: parts[found[1]], page
    )  # one pass: what is filled in stays as it is
    atomic_write(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def as_html(table: Table, rows: dict[str, dict]) -> str:
    """The table, with a star at the best of each column where all rows are of the same text."""
    same = len({(row.get("dataset"), row.get("split")) for row in rows.values()}) == 1
    stars = [
        best(name, [line[i] for line in table.lines]) if same else set()
        for i, name in enumerate(table.header)
    ]
    text = ["".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)]
    star = '<span role="img" aria-label="best">★</span> '
    for y, (name, *cells) in enumerate(table.lines):
        of_line = [f'<th scope="row">{html.escape(label(name, rows.get(name, {})))}</th>']
        for x, cell in enumerate(cells, 1):
            opened = f'<td class="best">{star}' if y in stars[x] else "<td>"
            of_line.append(f"{opened}{html.escape(cell)}</td>")
        text.append("".join(of_line))
    lines, title = "\n".join(f"<tr>{line}</tr>" for line in text), html.escape(table.title)
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{title}">'
    return f"<h3>{title}</h3>\n{region}<table>\n{lines}\n</table></div>"


def best(name: str, cells: list[str]) -> set[int]:
    """Which cells of a column are the best; none where they are all the same, or more is neither good nor bad."""
    words = set(name.lower().replace("_", " ").split())
    found = {
        i: re.match(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", cell.strip()) for i, cell in enumerate(cells)
    }
    values = {i: float(match[0].replace(",", "")) for i, match in found.items() if match}
    if "se" in words or not words & (LOWER | HIGHER) or len(set(values.values())) < 2:
        return set()
    winner = (
        max(values.values()) if words & HIGHER else min(values.values())
    )  # nll AUROC is an AUROC
    return {i for i, value in values.items() if value == winner}


def figure(caption: str, svg: Path) -> str:
    """A picture inside the page."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"
    return f'<figure><div><img src="{source}" alt="{caption}"></div><figcaption>{caption}</figcaption></figure>'


def page_data(documents: list[Document], rows: Mapping[str, dict]) -> str:
    """The texts as JSON that may stand inside <script>: a list per token, as the page's script names its fields.

    A colouring's scale ends at the 99th percentile over all texts and runs, so that their colours mean the same."""
    values, texts = {name: [] for name in COLOURINGS}, []
    for document in documents:
        runs = []
        for run, tokens in document.tokens.items():
            known = any(token.epistemic for token in tokens)  # point weights have none
            for name in COLOURINGS if known else COLOURINGS[1:]:
                values[name] += [
                    value for token in tokens if (value := getattr(token, name)) is not None
                ]
            fields = [
                [token.text, *(short(getattr(token, name)) for name in COLOURINGS)]
                for token in tokens
            ]
            top = [[[text, short(p)] for text, p in token.top] for token in tokens]
            runs.append(
                {
                    "name": label(run, rows.get(run, {})),
                    "known": known,
                    "tokens": fields,
                    "top": top,
                }
            )
        texts.append({"title": document.title, "runs": runs})
    finite = {
        name: [value for value in found if math.isfinite(value)] for name, found in values.items()
    }
    scales = {name: float(np.quantile(found, 0.99)) for name, found in finite.items() if found}
    data = json.dumps(
        {"colourings": COLOURINGS, "scales": scales, "documents": texts}, separators=(",", ":")
    )
    return data.replace("<", "\\u003c")  # neither </script> nor <!-- can be in it


def short(value: float | None) -> float | None:
    """Four digits; JSON has no nan."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
