"""One example's page: the picture of its maps, and its text shaded by the weights of the row that is read.

Self-contained HTML in the reader's own light or dark colours: the shade lies behind the letters and lets the page's
colour through.
"""

import base64
import html
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LEVELS = 24
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
.text{font-family:ui-monospace,monospace;font-size:.86rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}
.text span{background:rgb(235 110 20 / var(--a))}.text span.n{background:rgb(40 120 230 / var(--a))}
img{max-width:100%;background:white}
summary{cursor:pointer}small,.fine{opacity:.75}
"""


def shaded(tokens: Sequence[str], weights: np.ndarray, keep: np.ndarray) -> str:
    """The text, token s shaded by |weights[s]| relative to the largest; blue where a weight is negative."""
    highest = float(np.abs(weights[keep]).max()) or 1.0
    steps = np.round(np.clip(weights / highest, -1, 1) * LEVELS).astype(int)
    words = []
    places = [i for i in range(len(tokens)) if keep[i]]
    for step, run in itertools.groupby(places, key=lambda i: int(steps[i])):
        text = html.escape("".join(tokens[i] for i in run))
        sign = ' class="n"' if step < 0 else ""
        words.append(f'<span{sign} style="--a:{abs(step) / LEVELS:.2g}">{text}</span>' if step else text)
    return f'<p class="text">{"".join(words)}</p>'


def write(
    file: Path,
    title: str,
    about: Sequence[str],
    layers: Sequence[tuple[str, np.ndarray]],
    tokens: Sequence[str],
    keep: np.ndarray,
    row: str,
    pictures: Sequence[tuple[str, Path]],
) -> None:
    """layers: (name, [H S]), the row that is read; pictures: (caption, file), embedded."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in about)]
    parts.append(
        f'<p class="fine">Shaded: {html.escape(row)}, relative to the largest weight of the text, which is given. '
        "Blue is negative.</p>"
    )
    for name, weights in layers:
        mean = weights.mean(axis=0)
        parts.append(
            f"<h2>{html.escape(name)}: mean of {len(weights)} heads <small>{_largest(mean, keep)}</small></h2>"
        )
        parts.append(shaded(tokens, mean, keep))
        if len(weights) > 1:
            each = "".join(
                f"<h2>head {n + 1} <small>{_largest(head, keep)}</small></h2>{shaded(tokens, head, keep)}"
                for n, head in enumerate(weights)
            )
            parts.append(f"<details><summary>each head of {html.escape(name)}</summary>{each}</details>")
    for caption, picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        alt = html.escape(caption)
        parts.append(f'<h2>{alt}</h2><p><img alt="{alt}" src="data:image/png;base64,{data}"></p>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    file.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n')


def _largest(weights: np.ndarray, keep: np.ndarray) -> str:
    return f"largest {float(np.abs(weights[keep]).max()):.3g}"


def index(file: Path, title: str, pages: Sequence[tuple[str, Path]]) -> None:
    items = "".join(f'<li><a href="{page.name}">{html.escape(name)}</a></li>' for name, page in pages)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1><ul>{items}</ul>"
    file.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')
