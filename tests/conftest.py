"""Shapes and dtypes in the signatures of the reference modules are checked at every call in the test run."""

from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Triton compiles the source of its functions and cannot take wrapped ones.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "minillm").glob("*/*.py"))
    if path.parent.name != "study" and path.stem != "__init__" and not path.stem.endswith("_triton")
]
jaxtyping.install_import_hook(MODULES, "beartype.beartype")


@pytest.fixture(autouse=True)
def _refusals_are_ours(request):
    """In tests named test_refus... the function itself must refuse what its annotation already forbids."""
    jaxtyping.config.update("jaxtyping_disable", request.node.name.startswith("test_refus"))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
