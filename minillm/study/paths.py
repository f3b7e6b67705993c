"""Where things are: the checkout and the learner's data."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = ROOT / "answers"
NOTEBOOKS = ROOT / "notebooks"
WORK = ROOT / "work"


def data_dir() -> Path:
    """The folder of the learner's own data: MINILLM_HOME, else the user data directory of this platform."""
    home = os.environ.get("MINILLM_HOME")
    if home:
        return Path(home).expanduser()
    from platformdirs import user_data_path

    return user_data_path("minillm", appauthor=False)
