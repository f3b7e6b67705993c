"""A process that writes to a store until it is killed, or COUNT times: store_writer.py PATH TAG [COUNT].

It prints a line of JSON after each write that was acknowledged: the event's id, or null for a draft, and its number.
"""

import itertools
import json
import sys
import time
from pathlib import Path

from minillm.study.store import Store


def main(path: str, tag: str, count: str = "") -> None:
    with Store(Path(path)) as store:
        for number in itertools.islice(itertools.count(), int(count) if count else None):
            id = None
            if number % 4 == 0:
                store.save_draft(f"draft/{tag}", str(number))
            elif number % 4 == 1:
                id = store.append("rating", f"crash/{tag}", {"rating": 1 + number % 3, "number": number}).id
            else:
                data = {"code": "x = 1\n" * 99, "verdict": "failed", "number": number}
                id = store.append("attempt", f"crash/{tag}", data).id
            print(json.dumps([id, number]), flush=True)
            time.sleep(0.001)  # lets another writer have its turn


if __name__ == "__main__":
    main(*sys.argv[1:])
