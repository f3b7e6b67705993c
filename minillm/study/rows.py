"""What the store keeps: events and drafts as rows, each with a checksum, and each as a line of JSON as well."""

import json
import re
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# What each kind of event must carry; there may be more. A draft is no event, but kept as a row like one.
FIELDS: dict[str, dict[str, type]] = {
    "rating": {"rating": int},
    "attempt": {"code": str, "verdict": str},
    "answer": {"text": str},
    "hint": {"number": int},
    "draft": {"text": str},
}

Row = tuple[str, str, str, str, str, int]


@dataclass(frozen=True)
class Event:
    """One thing the learner did; `at` is in UTC, `data` is JSON."""

    id: str
    at: datetime
    kind: str
    question: str
    data: dict[str, Any]


def make_row(id: str, at: datetime, kind: str, question: str, data: dict[str, Any]) -> Row:
    """The row of an event or draft; ValueError says what is wrong with it."""
    if kind not in FIELDS:
        raise ValueError(f"the kind of an event is one of {', '.join(FIELDS)}, got {kind!r}")
    if not (isinstance(question, str) and question.isprintable() and question and isinstance(data, dict)):
        raise ValueError(f"an event has a question's id and a dict of data, got {question!r} and {data!r}")
    if not (re.fullmatch("[0-9a-f]{32}", id) if kind != "draft" else id == "draft:" + question):
        raise ValueError(f"the id of an event is 32 hexadecimal digits, of a draft its question's, got {id!r}")
    for name, wanted in FIELDS[kind].items():
        if type(data.get(name)) is not wanted:
            raise ValueError(f"the data of {kind} has {name!r}: {wanted.__name__}, got {data!r}")
    if kind == "rating" and data["rating"] not in range(1, 5):
        raise ValueError(f"a rating is 1, 2, 3 or 4 (Again, Hard, Good, Easy), got {data['rating']}")
    if at.tzinfo is None:
        raise ValueError(f"the time of an event needs a time zone, got {at.isoformat()}")
    when = at.astimezone(UTC).isoformat(timespec="microseconds")
    try:
        fields = (id, when, kind, question, json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the data of an event must be JSON ({error})") from error
    return (*fields, checksum(fields))


def make_event(row: Row) -> Event:
    """The event of a row."""
    return Event(row[0], datetime.fromisoformat(row[1]), row[2], row[3], json.loads(row[4]))


def checksum(fields: Iterable[str]) -> int:
    """The CRC-32 of a row's other fields."""
    return zlib.crc32("\n".join(fields).encode())


def is_sound(row: Any) -> bool:
    """Whether this is a row and its checksum is right."""
    return len(row) == 6 and all(isinstance(field, str) for field in row[:5]) and checksum(row[:5]) == row[5]


def to_line(row: Row) -> bytes:
    """The row as a line of JSON."""
    return json.dumps(row).encode() + b"\n"


def from_line(line: bytes) -> Row | None:
    """The row that a line holds, or None if the line is damaged."""
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, list) and is_sound(row):
            return (*row[:5], row[5])
    return None
