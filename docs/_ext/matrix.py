"""The matrix of mixers and roles, a table made from results/matrix.jsonl: {matrix} [FILE]."""

import html
import re
from pathlib import Path

import registry as components
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from experiments.matrices import records
from experiments.matrices.cells import ROLES, cells

ROOT = Path(__file__).resolve().parent.parent.parent
MARKS = {"lowered": "✓", "not lowered": "✗", "failed": "✗"}
REMEDIES = {"bidirectional": "✓ wrapped", "causal=False": "✓ not causal"}


def general(reason, mixer):
    """A refusal without the names that differ from cell to cell."""
    reason = re.sub(rf"\b{re.escape(mixer)}\b", "MIXER", reason)
    return re.sub(r"parts\.(mixer|full|near|local|global)\b", "parts.PART", reason.removeprefix("config."))


def said(record):
    """What pointing at a cell shows."""
    if "reason" in record:
        return record["reason"]
    change = f"loss {record['loss_before']:.3f} to {record['loss_after']:.3f}"
    return f"{change}, {record['params']:,} parameters, {record['seconds']:.1f} s"


def entry(plain, others, notes):
    """One cell: a tick, a number of a reason with the remedy, or a cross."""
    if plain is None:
        return "<td>·</td>"
    if plain["status"] != "refused":
        return f'<td title="{html.escape(said(plain))}">{MARKS[plain["status"]]}</td>'
    number = notes.setdefault(general(plain["reason"], plain["mixer"]), len(notes) + 1)
    text, hover = f"<sup>{number}</sup>", said(plain)
    for form, record in others.items():
        if record is not None and record["status"] != "refused":
            text += " " + (REMEDIES[form] if record["status"] == "lowered" else f"✗ {form}")
            hover += "; " + said(record)
    return f'<td title="{html.escape(hover)}">{text}</td>'


class Matrix(SphinxDirective):
    optional_arguments = 1

    def run(self):
        file = ROOT / (self.arguments[0] if self.arguments else "results/matrix.jsonl")
        self.env.note_dependency(str(file))
        wanted = cells()
        found = records.newest(records.read(file), wanted)
        if not found:
            return [components.paragraph("There are no records yet; run `python -m experiments.matrix`.")]
        by_name = {(cell.mixer, cell.role, cell.form): record for cell, record in found.items()}
        notes, rows = {}, []
        for mixer in dict.fromkeys(cell.mixer for cell in wanted):
            row = [f'<th><a href="mixers/{mixer}.html">{mixer}</a></th>']
            for role in ROLES:
                others = {form: by_name.get((mixer, role, form)) for form in REMEDIES}
                row.append(entry(by_name.get((mixer, role, "plain")), others, notes))
            rows.append(f"<tr>{''.join(row)}</tr>")
        head = "".join(f'<th title="{html.escape(words)}">{role}</th>' for role, words in ROLES.items())
        body = f"<thead><tr><th>mixer</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        table = f'<table class="docutils">{body}</table>'
        counts = nodes.literal_block(text=records.summary(found, wanted), language="text")
        reasons = nodes.enumerated_list()
        for reason in notes:
            reasons += nodes.list_item("", nodes.paragraph("", "", *components.inline(reason)))
        devices = sorted(
            {f"{record['device']}, commit {(record['commit'] or 'unknown')[:10]}" for record in found.values()}
        )
        made = components.paragraph(f"Recorded on {'; '.join(devices)}.")
        return [counts, nodes.raw("", table, format="html"), nodes.rubric(text="Reasons"), reasons, made]


def setup(app):
    app.add_directive("matrix", Matrix)
    return {"version": "1", "parallel_read_safe": True}
