"""Whether two saved outputs are the same but for what differs between machines: rounding, and how text is laid out."""

import base64
import io
import re

from PIL import Image, ImageChops

RTOL = 2e-3  # 300 training steps agree to 1e-5 between processors; a wrong learning rate shows in the second digit
FAR = 64  # of 255: pixels whose red, green or blue differ by more differ strongly; 128 colours err by less
SHARE = 0.004  # of the pixels may differ strongly
# A number is no part of a word (float32, v2) or of a version (2.13.0); its sign belongs to it.
NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:,\d{3})*(?:\.\d*)?(?:[eE][-+]?\d+)?)(?!\.?\d)")


def same_number(one: str, other: str) -> bool:
    """Whether two printed numbers agree: whole numbers exactly, others to RTOL or to one unit of the last decimal.

    >>> same_number("0.4999", "0.5000"), same_number("0.49", "0.52"), same_number("127", "128")
    (True, False, False)
    """
    if one == other:
        return True
    if not all(re.search(r"[.eE]", text) for text in (one, other)):
        return False
    a, b = float(one.replace(",", "")), float(other.replace(",", ""))
    unit = min(_unit(one), _unit(other)) * (1 + 1e-9)  # what is left of a unit in binary
    return abs(a - b) <= max(RTOL * abs(a), unit)


def _unit(number: str) -> float:
    """What one unit of the last decimal stands for; 0 without decimals, where a unit may be all there is."""
    mantissa, _, exponent = number.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0


def same_text(one: str, other: str) -> bool:
    """Whether two texts are the same but for rounding; how many blanks stand between columns does not count.

    >>> same_text("loss 0.3125, 64 steps", "loss 0.3126, 64 steps"), same_text("64 steps", "65 steps")
    (True, False)
    """
    parts, others = (NUMBER.split(re.sub(r"(?<=[\[(])[ \t]+", "", re.sub(r"[ \t]+", " ", t))) for t in (one, other))
    return parts[0::2] == others[0::2] and all(map(same_number, parts[1::2], others[1::2]))


def picture(png: str) -> Image.Image:
    """The picture in an output's base64 text, in red, green and blue on white."""
    drawn = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def difference(one: str, other: str) -> float:
    """The share of pixels, 0 to 1, that differ strongly; 1 where the sizes differ by more than 2 pixels."""
    a, b = picture(one), picture(other)
    if max(abs(a.width - b.width), abs(a.height - b.height)) > 2:
        return 1.0
    box = (0, 0, min(a.width, b.width), min(a.height, b.height))
    red, green, blue = ImageChops.difference(a.crop(box), b.crop(box)).split()
    worst = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return sum(worst.histogram()[FAR + 1 :]) / (box[2] * box[3])


def same_picture(one: str, other: str) -> bool:
    """Whether two pictures, as base64 text, look the same."""
    return one == other or difference(one, other) <= SHARE
