"""Parameters and MACs of the image models at 224 pixels, beside the published ones.

    python scripts/vision_sizes.py             # counts, and appends a line a model to results/vision_sizes.jsonl
    python scripts/vision_sizes.py --table     # the newest lines as a Markdown table

MACs are half the flops of matrix products and convolutions. The PoolFormer paper's counter, fvcore, adds 5 operations
for every element that torch's own group norm reads; the sum is `fvcore_macs`. It adds nothing for norms, poolings and
activations that are written out, as those of the baselines are.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from a source tree that is not installed

from arch.accounting import count_params, forward_macs  # noqa: E402
from arch.model import functional  # noqa: E402
from arch.spec import ImageSpec  # noqa: E402
from arch.topologies.pyramid import Pyramid  # noqa: E402
from configs.metaformer.published import PUBLISHED  # noqa: E402
from experiments import config  # noqa: E402
from experiments.turns import provenance  # noqa: E402

FILE = ROOT / "results/vision_sizes.jsonl"
SPEC = ImageSpec(224, 224, 3, 1000)
NORM_OPERATIONS = 5  # fvcore's for an element of a norm with a scale and a bias


def sizes(source: str) -> dict[str, Any]:
    """The row of one config."""
    model = config.plain(config.configure(source))["model"]
    macs = forward_macs(model, SPEC)
    biased_group_norm = model["norm"]["name"] == "group" and model["norm"]["bias"]
    extra = NORM_OPERATIONS * normed_elements(model) if biased_group_norm else 0
    return {
        "source": source,
        "params": count_params(model, SPEC),
        "frozen": frozen(model),
        "macs": macs,
        "fvcore_macs": macs + extra,
        "published": PUBLISHED[source],
    }


def grids(model: Mapping[str, Any]) -> list[int]:
    """Tokens in each stage of a pyramid."""
    net = functional(model, SPEC)
    built = net.module(net.abstract())
    topology: nnx.Module = built.topology
    assert isinstance(topology, Pyramid)
    return [prod(grid) for grid in (built.embed.grid, *(down.conv.grid for down in topology.downs))]


def normed_elements(model: Mapping[str, Any]) -> int:
    """Elements that the norms of the blocks and the last one read."""
    tokens, widths = grids(model), model["widths"]
    return sum(2 * d * n * w for d, n, w in zip(model["depths"], tokens, widths)) + tokens[-1] * widths[-1]


def frozen(model: Mapping[str, Any]) -> int:
    """Entries of RandFormer's matrices, tokens x tokens in every block. Ours are a hash: nothing is stored."""
    kinds = [model["parts"][stage]["kind"] if isinstance(stage, str) else "" for stage in model["stages"]]
    return sum(d * n * n for d, n, kind in zip(model["depths"], grids(model), kinds) if kind == "random")


def agrees(value: float, printed: str) -> bool:
    """Whether the value, rounded to as many digits, is what is printed: 11915176 is 12M and 11.9M."""
    number, unit = re.fullmatch(r"([\d.]+)([MG])", printed).groups()  # type: ignore[union-attr]
    digits = len(number.partition(".")[2])
    return f"{value / {'M': 1e6, 'G': 1e9}[unit]:.{digits}f}" == number


def mismatches(row: Mapping[str, Any]) -> list[str]:
    """What differs from the published figures, in words."""
    params, matrices, macs = row["published"]
    wanted = (("params", params), ("frozen", matrices), ("fvcore_macs", macs))
    return [
        f"{name}: {row[name]:,.0f}, published {printed}"
        for name, printed in wanted
        if printed is not None and not agrees(row[name], printed)
    ]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown; the newest row of each config, in the order of the published list."""
    newest = {row["source"]: row for row in rows}
    lines = [
        "| config | parameters | published | MACs | as fvcore counts | published |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for source, (params, matrices, macs) in PUBLISHED.items():
        if source in newest:
            row = newest[source]
            held = f"{row['params']:,}" + (f" + {row['frozen']:,} frozen" if row["frozen"] else "")
            printed = params + (f" + {matrices}" if matrices else "")
            name = source.removeprefix("configs/metaformer/")
            counts = f"{row['macs'] / 1e9:.3f}G | {row['fvcore_macs'] / 1e9:.3f}G"
            lines.append(f"| `{name}` | {held} | {printed} | {counts} | {macs} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/vision_sizes.py", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args(argv)
    if options.table:
        print(table(map(json.loads, FILE.read_text().splitlines())))
        return 0
    where, wrong = provenance(), 0
    with FILE.open("a") as out:
        for source in PUBLISHED:
            row = sizes(source)
            out.write(json.dumps({**row, **where}) + "\n")
            differences = mismatches(row)
            wrong += bool(differences)
            figures = f"{row['params']:>12,} parameters  {row['fvcore_macs'] / 1e9:7.3f} GMACs"
            print(f"{source:52}{figures}  {'; '.join(differences) or 'as published'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
