"""The tests over interpreters and SQLAlchemy versions, and the wheel as its users get it.

``nox`` runs the tests with all interpreters that are installed and says which are not; ``nox -l`` lists what
there is; what follows ``--`` goes to pytest: ``nox -p 3.12 -- -m "not slow"``.
"""

from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SQLALCHEMYS = ["oldest", "2.0", "2.1"]
OLDEST = {"3.13": "2.0.31"}
"""The oldest 2.0 that imports on the interpreter, where that is not the first."""
COMBINATIONS = [
    (python, sqlalchemy)
    for python in PYTHONS
    for sqlalchemy in SQLALCHEMYS
    if (python, sqlalchemy) != ("3.10", "2.1")  # 2.1 asks for Python 3.11
]

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize(("python", "sqlalchemy"), COMBINATIONS)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """The tests with the package installed, not the checkout, and with this SQLAlchemy."""
    if sqlalchemy == "oldest":
        # Without what examples/ need: Flask-SQLAlchemy asks for a later one. Their tests say so, and skip.
        session.install(".[test]", f"sqlalchemy=={OLDEST.get(str(session.python), '2.0.0')}")
    else:
        session.install(".[test,examples]", f"sqlalchemy=={sqlalchemy}.*")
    session.run("pytest", "-p", "no:cacheprovider", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the sdist, from it the wheel, look at both, and use the wheel outside the checkout."""
    dist = Path(session.create_tmp(), "dist").resolve()
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    (built,) = dist.glob("*.whl")
    session.install(f"{built}[demo]")
    session.chdir(dist)
    # -I: a checkout in PYTHONPATH would be what runs, in place of the wheel.
    session.run("python", "-I", "-m", "sqla_queries_pool", "demo", "--seconds", "0.5")
