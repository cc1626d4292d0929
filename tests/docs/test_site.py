"""The README and the site: short, complete, and of this source."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import lorapre_dist
from tests.docs import messages

REPO = messages.REPO
DOCS = REPO / "docs"
API = DOCS / "api" / "index.md"
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted(DOCS.glob("[a-z]*/*.md")), DOCS / "index.md"]
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(DOCS))
from generate import command_line, results, walk  # noqa: E402


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_has_the_newcomers_commands() -> None:
    lines = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for command in ("bash launch/quickstart.sh", "bash launch/test.sh"):
        assert any(line.startswith(command) for line in lines)
        assert (REPO / command.split()[1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^([a-z]+/\w+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.glob("[a-z]*/*.md"))


def test_files_that_pages_name_are_there() -> None:
    """Paths of the repository in backticks: what a page says of a file ends when the file moves."""
    rooms = r"`((?:lorapre_dist|tests|launch|ds_configs|docs)/[\w/.]+\.(?:py|sh|json|ini|md|yaml|csv))`"
    named = {(page.name, path) for page in PAGES for path in re.findall(rooms, page.read_text(encoding="utf-8"))}
    assert len(named) > 20
    assert not [(page, path) for page, path in named if not (REPO / path).exists()]


@pytest.mark.parametrize("name", ["beside_adamw", "worst_distance"])
def test_readme_has_the_recorded_results(name: str) -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    if name == "beside_adamw":
        assert results.beside_adamw(1000) in readme
    else:
        zero, native = results.worst_distance(results.is_zero), results.worst_distance(results.is_native)
        assert f"is {zero} under DeepSpeed and {native} under PyTorch" in " ".join(readme.split())


def test_all_recorded_results_are_shown() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "results").glob("*.md"))
    assert set(re.findall(r"_generated/results/(\w+)\.md", shown)) == set(results.TABLES)
    outputs = {path.name for path in results.DATA.glob("*.txt")}
    assert outputs == set(re.findall(r"literalinclude\} data/(\S+)", shown))
    for name, table in results.TABLES.items():
        assert table().count("\n") > 1, name  # a row at least


def test_pivot_marks_what_was_not_measured() -> None:
    rows = [{"a": "x", "n": "2", "v": "1"}, {"a": "y", "n": "1", "v": "3"}]
    assert results.pivot(rows, ["a"], "n", "v").splitlines()[0::2] == ["| a | 1 | 2 |", "| x | - | 1 |"]
    assert results.pivot(rows, ["a"], "n", "v").splitlines()[3] == "| y | 3 | - |"


# public symbols -------------------------------------------------------------------------------------------------


def listed() -> dict[str, set[str]]:
    """What the API page lists, by module."""
    found = {}
    for section in re.split(r"^## ", API.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        module, body = section.split("\n", 1)
        found[module] = {*re.findall(r"^   (\w+)$", body, re.MULTILINE), *re.findall(r"`([A-Z_]+)`", body)}
    return found


def public() -> dict[str, list[str]]:
    """``__all__`` of every module that has one and is no mere door to another's names."""
    found = {"lorapre_dist": list(lorapre_dist.__all__)}
    for info in pkgutil.walk_packages(lorapre_dist.__path__, "lorapre_dist."):
        path = Path(importlib.util.find_spec(info.name).origin)  # type: ignore[union-attr, arg-type]
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[info.name] = list(importlib.import_module(info.name).__all__)
    return found


# Modules whose ``__all__`` is for the package itself.
INTERNAL = {"lorapre_dist.config.ds_training"}


def test_every_public_symbol_is_listed_and_documented() -> None:
    api = listed()
    everywhere = set().union(*api.values()) | {module.rpartition(".")[2] for module in api}
    undocumented = []
    for module, names in public().items():
        if module in INTERNAL:
            continue
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if name not in api.get(module, ()) and name not in everywhere:
                undocumented.append(f"{module}.{name}: not on {API.relative_to(REPO)}")
            if (callable(value) or inspect.ismodule(value)) and not inspect.getdoc(value):
                undocumented.append(f"{module}.{name}: no docstring")
    assert not undocumented


def test_what_the_api_lists_exists_and_is_documented() -> None:
    for module, names in listed().items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            assert inspect.getdoc(value), f"{module}.{name}"
            for attribute, member in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    assert inspect.getdoc(member), f"{module}.{name}.{attribute}"


# command lines --------------------------------------------------------------------------------------------------


def test_command_lines_are_described_whole() -> None:
    for name, parser in command_line.parsers():
        section = command_line.section(name, parser)
        for action in parser._actions:
            for option in action.option_strings or [str(action.metavar or action.dest)]:
                assert f"`{option}" in section or f", {option}" in section, f"{name}: {option}"
        assert str(Path.home()) not in section, "a folder of whoever builds the site"


def test_console_commands_have_a_section() -> None:
    from lorapre_dist.cli import COMMANDS

    assert {f"lorapre {name}" for name in COMMANDS} <= {name for name, _ in command_line.parsers()}


# messages -------------------------------------------------------------------------------------------------------


def test_documented_messages_are_in_the_source() -> None:
    found = messages.documented(DOCS / "guide" / "troubleshooting.md")
    assert len(found) > 50
    assert not [message for message in found if not messages.is_in_source(message)]


def test_a_message_that_is_not_in_the_source_is_found() -> None:
    assert not messages.is_in_source("rank=…: must be a prime number")
    assert messages.is_in_source("rank=0: every parameter group has it, …")


def test_the_walk_of_a_gradient_goes_through_the_step_in_order() -> None:
    """Of functions, each below the one that calls it; no property or setting is among them."""
    calls = list(walk.walk())
    assert all(calls[k][0] <= calls[k - 1][0] + 1 for k in range(1, len(calls)))
    places = [name for _, _, name, _ in calls]
    phases = ["LowRankOptimizer.step", "step", "gather", "Adam.update_block", "reduce", "refresh_columns", "regauge"]
    assert [name for name in places if name in phases] == phases
    assert all((Path(lorapre_dist.__file__).parent / file).is_file() for _, file, _, _ in calls)
