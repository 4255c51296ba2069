"""Tables, in terminals and elsewhere."""

import io

import pytest
from rich.table import Table

from megagap.errors import counted
from megagap.terminal.console import Console


def some_table(name: str) -> Table:
    table = Table("source", "tokens", title=f"what {name} reads")
    table.add_row(name, "1,234")
    return table


def test_a_table_is_as_wide_as_its_content_where_output_is_not_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("x" * 500, "a name of words " * 20 + "end", "日本語" * 50):
        output = io.StringIO()
        Console(file=output).print(some_table(name))
        assert f"│ {name} │ 1,234  │\n" in output.getvalue()
        assert f"what {name} reads" in output.getvalue()


@pytest.mark.parametrize("no_wrap", [False, True])
@pytest.mark.parametrize("width", [10, 25, 60])
def test_in_a_narrow_terminal_cells_are_folded_and_nothing_is_left_out(width, no_wrap):
    name = "".join(chr(ord("a") + i % 26) for i in range(100)) + "日本語"
    output = io.StringIO()
    table = some_table(name)
    table.columns[0].no_wrap = no_wrap
    Console(file=output, width=width).print(table)
    rows = output.getvalue().split("┡")[1].splitlines()[1:-1]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert "".join(cell[0] for cell in cells) == name and "".join(cell[1] for cell in cells) == "1,234"
    assert "…" not in output.getvalue()


def test_brackets_and_colons_in_names_are_shown_as_they_are():
    output = io.StringIO()
    Console(file=output).print(some_table("web[bold][/en]:smile:"))
    assert "│ web[bold][/en]:smile: │" in output.getvalue()


def test_one_is_singular():
    assert [counted(count, "step") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
