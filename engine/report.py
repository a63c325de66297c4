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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.distributed import seed_micro_batch
from engine.evaluation import in_pieces, spans
from engine.files import replace
from engine.pictures import draw, label
from engine.table import Table
from engine.tokenizer import Tokenizer, decode_each

N_TOP = 5  # likeliest next tokens that are shown
COLOURINGS = ("epistemic", "aleatoric", "total", "nll")
LOWER = {"nll", "perplexity", "bits", "ece", "brier", "aurc", "fpr95"}  # words of a column whose least value is best
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
OWN_DOMAIN = "How sure the predictions are: the share of tokens at each value."


@dataclass(frozen=True)
class Document:
    """A text as each run reads it."""

    title: str
    tokens: dict[str, list[dict]]  # run -> read_document's


@torch.no_grad()
def read_document(
    model: torch.nn.Module, tokenizer: Tokenizer, ids: np.ndarray, n_samples: int = 0
) -> list[dict[str, object]]:
    """ids (n,) -> for each token its text and what the model predicted there: nll, total, aleatoric, epistemic in nats
    (None for the first, which nothing predicts) and the likeliest [text, probability]s as "top"."""
    model.eval()
    seed_micro_batch(0, 0)  # n_samples draws the same noise each time
    names = [
        "<|endoftext|>" if i == tokenizer.eot else piece.decode(errors="replace")
        for i, piece in enumerate(tokenizer.token_bytes())
    ]
    tokens = [dict.fromkeys(("nll", *COLOURINGS)) | {"text": text, "top": []} for text in decode_each(ids, tokenizer)]
    idx, head = torch.from_numpy(ids.astype(np.int64)).to(model.transformer.wte.weight.device), model.lm_head
    at = iter(tokens[1:])
    block_size = model.config.block_size
    stride = -(-block_size // 2)  # but for the first window, tokens have at least half a window before them
    for (start,), length in spans(len(ids) - 1, block_size, 1, 0, stride):
        first, end = block_size - stride if start else 0, start + length
        hiddens = [hidden[:, first:] for hidden in model.hiddens(idx[None, start:end], n_samples)]
        for hidden, targets in in_pieces(hiddens, idx[None, start + first + 1 : end + 1]):
            log_probs, total, epistemic = prediction = head.predict(hidden, n_samples)
            nll = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            best = log_probs[:, : len(names)].topk(min(N_TOP, len(names)))
            of_tokens = (t.tolist() for t in (nll, total, prediction.aleatoric, epistemic, *best))
            for *values, top, which in zip(*of_tokens, strict=True):
                token = next(at)
                token |= zip(("nll", "total", "aleatoric", "epistemic"), values, strict=True)
                token["top"] = [[names[i], math.exp(value)] for i, value in zip(which, top, strict=True)]
    return tokens


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
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    captions = CAPTIONS if any("ood" in row for row in rows.values()) else CAPTIONS | {"uncertainty": OWN_DOMAIN}
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    parts = {
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": html.escape(title),
        "note": html.escape(note),
        "tables": "\n".join(as_html(table, rows) for table in tables),
        "pictures": "\n".join(figure(captions[name], svg) for name, (_, svg) in pictures.items()),
        "data": page_data(documents, rows),
    }
    page = re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], page)  # one pass: what is filled in stays as it is
    replace(folder / "report.html", lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return [*(path for files in pictures.values() for path in files), folder / "report.html"]


def as_html(table: Table, rows: dict[str, dict]) -> str:
    """The table, with a star at the best of each column where all rows are of the same text."""
    same = len({(row.get("dataset"), row.get("split")) for row in rows.values()}) == 1
    stars = [best(name, [line[i] for line in table.lines]) if same else set() for i, name in enumerate(table.header)]
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
    found = {i: re.match(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", cell.strip()) for i, cell in enumerate(cells)}
    values = {i: float(match[0].replace(",", "")) for i, match in found.items() if match}
    if "se" in words or not words & (LOWER | HIGHER) or len(set(values.values())) < 2:
        return set()
    winner = max(values.values()) if words & HIGHER else min(values.values())  # nll AUROC is an AUROC
    return {i for i, value in values.items() if value == winner}


def figure(caption: str, svg: Path) -> str:
    """A picture inside the page."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"
    return f'<figure><div><img src="{source}" alt="{caption}"></div><figcaption>{caption}</figcaption></figure>'


def page_data(documents: list[Document], rows: dict[str, dict]) -> str:
    """The texts as JSON that may stand inside <script>: a list per token, as the page's script names its fields.

    A colouring's scale ends at the 99th percentile over all texts and runs, so that their colours mean the same."""
    values, texts = {name: [] for name in COLOURINGS}, []
    for document in documents:
        runs = []
        for run, tokens in document.tokens.items():
            known = any(token["epistemic"] for token in tokens)  # point weights have none
            for name in COLOURINGS if known else COLOURINGS[1:]:
                values[name] += [token[name] for token in tokens if token[name] is not None]
            fields = [[token["text"], *(short(token[name]) for name in COLOURINGS)] for token in tokens]
            top = [[[text, short(p)] for text, p in token["top"]] for token in tokens]
            runs.append({"name": label(run, rows.get(run, {})), "known": known, "tokens": fields, "top": top})
        texts.append({"title": document.title, "runs": runs})
    finite = {name: [value for value in found if math.isfinite(value)] for name, found in values.items()}
    scales = {name: float(np.quantile(found, 0.99)) for name, found in finite.items() if found}
    data = json.dumps({"colourings": COLOURINGS, "scales": scales, "documents": texts}, separators=(",", ":"))
    return data.replace("<", "\\u003c")  # neither </script> nor <!-- can be in it


def short(value: float | None) -> float | None:
    """Four digits; JSON has no nan."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
