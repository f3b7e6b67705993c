"""The learner's data survives kills, concurrent kernels, full disks and damaged files, and says what happened."""

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from minillm.study import store as store_module
from minillm.study.store import Event, Store, StoreError

WRITER = Path(__file__).with_name("store_writer.py")
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork or POSIX permissions")
# The file of schema 1 as it is on learners' disks: never change it, write a migration.
SCHEMA_1 = """
CREATE TABLE events (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, at TEXT NOT NULL,
                     kind TEXT NOT NULL, question TEXT NOT NULL, data TEXT NOT NULL, crc INTEGER NOT NULL);
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def lines_of(path: Path) -> Path:
    return path.with_name(path.name + ".jsonl")


def fill(path: Path, count: int = 200) -> list[Event]:
    """Events (imported, for one transaction) with a text each that occurs nowhere else."""
    start, names = datetime(2026, 1, 2, tzinfo=UTC), random.Random(count)
    events = [
        {
            "id": f"{names.getrandbits(128):032x}",
            "at": str(start + timedelta(minutes=number)),
            "kind": "attempt",
            "question": "attention/flash",
            "data": {"code": f"<<{number:04}>>" * 20, "verdict": "failed"},
        }
        for number in range(count)
    ]
    file = path.with_name("filling.json")
    file.write_text(json.dumps({"format": "minillm study", "version": 1, "events": events}))
    with Store(path) as store:
        assert store.import_json(file) == count
        return store.events()


def read(path: Path) -> tuple[list[Event], str]:
    with Store(path) as store:
        return store.events(), store.notice or ""


def kept_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob("study-damaged-*.db"))


def alone(path: Path, folder: Path, *, lines: bool) -> Path:
    """A copy of one of the two files by itself (of SQLite's with its WAL): each must hold everything."""
    folder.mkdir()
    for file in path.parent.glob(path.name + "*"):
        if lines == (file == lines_of(path)):
            shutil.copy(file, folder)
    return folder / path.name


def spawn(path: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, str(WRITER), str(path), *args], stdout=subprocess.PIPE, text=True)


def acknowledged(printed: str) -> list[tuple[str | None, int]]:
    return [tuple(json.loads(line)) for line in printed.splitlines(keepends=True) if line.endswith("\n")]


# Reading and writing


def test_what_was_appended_comes_back(path: Path) -> None:
    data = {
        "code": "def f(q):\n    return '注意力' + '\\ud800'",
        "verdict": "error",
        "diagnosis": None,
        "x": [0.1, {"y": 1}],
    }
    with Store(path) as store:
        event = store.append("attempt", "注意力/flash", data)
        assert event.data == data
        assert event.at.utcoffset() == timedelta(0)
        assert abs(event.at - datetime.now(UTC)) < timedelta(minutes=5)  # now, not some fixed time
    with Store(path) as store:
        assert store.events() == [event]
        assert store.notice is None


def test_events_are_in_time_order_and_can_be_chosen(path: Path) -> None:
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    with Store(path) as store:
        late = store.append("rating", "a/b", {"rating": 3}, at=noon)
        # 13:30 at +02:00 is 11:30 UTC: before noon, although its digits sort after.
        early = store.append(
            "hint", "a/b", {"number": 1}, at=noon.replace(hour=13, minute=30, tzinfo=timezone(timedelta(hours=2)))
        )
        other = store.append("rating", "a/c", {"rating": 1}, at=noon + timedelta(microseconds=1))
        same = store.append("answer", "a/c", {"text": "x"}, at=noon + timedelta(microseconds=1))
        assert store.events() == [early, late, other, same]
        assert store.events(kind="rating") == [late, other]
        assert store.events(question="a/b") == [early, late]
        assert store.events(kind="rating", question="a/c") == [other]
        assert store.events(kind="draft") == []
        assert early.at == datetime(2026, 1, 2, 11, 30, tzinfo=UTC)
        assert early.at.tzinfo is UTC
        assert len({event.id for event in store.events()}) == 4


