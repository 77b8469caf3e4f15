"""The documentation: it builds without a warning, and what it shows happens, on a real PostgreSQL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import make_url

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

URL = "scott:tiger@localhost/shop"
"""The database of the documentation, in URLs; the tests put theirs in its place."""
LABEL = "scott@localhost:5432/shop"
"""The same, where a pool tells its name."""

NOT_RUN = {
    "recipes/alembic": "tests/test_alembic.py reads the page, and runs it",
    "recipes/jupyterhub": "tests/test_applications.py has JupyterHub read it",
    "testing": "tests/test_pytest_plugin.py reads the page, and runs it",
    "recipes/flask-sqlalchemy": "a fixture of a test suite; the rest of the page is the example itself",
}
"""Pages with Python that is not run as it stands, and why."""

APPLICATIONS = {
    "recipes/celery-results": "celery",
    "recipes/opentelemetry": "opentelemetry.instrumentation.sqlalchemy",
    "recipes/optuna": "optuna",
    "recipes/pandas": "pandas",
    "recipes/sqlmodel": "sqlmodel",
}
"""Pages about applications, and what has to be installed to run them: the extra of that name."""

# What runs the examples of an interpreter session (`pycon`), in the names of the page's other blocks, and
# SQL on the page's `engine`.
CHECK = """
import doctest, io
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
def check(session, line):
    said = io.StringIO()
    test = doctest.DocTestParser().get_doctest(session, globals(), "session", None, line - 1)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=said.write, clear_globs=False)
    globals().update(test.globs)
    if runner.failures:
        raise SystemExit(said.getvalue())
def query(statements):
    with engine.connect() as connection:
        connection.exec_driver_sql(statements)
"""


class Block(NamedTuple):
    """One code block of a page."""

    language: str
    line: int
    text: str


def pages() -> list[str]:
    """All pages, and the README."""
    return ["README", *sorted(str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.rst"))]


def source(page: str) -> str:
    """The text of a page."""
    return (ROOT / "README.rst" if page == "README" else DOCS / f"{page}.rst").read_text()


def blocks(text: str) -> list[Block]:
    """The code blocks of a page in reStructuredText."""
    found = []
    pattern = r"^( *)\.\. code-block:: (\w+)\n((?:\1 +:.*\n)*)\n((?:\1 +.*\n|[ \t]*\n)+)"
    for match in re.finditer(pattern, text + "\n", re.MULTILINE):
        line = text[: match.start(4)].count("\n") + 1
        found.append(Block(match[2], line, textwrap.dedent(match[4]).strip("\n") + "\n"))
    return found


def program(page: str) -> str:
    """The blocks of a page in order, as one program; empty if there is nothing to run."""
    steps = []
    for block in blocks(source(page)):
        if block.language == "python":
            steps.append(f"# line {block.line}\n{block.text}")
        elif block.language == "pycon":
            steps.append(f"check({block.text!r}, {block.line})\n")
        elif block.language == "sql":
            steps.append(f"query({block.text!r})\n")
    return "\n".join([CHECK, *steps]) if steps else ""


RUN = [page for page in pages() if page not in NOT_RUN and program(page)]


def of_page(page: str) -> Any:
    """The page as a parameter of a test; what takes long to import is exhaustive."""
    return pytest.param(page, marks=[pytest.mark.exhaustive] * (page in APPLICATIONS))


@pytest.mark.slow
@pytest.mark.parametrize("page", [of_page(page) for page in RUN])
def test_what_a_page_shows_happens(page: str, pg_url: str, tmp_path: Path) -> None:
    """The page's Python runs in order, without a warning, and its sessions print what they show."""
    if page in APPLICATIONS:
        pytest.importorskip(APPLICATIONS[page])
    url = make_url(pg_url)
    text = program(page).replace(URL, pg_url.split("://")[1])
    script = tmp_path / "page.py"
    script.write_text(text.replace(LABEL, f"{url.username}@{url.host}:{url.port}/{url.database}"))
    ended = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_page_with_python_is_run_or_says_why_not() -> None:
    """A page named as not run has something to run; the guides and the reference are run."""
    assert all(program(page) for page in NOT_RUN)
    assert set(APPLICATIONS) <= set(RUN)
    assert {"README", "configuration", "sizing", "asyncio"} <= set(RUN)
    assert {page for page in pages() if page.startswith("coming-from/")} <= set(RUN)


def test_a_block_of_a_page_is_found_with_its_language_and_line() -> None:
    """Options and indentation are not part of it, what follows neither."""
    text = "x\n\n.. code-block:: python\n   :caption: c\n\n    a = 1\n\n    b = 2\n\nText\n"
    assert blocks(text) == [Block("python", 6, "a = 1\n\nb = 2\n")]


def test_the_readme_is_well_formed_and_its_links_lead_somewhere() -> None:
    """docutils has no warning for it, and each link and picture is a file of the checkout."""
    core = pytest.importorskip("docutils.core")
    text = source("README")
    # A warning is raised.
    core.publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2, "traceback": True})
    named = re.findall(r"<([^<>]+)>`__|image:: (.+)", text)
    assert named
    for link, image in named:
        assert (ROOT / (link or image)).is_file(), link or image


def test_the_first_cell_of_a_row_is_one_line() -> None:
    """In a simple table a second line of it is a row of its own, and no tool says so."""
    broken = []
    for page in [*pages(), "../CONTRIBUTING"]:
        for table in re.findall(r"^ *=+(?: +=+)+\n(?: *\S.*\n)+", source(page), re.MULTILINE):
            border, *rows = table.splitlines()
            first = [row[: border.index("= ") + 1].strip() for row in rows]
            broken += [(page, cell) for cell in first if re.search(r"(,| (a|an|the|of|and|or))$", cell)]
    assert broken == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """`sphinx-build -W` succeeds, and each page is there."""
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module)
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-d",
            tmp_path / "trees",
            DOCS,
            tmp_path / "html",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    for page in pages()[1:]:
        assert (tmp_path / "html" / f"{page}.html").is_file()
