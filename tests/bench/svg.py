"""Small line and bar charts as SVG text: nothing to install, and a change of a figure is a readable diff."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # told apart by all eyes
WIDTH, HEIGHT = 330, 250  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 44  # of its frame
TEXT, LINE = "#222222", "#dddddd"


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one colour of bars: its values by x."""

    name: str
    values: dict[str, float]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: series over the places of x, evenly spaced."""

    title: str
    x_title: str
    places: Sequence[str]
    series: Sequence[Series]
    is_bars: bool = False

    def draw(self, left: float, y_title: str, colours: dict[str, str], top_value: float, step: float) -> list[str]:
        """The panel with its left edge there, on a scale from 0 to top_value."""
        x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
        parts = [text((x0 + x1) / 2, 16, self.title, weight="bold"), text((x0 + x1) / 2, HEIGHT - 8, self.x_title)]
        parts.append(text(left + 12, (y0 + y1) / 2, y_title, turned=True))
        for i in range(round(top_value / step) + 1):
            y = y0 - (y0 - y1) * i * step / top_value
            parts.append(f'<path d="M{x0:.1f} {y:.1f}H{x1:.1f}" stroke="{LINE}"/>')
            parts.append(text(x0 - 6, y + 4, f"{i * step:,.6g}", anchor="end"))
        width = (x1 - x0) / len(self.places)
        centre = {place: x0 + width * (i + 0.5) for i, place in enumerate(self.places)}
        parts += [text(x, y0 + 17, place) for place, x in centre.items()]

        def height(value: float) -> float:
            return y0 - (y0 - y1) * max(0.0, value) / top_value

        for i, series in enumerate(self.series):
            colour = colours[series.name]
            points = [(centre[place], height(series.values[place])) for place in self.places if place in series.values]
            if self.is_bars:
                bar = 0.8 * width / len(self.series)
                for x, y in points:
                    at = x - 0.4 * width + i * bar
                    parts.append(
                        f'<rect x="{at:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{y0 - y:.1f}" fill="{colour}"/>'
                    )
                continue
            dash = ' stroke-dasharray="5 3"' if series.is_dashed else ""
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        return parts


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", weight: str = "normal", turned: bool = False
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    style = f'text-anchor="{anchor}" font-weight="{weight}"{turn}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def scale(largest: float, num_steps: int = 5) -> tuple[float, float]:
    """A round end of an axis from 0 that holds the largest value, and its step."""
    rough = max(largest, 1e-9) / num_steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return step * math.ceil(largest / step - 1e-9) or step, step


def chart(panels: Sequence[Panel], y_title: str, note: str) -> str:
    """Panels side by side on one scale, with a legend and a note of where the figures come from."""
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    values = [value for panel in panels for series in panel.series for value in series.values.values()]
    top_value, step = scale(max(values))
    parts = [
        part for i, panel in enumerate(panels) for part in panel.draw(i * WIDTH, y_title, colours, top_value, step)
    ]
    x = float(LEFT)
    for name in names:
        parts.append(f'<rect x="{x:.1f}" y="{HEIGHT + 6}" width="11" height="11" fill="{colours[name]}"/>')
        parts.append(text(x + 16, HEIGHT + 16, name, anchor="start"))
        x += 34 + 6.6 * len(name)
    parts.append(text(LEFT, HEIGHT + 38, note, anchor="start"))
    width, height = max(WIDTH * len(panels), round(x), LEFT + round(6.6 * len(note))), HEIGHT + 50
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{TEXT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, "</svg>\n"])