@pytest.mark.parametrize(
    ("kind", "question", "data", "message"),
    [
        ("rating", "a/b", {"rating": 0}, "a rating is 1, 2, 3 or 4 .* got 0"),
        ("rating", "a/b", {"rating": 5}, "got 5"),
        ("rating", "a/b", {"rating": True}, "data of rating has 'rating': int, got {'rating': True}"),
        ("rating", "a/b", {"ticked": []}, "data of rating has 'rating': int"),
        ("attempt", "a/b", {"code": None, "verdict": "passed"}, "data of attempt has 'code': str"),
        ("attempt", "a/b", {"code": ""}, "data of attempt has 'verdict': str"),
        ("answer", "a/b", {}, "data of answer has 'text': str"),
        ("hint", "a/b", {"number": "1"}, "data of hint has 'number': int"),
        ("ratings", "a/b", {"rating": 1}, "one of rating, attempt, answer, hint, draft, got 'ratings'"),
        ("draft", "a/b", {"text": "x"}, "32 hexadecimal digits"),
        ("hint", "a/\ud800", {"number": 1}, "a question's id"),
        ("hint", "", {"number": 1}, "a question's id"),
        ("hint", "a/b", [1], "a dict of data"),
        ("answer", "a/b", {"text": "x", "y": b"x"}, "must be JSON"),
        ("answer", "a/b", {"text": "", "x": float("nan")}, "must be JSON"),
    ],
)
def test_what_is_no_event_is_refused(path: Path, kind: str, question: str, data: dict, message: str) -> None:
    with Store(path) as store:
        with pytest.raises(ValueError, match=message):
            store.append(kind, question, data)
        assert store.events() == []


def test_a_time_without_zone_is_refused(path: Path) -> None:
    with Store(path) as store, pytest.raises(ValueError, match="needs a time zone, got 2026-01-02"):
        store.append("hint", "a/b", {"number": 1}, at=datetime(2026, 1, 2))


def test_the_last_draft_wins(path: Path) -> None:
    with Store(path) as store:
        assert store.draft("a/b") == ""
        for text in ("one", "two", ""):
            store.save_draft("a/b", text)
            store.save_draft("a/c", "other")
            assert store.draft("a/b") == text
        store.save_draft("a/b", "three")
    with Store(path) as store:
        assert (store.draft("a/b"), store.draft("a/c")) == ("three", "other")
        assert store.events() == []


def test_the_default_place_is_the_learners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path / "new" / "folder"))
    with Store() as store:
        event = store.append("hint", "a/b", {"number": 1})
    assert read(tmp_path / "new" / "folder" / "study.db")[0] == [event]


