"""The gallery: presets of every topology, drawn by experiments.drawing from their built modules while the pages build.

{gallery} makes a section for each entry of SHOWN, its diagrams side by side, and a table of all. A preset that a
config does not have (yet) is left out, with a line in the build's log.
"""

import html
from pathlib import Path

import registry as components
from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from arch.errors import Mistake
from arch.registry import TASKS
from experiments import config as configs
from experiments import drawing
from experiments.drawing.layout import si

log = logging.getLogger(__name__)

# (heading, what to see, presets as FILE:ARG below configs/)
SHOWN = (
    (
        "MetaFormer",
        "Equal blocks of a token mixer and a channel mixer: the base model of ListOps, and a vision transformer.",
        ("lra/listops.py:softmax", "vision/deit.py:tiny"),
    ),
    (
        "Wide against deep",
        "48 heads in six layers, and the same 48 in one: the projections grow with the heads, the feed-forwards shrink "
        "to one.",
        ("wide/imdb_bytes.py:softmax-6x8", "wide/imdb_bytes.py:softmax-1x48"),
    ),
    (
        "Pyramids",
        "Four stages, the grid halved between them: PoolFormer, and CAFormer with convolutions in the first two stages "
        "and attention in the last two.",
        ("metaformer/poolformer.py:s12", "metaformer/baselines.py:caformer_s18"),
    ),
    (
        "MASFormer",
        "Full attention in a few layers, windows in the rest.",
        ("masformer/text_file.py:tiny", "masformer/text_file.py:1.3B"),
    ),
    (
        "FIT",
        "Tokens in groups at the left, latents at the right: local layers within groups, a read, global layers, a "
        "write. An encoder, one that ends with the latents, and an autoregressive decoder.",
        ("fit/listops.py:tokens", "fit/listops.py:latents", "fit/text_file.py:tiny"),
    ),
    (
        "Diffusion",
        "The same bodies with the head of a denoiser: a vision transformer and a FIT.",
        ("diffusion/cifar10.py:vit-tiny", "diffusion/cifar10.py:fit-tiny"),
    ),
    (
        "WideNet",
        "One block run at every depth, with norms of its own at each; the feed-forward is a mixture of experts.",
        ("widenet/imagenet.py:B", "widenet/listops.py:moe"),
    ),
    (
        "Hybrids",
        "Patterns of mixers over depth.",
        ("hybrid/mqar.py:delta_net-local", "hybrid/mqar.py:jamba", "quickstart.py:hybrid"),
    ),
    (
        "Loops and parallel blocks",
        "One set of weights run four times; mixer and feed-forward side by side.",
        ("hybrid/listops.py:looped", "hybrid/mqar.py:parallel"),
    ),
)
HEAD = ("preset", "topology", "parameters", "FLOPs of an example, forward", "boxes")


def drawn(preset, folder):
    """(file, scene, topology, parameters, FLOPs) of configs/PRESET; None, with a line in the log, if there is none."""
    try:
        tree = configs.plain(configs.configure(f"configs/{preset}"))
        spec = TASKS.build(tree["task"]).spec
        file = folder / f"gallery-{preset.replace('/', '_').replace('.py:', '-')}.svg"
        scene = drawing.draw(tree["model"], spec, preset.replace(".py", ""), file)
    except Mistake as mistake:
        log.info("gallery: %s is left out: %s", preset, mistake)
        return None
    return file, scene, tree["model"]["topology"]


class Gallery(SphinxDirective):
    def run(self):
        folder = Path(self.env.app.outdir) / "_images"
        folder.mkdir(parents=True, exist_ok=True)
        found, rows = [], []
        for heading, words, presets in SHOWN:
            pictures, wide = [], 0
            for preset in presets:
                made = drawn(preset, folder)
                if made is None:
                    continue
                file, scene, topology = made
                alt = html.escape(f"diagram of {preset}")
                pictures.append(
                    f'<a href="_images/{file.name}" style="flex:0 1 {scene.w}px"><img src="_images/{file.name}" '
                    f'alt="{alt}" loading="lazy" style="width:100%"></a>'
                )
                wide = max(wide, scene.w)
                params = sum(box.params * box.copies for box in scene.boxes)
                cells = (preset, topology, f"{params:,}", si(scene.flops), str(len(scene.boxes)))
                rows.append([[nodes.Text(cell)] for cell in cells])
            if not pictures:
                continue
            section = nodes.section(ids=[nodes.make_id(heading)], names=[heading.lower()])
            section += nodes.title(text=heading)
            section += components.paragraph(words)
            wrap = "wrap" if wide > 700 else "nowrap"  # narrow ones shrink side by side
            style = f"display:flex;flex-wrap:{wrap};gap:1em;align-items:flex-start"
            section += nodes.raw("", f'<div style="{style}">{"".join(pictures)}</div>', format="html")
            found.append(section)
        section = nodes.section(ids=["all-of-them"], names=["all of them"])
        section += nodes.title(text="All of them")
        section += components.table(HEAD, rows, [34, 16, 16, 24, 10])
        return [*found, section]


def setup(app):
    app.add_directive("gallery", Gallery)
    return {"version": "1", "parallel_read_safe": True}
