"""Draws the medians of a benchmark run, with their spread, as horizontal bars in an SVG file."""

import os
from xml.sax.saxutils import escape

COLOURS = {
    "ours": "#1f77b4",
    "original": "#d62728",
    "ddp": "#2ca02c",
    "gloo": "#2ca02c",
    "torch fused": "#2ca02c",
    "torchrun": "#2ca02c",
}
OTHER = "#9a9a9a"
FONT = 'font-family="sans-serif" font-size="12"'
WIDTH, LABEL, ROW, GAP = 900, 300, 18, 14


def bars(path: str, title: str, cases: list[tuple[str, str, list[tuple[str, float, float, float]]]]) -> None:
    """One group of bars per case (name, unit, [(peer, median, lowest, highest)]), scaled to its own longest bar."""
    height = 50 + sum(ROW * (len(rows) + 1) + GAP for _, _, rows in cases)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{escape(title)}</text>',
    ]
    y = 44
    for name, unit, rows in cases:
        scale = (WIDTH - LABEL - 150) / max(max(row[3] for row in rows), 1e-9)
        out.append(f'<text x="12" y="{y + 13}" font-weight="bold">{escape(name)}</text>')
        y += ROW
        for peer, middle, low, high in rows:
            mid = y + ROW / 2
            out.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(peer)}</text>')
            length, colour = max(middle * scale, 1), COLOURS.get(peer, OTHER)
            out.append(f'<rect x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" fill="{colour}"/>')
            first, last = LABEL + low * scale, LABEL + high * scale
            out.append(f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{mid}" y2="{mid}" stroke="black"/>')
            out.append(f'<text x="{last + 8:.1f}" y="{y + 13}">{middle:.4g} {escape(unit)}</text>')
            y += ROW
        y += GAP
    out.append("</svg>")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write("\n".join(out) + "\n")
    os.replace(f"{path}.tmp", path)