def test_sqlite_and_the_system_are_asked_for_durability(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No kill of a process can show this, only a power cut: so look at what is asked for.
    synced: list[int] = []
    with Store(path) as store:
        assert store._db is not None
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
        store.append("hint", "a/b", {"number": 1})
        assert synced == [lines_of(path).stat().st_size]  # the whole line was written when it was synced


def test_each_file_holds_everything(path: Path, tmp_path: Path) -> None:
    events = fill(path, 20)
    with Store(path) as store:
        store.save_draft("a/b", "mine")
    for lines in (True, False):
        with Store(alone(path, tmp_path / str(lines), lines=lines)) as store:
            assert store.events() == events
            assert store.draft("a/b") == "mine"


# Kills and concurrency


def test_nothing_acknowledged_is_lost_when_writers_are_killed(path: Path, tmp_path: Path) -> None:
    rounds, moments, expected, drafts = 6, random.Random(0), set(), {}
    for number in range(rounds):  # four writers each: 24 kills
        writers = {f"{number}{tag}": spawn(path, f"{number}{tag}") for tag in "abcd"}
        for writer in writers.values():
            assert writer.stdout is not None
            writer.stdout.readline()  # it is writing
        for tag, writer in writers.items():
            time.sleep(moments.uniform(0.002, 0.06))
            writer.kill()
            printed, _ = writer.communicate()
            assert writer.returncode != 0  # it was killed, it did not end
            for id, count in acknowledged(printed):
                if id is None:
                    drafts[f"draft/{tag}"] = count
                else:
                    expected.add((id, f"crash/{tag}", count))
        for lines in (True, False):  # the database with its WAL, and the lines, each by itself
            copy = alone(path, tmp_path / f"{number}-{lines}", lines=lines)
            if not lines:
                with closing(sqlite3.connect(copy)) as db:
                    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            with Store(copy) as store:
                assert expected <= {(event.id, event.question, event.data["number"]) for event in store.events()}
                assert all(int(store.draft(question)) >= count for question, count in drafts.items())
                assert "damaged" not in (store.notice or "")
    assert len(expected) > 10 * rounds  # the writers did write
    with Store(path) as store:
        assert expected <= {(event.id, event.question, event.data["number"]) for event in store.events()}
    assert not kept_aside(path)


def test_a_killed_writers_half_line_harms_no_later_line(path: Path, tmp_path: Path) -> None:
    first = fill(path, 3)
    with open(lines_of(path), "ab") as file:
        file.write(b'["0123456789abcdef0123456789abcdef", "2026-01-')
    with Store(path) as store:
        assert store.notice is None  # it was never acknowledged
        last = store.append("hint", "a/b", {"number": 1})
    assert read(alone(path, tmp_path / "lines", lines=True))[0] == [*first, last]


def test_kernels_write_at_the_same_time(path: Path, tmp_path: Path) -> None:
    writers = {tag: spawn(path, tag, "60") for tag in ("a", "b", "c")}
    with Store(path) as store:
        mine = [store.append("hint", "crash/mine", {"number": number}) for number in range(45)]
    for writer in writers.values():
        printed, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        assert len(acknowledged(printed)) == 60
    for lines in (True, False):
        with Store(alone(path, tmp_path / str(lines), lines=lines)) as store:
            assert [event.data["number"] for event in store.events(question="crash/mine")] == list(range(45))
            for tag in writers:
                numbers = [event.data["number"] for event in store.events(question=f"crash/{tag}")]
                assert numbers == [number for number in range(60) if number % 4]
                assert store.draft(f"draft/{tag}") == "56"
    assert {event.id for event in mine} < {event.id for event in read(path)[0]}


def test_one_kernel_sees_what_another_wrote(path: Path) -> None:
    with Store(path) as one, Store(path) as two:
        event = one.append("rating", "a/b", {"rating": 4})
        assert two.events() == [event]
        two.save_draft("a/b", "two")
        assert one.draft("a/b") == "two"


def test_a_kernel_that_waits_too_long_is_told_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAIT", 0.05)
    with Store(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"study\.db: another program has held it .* close other notebooks"):
            store.append("hint", "a/b", {"number": 1})
        other.execute("ROLLBACK")
        event = store.append("hint", "a/b", {"number": 2})
        assert store.events() == [event]


def test_threads_share_a_store(path: Path) -> None:
    errors: list[BaseException] = []
    with Store(path) as store:

        def work(tag: int) -> None:
            try:
                for number in range(20):
                    store.append("hint", f"thread/{tag}", {"number": number})
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(tag,)) for tag in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for tag in range(4):
            assert [event.data["number"] for event in store.events(question=f"thread/{tag}")] == list(range(20))


FORK = """
import os, sys
from pathlib import Path
from minillm.study.store import Store
store = Store(Path(sys.argv[1]))
store.append("hint", "before/fork", {"number": 0})
parent_closed, child_wrote = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    store.append("hint", "in/child", {"number": 1})
    os.write(child_wrote[1], b"x")
    os.read(parent_closed[0], 1)
    store.append("hint", "in/child", {"number": 2})  # the parent's close must not take the WAL away under us
    os.kill(os.getpid(), 9)
os.read(child_wrote[0], 1)
store.append("hint", "in/parent", {"number": 3})
store.close()
os.write(parent_closed[1], b"x")
assert os.waitpid(child, 0)[1] == 9, "the child failed"
"""


