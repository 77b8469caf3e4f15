from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sqla_queries_pool.demo.server import Server, read_url
from sqla_queries_pool.embedded import EmbeddedPostgres


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The benchmarks: a package of the repository, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent))
        yield importlib.import_module("benchmarks.__main__")


@pytest.fixture(scope="module")
def cells(program: Any, pg_server: EmbeddedPostgres) -> list[Any]:
    """All that is measured, in as little time as can be."""
    effort = program.Effort(rounds=2, batches=2, checkouts=3, seconds=0.03, warm_up=0.02)
    with closing(Server(read_url(pg_server.url()))) as server:
        return list(program.cells([program.fake(), program.postgresql(server)], effort))


@pytest.mark.slow
def test_every_cell_is_measured_for_all_who_take_part(program: Any, cells: list[Any]) -> None:
    """Without and with contention and on one budget, with the fake driver and on PostgreSQL."""
    assert [cell.group for cell in cells].count("uncontended, one thread") == 3
    assert [cell.group for cell in cells].count("contended") == 2 * len(program.LOADS)
    assert [cell.group for cell in cells].count("one budget") == 2 * len(program.SHARED)
    assert len({(cell.group, cell.name) for cell in cells}) == len(cells)
    for cell in cells:
        assert {"QueuePool", "QueriesPool"} <= set(cell.figures)
        assert len({tuple(figures) for figures in cell.figures.values()}) == 1


@pytest.mark.slow
def test_ratios_refer_to_a_competitor_of_the_same_cell(cells: list[Any]) -> None:
    """The reference's own is 1, and a median lies between the least and the most."""
    for cell in cells:
        reference = cell.figures[cell.reference]["ratio"]
        assert (reference.least, reference.most) in ((1, 1), (0, 1), (0, 0))  # 0: nobody was served
        for figures in cell.figures.values():
            for figure in figures.values():
                assert figure.least <= figure.median <= figure.most


@pytest.mark.slow
def test_the_table_and_the_file_have_all_cells(program: Any, cells: list[Any], tmp_path: Path) -> None:
    """Every cell and competitor is in the table; the file is JSON and has the parameters, too."""
    from rich.console import Console

    text = io.StringIO()
    program.report.show(cells, Console(file=text, width=program.report.WIDTH))
    program.report.write(cells, {"rounds": 2}, tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert written["parameters"] == {"rounds": 2}
    assert len(written["cells"]) == len(cells)
    for cell in cells:
        assert all(part in text.getvalue() for part in cell.name.split(": "))
        assert all(competitor in text.getvalue() for competitor in cell.figures)
