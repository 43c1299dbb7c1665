# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that needs nothing else: pictures inside, no links."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots, plots_error
from .constant import COARSE, COLUMNS, constants
from .measure import Measurement
from .modality import modalities
from .summary import STORY, findings, frequent_texts, heads, outliers, token_error
from .tokens import OUTLIER_RATIO, Outlier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2.2em; }
img { width: 100%; border: 1px solid #ddd; }
p, ul { max-width: 62em; }
table { border-collapse: collapse; margin: 0.6em 0; font-variant-numeric: tabular-nums; }
td, th { padding: 0.15em 0.8em; border-bottom: 1px solid #ddd; text-align: right; }
td.l, th.l { text-align: left; } code { background: #f3f3f3; padding: 0 0.25em; }
.note { color: #555; }
"""

_INTRO = f"""The cache keeps old keys in a few bits: each channel of 32 consecutive tokens (a group)
shares one range, which is cut into equal steps. If one token of the group has much larger keys
than the others, the steps grow and the others lose detail; a token with much smaller keys falls
between two steps and is lost itself. The paper OScaR (arXiv 2605.19660) calls this token norm
imbalance. Its two remedies are a rotation, which spreads single large channels over all, and token
scaling, which divides every key by its norm and keeps the norm apart. Our format adds a balance of
keys against queries, and a center: the constant part of a head's keys, taken off where it is
large. This page shows how much of that a model has on a text, and what each step mends. A token is
called an outlier where its norm is below 1/{OUTLIER_RATIO:.0f} or above {OUTLIER_RATIO:.0f} times
the median of its group."""

#: (title, picture, explanation), in the order of the page.
_SECTIONS: list[tuple[str, Callable[[Measurement], Figure], str]] = [
    (
        "Which tokens stand out",
        plots.token_map,
        """Each cell is a token in a layer: its key norm over the median norm of its group of 32,
        as geometric mean over the KV heads. Blue: smaller than its neighbours (attention sinks,
        usually at the very start, and filler words); red: larger. White: like its
        neighbours.""",
    ),
    (
        "Where norms are uneven",
        plots.imbalance_map,
        """The imbalance of a group is (largest - smallest norm) / median norm; the cell is its mean
        over the groups of a KV head. The paper bounds a group's error by the range of its norms;
        dividing by the median is our choice, so that heads compare.
        0: all norms equal; 1: they spread over as much as a typical norm.""",
    ),
    (
        "How large keys are",
        plots.norm_distribution,
        """Key norms of all tokens by layer: the thick bar holds the middle half of the tokens, the
        thin line all but the outer 1 % on either side, crosses mark the smallest and the largest.
        Crosses far below a short bar are sinks, far above it large-norm outliers.""",
    ),
    (
        "Norm over position",
        plots.norm_over_position,
        """Single heads: every dot is a token, the black line the median of its group. Outliers are
        coloured, the strongest named by text and position. Quantisation shares a range among the
        32 dots around each piece of the line.""",
    ),
    (
        "Range of each channel",
        plots_error.channel_ranges,
        """The range that the quantiser must cover in a group (mean over groups), in units of the
        head's rms. Peaks are channel outliers: their steps are coarse. Rotation flattens them;
        token scaling then takes away what differences between tokens add.""",
    ),
    (
        "The constant part of keys",
        plots_error.constant_parts,
        f"""Every dot is a head. Left: the length of its mean key c over that of the rest of a key
        (root mean square). Right: a group stores the mids of its channels in steps of the largest
        |mid| / 31; the dot is that step over the median range of a channel, mean over groups. A mid
        is off by up to half a step, so codes must span a channel's range and that step: from
        {COARSE} on they grow by up to a third. A center takes c off before norms and mids are
        measured. Large dots are heads that have one.""",
    ),
    (
        "What each step mends",
        plots_error.step_errors,
        """Errors at the bits of the format, mean over layers and heads; whiskers hold 80 % of the
        heads. Errors of K and V are relative to their size. The two lower pictures are what counts:
        scores decide who is attended to (an error of 0.7 doubles a weight), and the output is all
        that the rest of the model sees. Queries are of the second half of the text, the newest
        tokens exact as in the cache. With exact first tokens the sinks are no longer read packed,
        though they still share the range of the first group.""",
    ),
    (
        "Errors by layer",
        plots_error.layer_errors,
        """The same errors along the model, all old tokens read packed.""",
    ),
    (
        "Who pays for imbalance",
        plots_error.scaling_errors,
        """Left: every dot is a token in a head. Without token scaling small tokens (left of 1) lose
        most, since the steps are made for their larger neighbours; with it all lose alike. Right:
        every dot is a group. Where the two lines part, imbalance is what spoils the keys; where
        they rise together, it is something else that such groups have in common.""",
    ),
]


def save_html(measured: Measurement, path: Path) -> None:
    """Writes the report; OSError if that is not possible."""
    path.write_text("".join(_page(measured)), encoding="utf-8")


def _page(measured: Measurement) -> Iterator[str]:
    settings = measured.settings
    title = f"Token norm imbalance: {measured.model}"
    yield "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f"<p class='note'>{len(measured.tokens)} tokens, {len(measured.layers)} layers, "
        f"{measured.layers[0].norms.shape[0]} KV heads; format {settings.format}, window "
        f"{settings.window}, {settings.sinks} exact first tokens.</p><p>{_INTRO}</p>"
    )
    yield "<h2>What was found</h2><ul>"
    yield from (f"<li>{escape(sentence)}</li>" for sentence in findings(measured))
    yield "</ul>"
    for heading, draw, text in _SECTIONS:
        yield f"<h2>{heading}</h2><p>{text}</p>{_image(draw(measured), heading)}"
        if draw is plots.token_map:
            yield from _token_tables(measured)
        if draw is plots.imbalance_map:
            yield _head_table(measured)
        if draw is plots_error.constant_parts:
            yield _constant_table(measured)
    yield "</body></html>\n"


def _image(figure: Figure, name: str) -> str:
    data = base64.b64encode(plots.png(figure)).decode("ascii")
    return f"<img alt='{name}' src='data:image/png;base64,{data}'>\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 0) -> str:
    """An HTML table; the first `left` columns are text."""

    def line(cells: Iterable[Any], tag: str) -> str:
        parts = []
        for column, cell in enumerate(cells):
            shown = f"{cell:.2f}" if isinstance(cell, float) else escape(str(cell))
            parts.append(f"<{tag}{' class=l' if column < left else ''}>{shown}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _token_tables(measured: Measurement) -> Iterator[str]:
    low, high = outliers(measured)
    for title, found in (("Low-norm tokens", low), ("Large-norm tokens", high)):
        yield f"<h3>{title}</h3>"
        yield _outlier_table(measured, found) if found else "<p>None.</p>"
    texts = frequent_texts(measured)
    if len(texts) > 10:
        yield "<h3>Frequent tokens with the smallest and the largest norms</h3>"
        shown = [(repr(text), count, ratio) for text, count, ratio in texts[:5] + texts[-5:]]
        yield _table(("text", "occurrences", "norm / group median"), shown, left=1)
    kinds = modalities(measured)
    if len(kinds) > 1:
        yield "<h3>Kinds of tokens</h3>"
        header = ["kind", "tokens", "in mixed groups", "norm / median of all tokens"]
        header += [f"K error: {name}" for name in STORY]
        rows = [
            [one.kind, one.tokens, one.mixed, one.norm, *(one.errors[name] for name in STORY)]
            for one in kinds
        ]
        yield _table(header, rows, left=1)


def _outlier_table(measured: Measurement, found: list[Outlier]) -> str:
    header = [
        "text",
        "kind",
        "position",
        "norm / median",
        "share of heads",
        "most extreme",
        "where",
    ]
    header += [f"K error: {name}" for name in STORY]
    rows = []
    for one in found:
        row = [repr(one.token.text), one.token.kind, one.position, one.ratio, f"{one.share:.0%}"]
        row += [one.worst, f"layer {one.layer}, head {one.head}"]
        rows.append(row + [token_error(measured, name, one.position) for name in STORY])
    return _table(header, rows, left=2) + (
        "<p class='note'>norm / median: mean over the heads where the token is an outlier. "
        "K error: relative error of this token's key, mean over all heads.</p>"
    )


def _head_table(measured: Measurement) -> str:
    figures = ("imbalance", "max_over_min", "max_over_median", "smallest", "largest")
    header = ["layer", "head", *(name.replace("_over_", " / ") for name in figures)]
    rows = []
    for row in heads(measured)[:10]:
        numbers = [getattr(row, name) for name in figures]
        rows.append([row.layer, row.head, *numbers, *(row.errors[name] for name in STORY)])
    header += [f"K error: {name}" for name in STORY]
    return _table(header, rows) + (
        "<p class='note'>The ten most imbalanced heads; the first figures are means over groups, "
        "smallest and largest are norm / group median of single tokens.</p>"
    )


def _constant_table(measured: Measurement) -> str:
    rows = [row.cells() for row in constants(measured)[:10]]
    return _table(COLUMNS, rows) + (
        "<p class='note'>The ten heads with the coarsest mids before the center. Score error: root "
        "mean square in nats, of tokens read packed.</p>"
    )