@POSIX
def test_a_forked_process_writes_with_a_handle_of_its_own(path: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(path)], check=True, timeout=60)
    for lines in (True, False):
        events, _ = read(alone(path, tmp_path / str(lines), lines=lines))
        assert [(event.question, event.data["number"]) for event in events] == [
            ("before/fork", 0),
            ("in/child", 1),
            ("in/parent", 3),
            ("in/child", 2),
        ]


# Damaged files


def overwrite(file: Path, start: int, data: bytes) -> None:
    with open(file, "r+b") as handle:
        handle.seek(start)
        handle.write(data)


def noise(count: int) -> bytes:
    return random.Random(1).randbytes(count)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "random bytes over the middle": lambda file: overwrite(
        file, file.stat().st_size // 3, noise(file.stat().st_size // 3)
    ),
    "one page": lambda file: overwrite(file, 4096, noise(4096)),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "cut inside a page": lambda file: os.truncate(file, file.stat().st_size - 1000),
    "not a database": lambda file: file.write_bytes(b"# my notes\n" * 999),
    "header of zeros": lambda file: overwrite(file, 0, bytes(100)),
    "version lost": lambda file: overwrite(file, 60, bytes(4)),
    "version negative": lambda file: overwrite(file, 60, b"\xff" * 4),
    "a letter of an answer": lambda file: overwrite(file, file.read_bytes().index(b"<<0077>>") + 3, b"9"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_loses_nothing(path: Path, damage: str) -> None:
    events = fill(path)
    with Store(path) as store:
        store.save_draft("a/b", "my answer")
    DAMAGE[damage](path)
    damaged = path.read_bytes()
    with Store(path) as store:
        assert store.events() == events
        assert store.draft("a/b") == "my answer"
        (aside,) = kept_aside(path)
        assert aside.read_bytes() == damaged  # kept as it was found
        assert re.fullmatch(r"study-damaged-\d{8}T\d{6}\.\d{6}Z\.db", aside.name)
        assert store.notice is not None
        assert store.notice.startswith(f"{path} was damaged (")
        assert f"is kept as {aside.name}; 201 entries were put back" in store.notice
        assert store.notice.endswith("none is known to be missing.")
        later = store.append("rating", "a/b", {"rating": 2})
    assert read(path) == ([*events, later], "")  # told once


@pytest.mark.parametrize("damage", ["empty", "deleted"])
def test_an_empty_or_deleted_database_comes_back(path: Path, damage: str) -> None:
    events = fill(path, 20)
    if damage == "empty":
        os.truncate(path, 0)
    else:
        path.unlink()
    found, notice = read(path)
    assert found == events
    assert f"{path} {'lacked entries' if damage == 'empty' else 'was missing'}; 20 entries were put back" in notice


def test_a_damaged_wal_loses_nothing(path: Path) -> None:
    writer = spawn(path, "a")
    assert writer.stdout is not None
    printed = "".join(writer.stdout.readline() for _ in range(40))
    writer.kill()
    writer.communicate()
    wal = path.with_name("study.db-wal")
    overwrite(wal, wal.stat().st_size // 2, noise(wal.stat().st_size // 4))  # SQLite takes what is before, silently
    found, notice = read(path)
    assert {id for id, _ in acknowledged(printed) if id} <= {event.id for event in found}
    assert "lacked entries" in notice


def test_without_the_lines_only_the_damaged_page_is_lost(path: Path) -> None:
    events = fill(path, 400)
    lines_of(path).unlink()
    content = path.read_bytes()
    page = content.index(b"<<0222>>") // 4096
    overwrite(path, page * 4096, noise(4096))
    lost = {number for number in range(400) if f"<<{number:04}>>".encode() in content[page * 4096 : (page + 1) * 4096]}
    assert 222 in lost
    assert len(lost) < 40  # the case is what it should be: a page of many
    with Store(path) as store:
        assert store.events() == [event for number, event in enumerate(events) if number not in lost]
        assert store.notice is not None
        assert f"{400 - len(lost)} entries were put back" in store.notice
        assert "may be missing" in store.notice
    assert path.with_name(kept_aside(path)[0].name).stat().st_size == len(content)


def test_a_damaged_index_is_found(path: Path) -> None:
    events = fill(path, 400)
    lines_of(path).unlink()
    content = path.read_bytes()
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    index = next(n for n, page in enumerate(pages) if events[0].id.encode() in page and b"<<" not in page)
    overwrite(path, index * 4096, noise(4096))
    assert read(path)[0] == events
    assert len(kept_aside(path)) == 1


def test_kernels_that_find_the_damage_together_repair_it_once(path: Path) -> None:
    events = fill(path, 1500)
    overwrite(path, 4096, noise(4096))
    writers = [spawn(path, str(number), "8") for number in range(4)]
    new = set()
    for writer in writers:
        printed, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        new |= {id for id, _ in acknowledged(printed) if id}
    found, notice = read(path)
    assert {event.id for event in found} == {event.id for event in events} | new
    assert (len(new), notice) == (24, "")
    assert len(kept_aside(path)) == 1


def test_without_the_lines_a_cut_database_keeps_its_first_part(path: Path) -> None:
    events = fill(path, 400)
    lines_of(path).unlink()
    content = path.read_bytes()
    os.truncate(path, len(content) // 4096 // 2 * 4096)
    kept = path.read_bytes()
    whole = [event for event in events if event.id.encode() in kept and event.data["code"].encode() in kept]
    assert len(whole) > 100
    assert read(path)[0] == whole


def test_both_files_damaged_keep_what_either_has(path: Path) -> None:
    events = fill(path)
    for number, files in ((50, [path]), (90, [lines_of(path)]), (130, [path, lines_of(path)])):
        for file in files:
            overwrite(file, file.read_bytes().index(b"<<%04d>>" % number) + 3, b"9")
    found, notice = read(path)
    assert found == [event for number, event in enumerate(events) if number != 130]
    assert "199 entries were put back" in notice
    assert "2 unreadable lines there may be lost entries" in notice


def test_damaged_or_missing_lines_are_made_good(path: Path, tmp_path: Path) -> None:
    events = fill(path, 30)
    overwrite(lines_of(path), 1000, noise(2000))
    assert read(path) == (events, "")
    assert read(alone(path, tmp_path / "damaged", lines=True))[0] == events
    lines_of(path).unlink()
    assert read(path) == (events, "")
    assert read(alone(path, tmp_path / "missing", lines=True))[0] == events


def test_damage_while_the_store_is_open_is_repaired(path: Path) -> None:
    events = fill(path)
    with Store(path) as store:
        assert store._db is not None
        store._db.execute("PRAGMA shrink_memory").fetchall()  # or SQLite would not look at the file again
        overwrite(path, 0, noise(path.stat().st_size))
        later = store.append("hint", "a/b", {"number": 1})
        assert store.events() == [*events, later]
        assert "was damaged" in (store.notice or "")


@POSIX  # Windows refuses to delete an open file
def test_an_open_store_follows_a_replaced_file(path: Path) -> None:
    events = fill(path, 10)
    with Store(path) as one, Store(path) as two:
        for file in path.parent.glob("study.db*"):
            if file != lines_of(path):
                file.unlink()
        with Store(path) as new:
            assert "was missing" in (new.notice or "")
            events.append(new.append("hint", "a/b", {"number": 2}))
            events.append(one.append("hint", "a/b", {"number": 3}))
            assert new.events() == one.events() == two.events() == events


def test_the_lines_do_not_grow_with_each_draft(path: Path) -> None:
    with Store(path) as store:
        event = store.append("hint", "a/b", {"number": 1})
        for number in range(60):
            store.save_draft("a/b", f"{number}" * 20_000)
    assert lines_of(path).stat().st_size > 2**20
    assert read(path) == ([event], "")
    assert lines_of(path).stat().st_size < 2**16
    path.unlink()
    with Store(path) as store:
        assert store.events() == [event]
        assert store.draft("a/b") == "59" * 20_000


# Versions


def test_a_file_of_schema_1_is_read(path: Path) -> None:
    fields = ["0123456789abcdef0123456789abcdef", "2026-01-02T12:00:00.000000+00:00", "rating", "a/b", '{"rating": 3}']
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA_1)
        db.execute("INSERT INTO events VALUES (1, ?, ?, ?, ?, ?, ?)", (*fields, zlib.crc32("\n".join(fields).encode())))
        db.commit()
    expected = Event(fields[0], datetime(2026, 1, 2, 12, tzinfo=UTC), "rating", "a/b", {"rating": 3})
    assert read(path) == ([expected], "")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(store_module.MIGRATIONS),)


NEXT = ("ALTER TABLE events ADD COLUMN machine TEXT", "CREATE INDEX by_question ON events (question)")


def test_an_older_file_is_migrated_and_a_newer_one_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = fill(path, 5)
    old = store_module.MIGRATIONS
    monkeypatch.setattr(store_module, "MIGRATIONS", (*old, NEXT, ("UPDATE events SET machine = 'this'",)))
    with Store(path) as store:
        assert (store.events(), store.notice) == (events, None)
        events.append(store.append("hint", "a/b", {"number": 1}))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(old) + 2,)
        assert db.execute("SELECT machine FROM events").fetchall() == [("this",)] * 5 + [(None,)]
    content = path.read_bytes()
    monkeypatch.setattr(store_module, "MIGRATIONS", old)
    with pytest.raises(StoreError, match=r"study\.db was written by a newer minillm \(schema 3, this one knows 1\)"):
        Store(path)
    assert path.read_bytes() == content
    assert not kept_aside(path)


