"""Schedules as pictures: strength by timestep and site."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_erasure.artifact import Erasure


CELL, LINE, MARGIN = 34, 18, 12
OFF, ON, BEYOND = (255, 255, 255), (38, 84, 160), (190, 60, 30)  # at 0, at 1, at 2 or where it is negative


def plot_schedules(erasure: Erasure) -> Image.Image | None:
    """Draw the schedules of an erasure's layers: a column a site, the first steps of the denoising at the top.

    Returns:
        `PIL.Image.Image`: `None` where no layer has a schedule.
    """
    parts = []
    for index, layer in enumerate(erasure.config.layers):
        if layer.schedule is not None:
            table = erasure.modifier_tensors(layer)[layer.schedule.name].float()
            names = layer.sites if table.shape[1] > 1 else ("all sites",)
            title = f"layer {index}: {layer.kind} on {layer.component}"
            parts.append(heat_map(title, table, names, layer.schedule.span))
    if not parts:
        return None
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), OFF)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def heat_map(title: str, table: torch.Tensor, names: Sequence[str], span: float) -> Image.Image:
    """Draw one table [bins, sites]."""
    font = ImageFont.load_default(size=12)
    bins, columns = table.shape
    labels = [f"t {int(span * row / bins)}-{int(span * (row + 1) / bins) - 1}" for row in range(bins)]
    short = [name if len(name) <= 40 else ".." + name[-39:] for name in names]
    left = MARGIN + int(max(font.getlength(label) for label in labels)) + MARGIN
    foot = int(max(font.getlength(name) for name in short)) + MARGIN
    size = left + columns * CELL + MARGIN, MARGIN + 2 * LINE + bins * LINE + foot
    image = Image.new("RGB", (max(size[0], int(font.getlength(title)) + 2 * MARGIN), size[1]), OFF)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, fill=(0, 0, 0), font=font)
    top = MARGIN + 2 * LINE
    for row in range(bins):
        y = top + (bins - 1 - row) * LINE
        draw.text((MARGIN, y + 2), labels[row], fill=(0, 0, 0), font=font)
        for column in range(columns):
            value = float(table[row, column])
            x = left + column * CELL
            draw.rectangle((x, y, x + CELL - 2, y + LINE - 2), fill=colour(value), outline=(210, 210, 210))
            dark = (255, 255, 255) if abs(value) > 0.6 else (0, 0, 0)
            draw.text((x + 4, y + 2), f"{value:.2f}", fill=dark, font=font)
    for column, name in enumerate(short):  # upwards, as the names are long
        strip = Image.new("RGB", (foot, LINE), OFF)
        ImageDraw.Draw(strip).text((0, 2), name, fill=(0, 0, 0), font=font)
        image.paste(strip.rotate(-90, expand=True), (left + column * CELL + (CELL - LINE) // 2, top + bins * LINE + 4))
    return image


def colour(value: float) -> tuple[int, int, int]:
    """White at 0, blue at 1, red at 2 and above; red too where it is negative."""
    if 0 <= value <= 1:
        start, end, share = OFF, ON, value
    elif value > 1:
        start, end, share = ON, BEYOND, min(value - 1, 1.0)
    else:
        start, end, share = OFF, BEYOND, min(-value, 1.0)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue
