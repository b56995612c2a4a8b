"""Contact sheets: rows of pictures with labels, as one PNG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL import Image


def contact_sheet(
    rows: Sequence[tuple[str, Sequence["Image.Image"]]], columns: Sequence[str] = (), scale: int = 1
) -> "Image.Image":
    """Put labelled rows of pictures of one size into one picture.

    Args:
        rows (sequence of (`str`, pictures)): a label and the pictures of each row.
        columns (sequence of `str`, *optional*): a label over each column.
        scale (`int`, *optional*, defaults to 1): enlarge each picture by this whole factor.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    width, height = (side * scale for side in rows[0][1][0].size)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = int(max(probe.textlength(label, font=font) for label, _ in rows)) + 16
    top = 24 if columns else 0
    count = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (margin + count * (width + 4), top + len(rows) * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, text in enumerate(columns):
        draw.text((margin + j * (width + 4) + width / 2, 12), text, fill="black", font=font, anchor="mm")
    for i, (label, pictures) in enumerate(rows):
        y = top + i * (height + 4)
        draw.text((8, y + height / 2), label, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(pictures):
            sheet.paste(
                picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (margin + j * (width + 4), y)
            )
    return sheet


def as_png(image: "Image.Image", metadata: Any = None) -> bytes:
    """A picture as the content of a PNG file, with PIL's `PngInfo` if any."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=metadata)
    return buffer.getvalue()