def test_a_failed_migration_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = fill(path, 5)
    old = store_module.MIGRATIONS
    monkeypatch.setattr(store_module, "MIGRATIONS", (*old, ("DELETE FROM events", "DELETE FROM gone")))
    with pytest.raises(StoreError, match=r"no such table: gone.*nothing was deleted"):
        Store(path)
    monkeypatch.setattr(store_module, "MIGRATIONS", old)
    assert read(path) == (events, "")


# Full disks and folders that can not be written


def append_to(events: list[Event], store: Store, count: int) -> None:
    for number in range(count):
        events.append(store.append("attempt", "a/b", {"code": "x" * 900, "verdict": "failed", "number": number}))


def test_a_full_database_keeps_what_it_has_and_goes_on_later(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        events = [store.append("hint", "a/b", {"number": 1})]
        assert store._db is not None
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 4}")
        with pytest.raises(StoreError, match=r"study\.db: the disk is full, .* what was saved before is safe"):
            append_to(events, store, 100)
        assert 1 < len(events) < 100
        assert store.events() == events
        store._db.execute("PRAGMA max_page_count = 100000")
        events.append(store.append("attempt", "a/b", {"code": "y" * 1000, "verdict": "failed"}))
        assert store.events() == events
    for lines in (True, False):
        assert read(alone(path, tmp_path / str(lines), lines=lines))[0] == events


