"""Make minillm/data/austen.txt.xz: Jane Austen's six novels, one document a chapter.

    python tools/corpus.py r-cran-janeaustenr_1.0.0-1_all.deb

The novels (public domain) come from the Debian package of the R package janeaustenr, which holds the texts of Project
Gutenberg as lists of lines. R is not needed. What changes: lines are joined to paragraphs (verse keeps its lines),
runs of spaces become one, underscores that mark italics go, and so does what is not the novel: title pages, headings,
an edition's notes, "Finis". The result is the same on every machine with the same version of liblzma.
"""

import argparse
import io
import lzma
import re
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parents[1] / "minillm" / "data" / "austen.txt.xz"
FOLDER = "./usr/lib/R/site-library/janeaustenr/data/Rdata"
NOVELS = {  # in order of publication, with their numbers of chapters
    "sensesensibility": 50,
    "prideprejudice": 61,
    "mansfieldpark": 48,
    "emma": 55,
    "northangerabbey": 31,
    "persuasion": 24,
}
HEADING = re.compile(r"chapter (\d+|[ivxl]+)", re.IGNORECASE)
VOLUME = re.compile(r"volume [ivx]+", re.IGNORECASE)
END = re.compile(r"finis|the end|a note on the text|\*vide a letter from mr. richardson.*", re.IGNORECASE)
NOT_TEXT = re.compile(r"[*\s]+|\(end of volume one\.\)|\[(end volume|at this point in the first)\b.*", re.I | re.S)


def package_files(path: Path) -> dict[str, bytes]:
    """The files in a Debian package: an ar archive that holds a tar archive."""
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise ValueError(f"{path} is no Debian package")
    at = 8
    while at < len(content):
        name, size = content[at : at + 16].decode().strip(), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as archive:
                files = (member for member in archive if member.isfile())
                return {file.name: archive.extractfile(file).read() for file in files}  # type: ignore[union-attr]
        at += 60 + size + size % 2
    raise ValueError(f"{path} holds no data archive")


class Serialized:
    """Reads R's serialisation format (XDR, versions 2 and 3) as far as lists, strings and whole numbers go."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.symbols: list[str] = []
        if self.stream.read(2) != b"X\n":
            raise ValueError("the R object is not in XDR format")
        version, _, _ = (self.number() for _ in range(3))
        if version == 3:
            self.stream.read(self.number())  # the name of the native encoding

    def number(self) -> int:
        return struct.unpack(">i", self.stream.read(4))[0]

    def item(self) -> Any:
        flags = self.number()
        kind, has_attributes, encoding = flags & 0xFF, flags & 0x200, flags >> 12
        if kind == 1:  # symbol
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == 255:  # symbol seen before
            return self.symbols[(flags >> 8) - 1]
        if kind == 9:  # one string
            size = self.number()
            return "" if size < 0 else self.stream.read(size).decode("latin-1" if encoding & 4 else "utf-8")
        if kind == 2:  # pairs of name and value, as used for attributes
            pairs = {}
            while kind == 2:
                name = self.item()
                pairs[name] = self.item()
                kind = self.number() & 0xFF
            return pairs
        if kind == 254:
            return None
        if kind not in (10, 13, 16, 19):  # truth values, whole numbers, strings, list
            raise ValueError(f"the R object holds a value of type {kind}, which is not read here")
        values = [self.number() if kind < 16 else self.item() for _ in range(self.number())]
        names = self.item()["names"] if has_attributes else None
        return dict(zip(names, values, strict=True)) if names else values


def read_novels(package: Path) -> dict[str, list[str]]:
    """The lines of each novel, from R's database of lazily loaded objects: an index and compressed pieces."""
    files = package_files(package)
    index = Serialized(zlib.decompress(files[f"{FOLDER}.rdx"], wbits=47)).item()
    novels = {}
    for name, (start, size) in index["variables"].items():
        piece = files[f"{FOLDER}.rdb"][start : start + size]
        novels[name] = Serialized(zlib.decompress(piece[4:])).item()  # four bytes hold the size
    return novels


def paragraph(lines: list[str]) -> str:
    """The lines as one line, or as verse if all are indented and begin with a capital letter."""
    lines = [re.sub(r"\s+", " ", line.replace("_", "")) for line in lines]
    if all(re.match(r" [^\w]*[A-Z]", line) for line in lines):
        return "\n".join(line.strip() for line in lines)
    text = lines[0].strip()
    for line in lines[1:]:
        glued = text.endswith("-") or line.startswith("--")  # a compound, or a dash, which has no spaces
        text += line.strip() if glued else " " + line.strip()
    return text


def chapters(lines: list[str]) -> list[str]:
    """The chapters, paragraphs separated by an empty line."""
    found: list[list[str]] = []
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
            continue
        first, text = " ".join(block).strip(), "\n".join(block).strip()
        if found and END.fullmatch(first):
            break
        if HEADING.fullmatch(first):
            found.append([])
        elif found and block and not VOLUME.fullmatch(first) and not NOT_TEXT.fullmatch(text):
            found[-1].append(paragraph(block))
        block = []
    return ["\n\n".join(paragraphs) for paragraphs in found]


def build(package: Path) -> str:
    """All documents, separated by form feeds."""
    novels = read_novels(package)
    documents = []
    for name, expected in NOVELS.items():
        made = chapters(novels[name])
        if len(made) != expected:
            raise ValueError(f"{name} must have {expected} chapters, got {len(made)}")
        documents += made
    return "\f".join(documents).replace(",*", ",")  # a footnote's mark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", type=Path, help="the Debian package r-cran-janeaustenr, version 1.0.0")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    text = build(arguments.package)
    arguments.out.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    sizes = (
        f"{text.count(chr(12)) + 1} documents, {len(text.encode()):,} bytes, {arguments.out.stat().st_size:,} packed"
    )
    sys.stdout.write(f"{arguments.out}: {sizes}\n")


if __name__ == "__main__":
    main()
