"""Where a run's time went, as a picture: SVG, which is text, so that it needs no library."""

from raynium.tracking.ledger import CAUSES, Cause, Ledger

COLOURS: dict[Cause, str] = {
    "train": "#2e7d32",
    "compile": "#6a1b9a",
    "evaluate": "#1565c0",
    "save": "#00838f",
    "load": "#f9a825",
    "repeat": "#ef6c00",
    "notice": "#ad1457",
    "wait": "#5d4037",
    "restart": "#c62828",
    "restore": "#d84315",
    "start": "#78909c",
    "finish": "#90a4ae",
    "down": "#212121",
    "other": "#bdbdbd",
}
WIDTH, BAR, LINE = 720, 40, 22


def time_chart(ledger: Ledger) -> str:
    """One bar, the whole wall time, cut by cause; below it what each colour is, in seconds and in percent."""
    total = ledger.total or 1.0
    seconds_of = ledger.seconds()
    shown: list[Cause] = [cause for cause in CAUSES if seconds_of[cause]]
    shown.sort(key=lambda cause: -seconds_of[cause])
    height = BAR + LINE * (len(shown) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="14">',
        f"<title>goodput {100 * ledger.goodput:.1f} % of {ledger.total:,.0f} s</title>",
    ]
    left, down = 0.0, BAR + LINE * 0.5
    for cause in shown:
        seconds = seconds_of[cause]
        wide, down = WIDTH * seconds / total, down + LINE
        words = f"{cause} {seconds:,.1f} s ({100 * seconds / total:.1f} %)"
        lines += [
            f'<rect x="{left:.2f}" y="0" width="{wide:.2f}" height="{BAR}" fill="{COLOURS[cause]}"/>',
            f'<rect x="0" y="{down - 12:.0f}" width="14" height="14" fill="{COLOURS[cause]}"/>',
            f'<text x="22" y="{down:.0f}">{words}</text>',
        ]
        left += wide
    return "\n".join([*lines, "</svg>", ""])