def test_a_failed_commit_leaves_no_line_behind(path: Path) -> None:
    def no_commit(action: int, what: str | None, *_: object) -> int:
        return sqlite3.SQLITE_DENY if (action, what) == (sqlite3.SQLITE_TRANSACTION, "COMMIT") else sqlite3.SQLITE_OK

    events = fill(path, 3)
    content = lines_of(path).read_bytes()
    with Store(path) as store:
        assert store._db is not None
        store._db.set_authorizer(no_commit)
        with pytest.raises(StoreError, match="SQLite can not use it"):
            store.append("hint", "a/b", {"number": 1})
        assert lines_of(path).read_bytes() == content
        store._db.set_authorizer(None)
        assert store.events() == events
        events.append(store.append("hint", "a/b", {"number": 2}))
    assert read(path) == (events, "")  # what was refused does not come back


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_lines_that_can_not_be_written_take_the_event_back(path: Path) -> None:
    with Store(path) as store:
        lines, store.lines = store.lines, Path("/dev/full")
        with pytest.raises(StoreError, match="the disk is full"):
            store.append("hint", "a/b", {"number": 1})
        assert store.events() == []
        store.lines = lines
        event = store.append("hint", "a/b", {"number": 2})
        assert store.events() == [event]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        path, filler = disk / "study.db", disk / "filler"
        filler.write_bytes(bytes(2**18))
        with Store(path) as store:
            events: list[Event] = []
            with pytest.raises(StoreError, match="the disk is full"):
                append_to(events, store, 10_000)
            assert len(events) > 50
            for _ in range(3):
                with pytest.raises(StoreError, match="the disk is full"):
                    store.append("attempt", "a/b", {"code": "y" * 100_000, "verdict": "failed"})
            assert store.events() == events
            filler.unlink()
            events.append(store.append("hint", "a/b", {"number": 1}))
            assert store.events() == events
        for lines in (True, False):
            assert read(alone(path, tmp_path / str(lines), lines=lines))[0] == events
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(2**20))
        with pytest.raises(StoreError, match="the disk is full"):
            Store(path)
        filler.unlink()
        assert read(path) == (events, "")


