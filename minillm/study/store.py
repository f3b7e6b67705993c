"""What the learner did: ratings, attempts, answers, hints, and the drafts of answers.

Every row is kept twice: in `study.db` (SQLite, WAL, synchronous=FULL) and as a line of JSON in `study.db.jsonl`. It is
acknowledged when both are on the disk. SQLite gives transactions between kernels; the lines give back what a damaged
or deleted database can not. A line is written inside the transaction, so SQLite's write lock orders the lines. Each
row carries a CRC; opening checks every row of both and gives each file what only the other has.
"""

import errno
import json
import os
import shutil
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minillm.study.paths import data_dir
from minillm.study.rows import Event, Row, from_line, is_sound, make_event, make_row, to_line

FORMAT, VERSION = "minillm study", 1  # of an exported file
WAIT = 30.0  # seconds to wait for the transaction of another kernel

# Step i takes a database from version i to i + 1; the version is SQLite's user_version.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE events (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, at TEXT NOT NULL,"
        " kind TEXT NOT NULL, question TEXT NOT NULL, data TEXT NOT NULL, crc INTEGER NOT NULL)",
    ),
)
SELECT = "SELECT id, at, kind, question, data, crc FROM events "
# An event never changes. A draft is a row of kind "draft", one a question, and the newest wins.
INSERT = (
    "INSERT INTO events (id, at, kind, question, data, crc) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
    " SET at = excluded.at, data = excluded.data, crc = excluded.crc"
    " WHERE events.kind = 'draft' AND excluded.at > events.at"
)
T = TypeVar("T")


class StoreError(RuntimeError):
    """The learner's data could not be read or saved; the message names the file and what to do."""


class _Damage(Exception):
    """The database does not hold what was written to it."""


class Store:
    """The learner's data in one file, by default `study.db` in `data_dir()`; StoreError if it can not be used.

    Kernels, threads and forked processes may share a file. `notice` says what opening had to repair, or is None.
    """

    _db: sqlite3.Connection | None = None

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path(path) if path is not None else data_dir() / "study.db"
        self.lines = self.path.with_name(self.path.name + ".jsonl")
        self.notice: str | None = None
        self._file: tuple[int, int] | None = None
        _STORES.add(self)
        self._do(lambda db: None)

    def append(self, kind: str, question: str, data: dict[str, Any], *, at: datetime | None = None) -> Event:
        """The event, durable when it returns. ValueError if kind or data are wrong, StoreError if not saved."""
        row = make_row(uuid.uuid4().hex, at or datetime.now(UTC), kind, question, data)
        self._do(lambda db: self._write(db, [row]))
        return make_event(row)

    def events(self, kind: str | None = None, question: str | None = None) -> list[Event]:
        """The events in time order, of one kind or one question if given."""
        where = "WHERE kind != 'draft' AND kind = ifnull(?, kind) AND question = ifnull(?, question) ORDER BY at, n"
        return [make_event(row) for row in self._do(lambda db: _rows(db, where, kind, question))]

    def save_draft(self, question: str, text: str) -> None:
        """Keeps the text in place of the question's last draft, durable when it returns."""

        def save(db: sqlite3.Connection) -> None:
            now, old = datetime.now(UTC), [make_event(row) for row in _rows(db, "WHERE id = ?", "draft:" + question)]
            if [event.data["text"] for event in old] != [text]:
                at = max([now, *(event.at + timedelta(microseconds=1) for event in old)])  # the clock may go back
                self._write(db, [make_row("draft:" + question, at, "draft", question, {"text": text})])

        self._do(save)

    def draft(self, question: str) -> str:
        """The question's last draft, or the empty string."""
        rows = self._do(lambda db: _rows(db, "WHERE id = ?", "draft:" + question))
        return make_event(rows[0]).data["text"] if rows else ""

    def export_json(self, path: Path) -> int:
        """Writes events and drafts to one JSON file, all or nothing; the number of events."""
        rows = self._do(lambda db: _rows(db, "ORDER BY at, n"))
        names = ("id", "at", "kind", "question")
        events = [dict(zip(names, row, strict=False), data=json.loads(row[4])) for row in rows]
        text = json.dumps({"format": FORMAT, "version": VERSION, "events": events}, indent=1)
        try:
            _replace(Path(path), text.encode())
        except OSError as error:
            _fail(Path(path), error)
        return sum(row[2] != "draft" for row in rows)

    def import_json(self, path: Path) -> int:
        """Adds an exported file's events that are not here yet, and newer drafts; the number of new events."""
        rows = _imported(Path(path))
        return sum(row[2] != "draft" for row in self._do(lambda db: self._write(db, rows)))

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        with _LOCK:
            db, self._db = self._db, None
            if db is not None:
                db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._db is not None:
            self._db.close()

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with _LOCK:
            try:
                try:
                    return work(self._handle())
                except (sqlite3.DatabaseError, _Damage) as error:
                    if not _damaged(error):
                        raise
                    self.close()
                    return work(self._handle())  # opening repairs
            except (sqlite3.Error, OSError, _Damage) as error:
                _fail(self.path, error)

    def _handle(self) -> sqlite3.Connection:
        with suppress(FileNotFoundError):
            if self._db is not None and self._file == _identity(self.path):
                return self._db
        self.close()  # the file was deleted, or another kernel has put a repaired one in its place
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One process at a time opens, migrates and repairs; the lock of a killed one is gone.
        with closing(_connect(self.path.with_name(self.path.name + ".lock"))) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            self._db = self._open()
            self._file = _identity(self.path)
        return self._db

    def _open(self) -> sqlite3.Connection:
        reason = "" if self.path.exists() else f"{self.path} was missing"
        db = _connect(self.path)
        try:
            try:
                _prepare(db, self.path)
                self._complete(db, [], reason)
            except (sqlite3.DatabaseError, _Damage) as error:
                if not _damaged(error):
                    raise
                salvaged = list(_salvage(db, self.path))
                db.close()
                aside = _set_aside(self.path)
                db = _connect(self.path)
                _prepare(db, self.path)
                self._complete(db, salvaged, f"{self.path} was damaged ({error}) and is kept as {aside.name}")
        except BaseException:
            db.close()
            raise
        return db

    def _complete(self, db: sqlite3.Connection, salvaged: list[Row], reason: str) -> None:
        """Makes both files hold every row that either has, and sets `notice` if the database lacked some."""
        with _transaction(db):
            rows = {row[0]: row for row in _rows(db)}
            lines = self.lines.read_bytes().split(b"\n") if self.lines.exists() else []
            logged = {row[:2]: row for row in map(from_line, lines) if row}
            found = {}
            for row in (*salvaged, *logged.values()):
                if row[0] not in rows or (row[2] == "draft" and row[1] > rows[row[0]][1]):
                    rows[row[0]] = found[row[0]] = row
            db.executemany(INSERT, found.values())
            bad = sum(1 for line in lines[:-1] if line and not from_line(line))
            if not bad and sum(map(len, lines)) > 2**20 + 8 * sum(len(row[4]) for row in rows.values()):
                _replace(self.lines, b"".join(map(to_line, rows.values())))  # mostly old drafts
            else:
                self._log(db, [row for row in rows.values() if row[:2] not in logged])
        if found or "damaged" in reason:
            told = f"but {bad} unreadable lines there may be lost entries" if bad else "none is known to be missing"
            told = told if lines else "but that file is gone too, so some may be missing"
            back = f"{len(found)} entries were put back with the help of {self.lines.name}, {told}."
            self.notice = f"{reason or f'{self.path} lacked entries'}; {back}"

    def _write(self, db: sqlite3.Connection, rows: Iterable[Row]) -> list[Row]:
        """Writes the rows to both files in one transaction; those that were new."""
        with _transaction(db):
            new = [row for row in rows if db.execute(INSERT, row).rowcount == 1]
            self._log(db, new)
        return new

    def _log(self, db: sqlite3.Connection, rows: list[Row]) -> None:
        """Adds lines and commits; takes the lines back if the commit fails."""
        if not rows:
            return
        with open(self.lines, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            broken = file.read(1) not in (b"", b"\n")  # a killed kernel left half a line
            text = memoryview(b"\n" * broken + b"".join(map(to_line, rows)))
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
                db.execute("COMMIT")
            except BaseException as error:
                if db.in_transaction or isinstance(error, Exception):  # not so for Ctrl-C just after the commit
                    with suppress(OSError):
                        file.truncate(size)
                raise


# SQLite handles must not live across a fork: close them before, and each side opens its own at the next use.
_LOCK = threading.RLock()
_STORES: "weakref.WeakSet[Store]" = weakref.WeakSet()


def _before_fork() -> None:
    _LOCK.acquire()
    for store in list(_STORES):
        store.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    db.text_factory = lambda text: text.decode("utf-8", "replace")  # damaged text is for the CRC to find
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Sets the handle up and migrates the file. StoreError if it is too new, _Damage if it is not sound."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} was written by a newer minillm (schema {version}, this one knows {len(MIGRATIONS)}): update "
            "minillm, or set MINILLM_HOME to another folder. The file was not touched."
        )
    (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    if check != "ok" or version < 0 or (version > 0) != ("events" in tables):
        raise _Damage("its pages are broken" if check != "ok" else "its header is wrong")
    for setting in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON"):
        db.execute(f"PRAGMA {setting}").fetchall()
    if version < len(MIGRATIONS):
        with _transaction(db):
            for number, steps in enumerate(MIGRATIONS[version:], version + 1):
                for step in steps:
                    db.execute(step)
                db.execute(f"PRAGMA user_version={number}")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        if db.in_transaction:
            db.execute("COMMIT")
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")


def _salvage(db: sqlite3.Connection, path: Path) -> Iterator[Row]:
    """The sound rows of a damaged database, each looked up on its own."""
    with suppress(sqlite3.Error):
        db.execute("PRAGMA writable_schema=ON")  # reads a truncated file
    size = sum(os.path.getsize(f"{path}{end}") for end in ("", "-wal") if os.path.exists(f"{path}{end}"))
    for n in range(1, size // 64):  # a row takes more bytes than that, and none is ever deleted
        with suppress(sqlite3.Error):
            row = db.execute(SELECT + "WHERE n = ?", (n,)).fetchone()
            if row and is_sound(row):
                yield row


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.stem}-damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{path.suffix}")
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{end}", f"{aside}{end}")
    return aside


def _rows(db: sqlite3.Connection, where: str = "", *values: str | None) -> list[Row]:
    rows = db.execute(SELECT + where, values).fetchall()
    if not all(map(is_sound, rows)):
        raise _Damage("an entry differs from its checksum")
    return rows


def _imported(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        file = json.loads(path.read_bytes())
        if not isinstance(file, dict) or file.get("format") != FORMAT or not isinstance(file.get("events"), list):
            raise StoreError(f"{path} was not exported by minillm; nothing was imported.")
        if file.get("version") != VERSION:
            known = f"this minillm reads version {VERSION}"
            raise StoreError(f"{path} has version {file.get('version')!r}, {known}: update; nothing was imported.")
        for entry in file["events"]:
            at = datetime.fromisoformat(entry["at"])
            rows.append(make_row(entry["id"], at, entry["kind"], entry["question"], entry["data"]))
    except KeyError as error:
        raise StoreError(f"{path}: events[{len(rows)}] has no {error}; nothing was imported.") from error
    except OSError as error:
        _fail(path, error)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise StoreError(f"{path}: events[{len(rows)}]: {error}; nothing was imported.") from error
    return rows


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _damaged(error: Exception) -> bool:
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return isinstance(error, _Damage) or getattr(error, "sqlite_errorcode", 0) & 0xFF in damage


def _fail(path: Path, error: Exception) -> NoReturn:
    code, number = getattr(error, "sqlite_errorcode", 0) & 0xFF, getattr(error, "errno", None)
    full = code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    with suppress(OSError):
        full = full or (code == sqlite3.SQLITE_IOERR and shutil.disk_usage(path.parent).free < 2**20)
    if full:
        told = "the disk is full, nothing more was saved; what was saved before is safe. Free some space and try again"
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        told = f"another program has held it for {WAIT:.0f} seconds; close other notebooks and try again"
    elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM) or isinstance(error, OSError):
        told = f"can not be read or written ({error}); check its folder and permissions, or set MINILLM_HOME"
    else:
        told = f"SQLite can not use it ({error}); nothing was deleted. Close other notebooks and try again"
    raise StoreError(f"{path}: {told}.") from error