@POSIX
def test_a_folder_that_can_not_be_written_is_named() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, whose parents only their owner may enter
    me = os.geteuid()
    try:
        events = fill(folder / "study.db", 3)
        folder.chmod(0o555)
        if me == 0:
            os.seteuid(65534)  # permissions do not hold root back
        with pytest.raises(StoreError, match=r"study\.db: can not be read or written .* set MINILLM_HOME"):
            Store(folder / "study.db")
        with pytest.raises(StoreError, match="can not be read or written"):
            Store(folder / "new" / "study.db")
        os.seteuid(me)
        folder.chmod(0o755)
        assert read(folder / "study.db") == (events, "")
    finally:
        os.seteuid(me)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_in_place_of_the_file_is_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match=r"study\.db: can not be read or written"):
        Store(path)
    with pytest.raises(StoreError, match="can not be read or written"):
        Store(Path(__file__) / "study.db")


# Export and import


def test_export_and_import_carry_everything(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        for kind in ("rating", "attempt", "answer", "hint"):
            more = {"rating": 2, "text": "注意力 \ud800", "code": "", "verdict": "passed", "number": 1, "none": None}
            store.append(kind, "a/b", more)
        store.save_draft("a/b", "half an answer")
        events = store.events()
        assert store.export_json(tmp_path / "out.json") == 4
    file = json.loads((tmp_path / "out.json").read_text())
    assert (file["format"], file["version"], len(file["events"])) == ("minillm study", 1, 5)
    with Store(tmp_path / "other.db") as other:
        assert other.import_json(tmp_path / "out.json") == 4
        assert other.import_json(tmp_path / "out.json") == 0  # twice adds nothing
        assert other.events() == events
        assert other.draft("a/b") == "half an answer"
    for lines in (True, False):  # an import is durable as an append is
        assert read(alone(tmp_path / "other.db", tmp_path / str(lines), lines=lines))[0] == events


def test_two_machines_merge(tmp_path: Path) -> None:
    with Store(tmp_path / "home.db") as home, Store(tmp_path / "work.db") as work:
        home.append("rating", "a/b", {"rating": 1})
        home.save_draft("a/b", "older")
        home.save_draft("a/c", "only at home")
        work.append("rating", "a/b", {"rating": 4})
        work.save_draft("a/b", "newer")
        home.append("rating", "a/c", {"rating": 2})
        home.export_json(tmp_path / "home.json")
        work.export_json(tmp_path / "work.json")
        assert home.import_json(tmp_path / "work.json") == 1
        assert work.import_json(tmp_path / "home.json") == 2
        assert home.events() == work.events()
        assert [event.data["rating"] for event in home.events()] == [1, 4, 2]
        for store in (home, work):
            assert (store.draft("a/b"), store.draft("a/c")) == ("newer", "only at home")


def entry(**changes: object) -> dict[str, object]:
    base = {
        "id": "0" * 32,
        "at": "2030-01-02T12:00:00+02:00",
        "kind": "rating",
        "question": "a/b",
        "data": {"rating": 3},
    }
    return {name: value for name, value in {**base, **changes}.items() if value is not ...}


def test_an_imported_event_never_replaces_one_and_a_later_draft_of_mine_wins(path: Path, tmp_path: Path) -> None:
    draft = entry(id="draft:a/b", kind="draft", data={"text": "from a clock that is ahead"})
    file = tmp_path / "in.json"
    with Store(path) as store:
        mine = store.append("rating", "a/b", {"rating": 1})
        events = [entry(id=mine.id), entry(), draft]
        file.write_text(json.dumps({"format": "minillm study", "version": 1, "events": events}))
        assert store.import_json(file) == 1
        assert [event.data["rating"] for event in store.events()] == [1, 3]
        assert store.events()[1].at == datetime(2030, 1, 2, 10, tzinfo=UTC)
        store.save_draft("a/b", "typed now")
        assert store.draft("a/b") == "typed now"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry(data={"rating": 7}), r"events\[1\]: a rating is 1, 2, 3 or 4 .* got 7"),
        (entry(kind="note"), r"events\[1\]: the kind of an event .* got 'note'"),
        (entry(at="2026-01-02T12:00:00"), r"events\[1\]: .* needs a time zone"),
        (entry(at="yesterday"), r"events\[1\]: Invalid isoformat string: 'yesterday'"),
        (entry(at=5), r"events\[1\]: fromisoformat"),
        (entry(id="7"), r"events\[1\]: the id of an event is 32 .* got '7'"),
        (entry(id=7), r"events\[1\]: "),
        (entry(data="x"), r"events\[1\]: an event has .* a dict"),
        (entry(question=...), r"events\[1\] has no 'question'"),
        (entry(kind="draft", id="draft:x/y", data={"text": "x"}), r"events\[1\]: the id of an event"),
        (entry(kind="draft", id="draft:a/b", data={}), r"events\[1\]: the data of draft has 'text': str"),
        ("x", r"events\[1\]: "),
    ],
)
def test_an_import_is_all_or_nothing(path: Path, tmp_path: Path, bad: object, message: str) -> None:
    file = tmp_path / "in.json"
    good = entry(id="1" * 32)
    file.write_text(json.dumps({"format": "minillm study", "version": 1, "events": [good, bad]}))
    with Store(path) as store:
        with pytest.raises(StoreError, match=rf"in\.json.*{message}.*; nothing was imported"):
            store.import_json(file)
        assert store.events() == []
        assert store.draft("a/b") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "nothing was imported"),
        ("[]", "was not exported by minillm"),
        ('{"format": "anki", "version": 1, "events": []}', "was not exported by minillm"),
        (
            '{"format": "minillm study", "version": 2, "events": []}',
            "has version 2, this minillm reads version 1: update",
        ),
        (None, "can not be read or written"),
    ],
)
def test_a_file_that_is_no_export_is_refused(path: Path, tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "in.json").write_text(text)
    with Store(path) as store, pytest.raises(StoreError, match=rf"in\.json.*{message}"):
        store.import_json(tmp_path / "in.json")


def test_a_failed_export_leaves_the_old_one(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.json").write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with Store(path) as store:
        store.append("hint", "a/b", {"number": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"out\.json: the disk is full"):
                store.export_json(folder / "out.json")
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("out.json", "old")]
        assert store.export_json(folder / "out.json") == 1
        assert [file.name for file in folder.iterdir()] == ["out.json"]
