"""Every page of docs/start and docs/extend runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import snippets

PAGES = sorted(path for room in ("start", "extend") for path in (snippets.REPO / "docs" / room).glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_page_runs(page: Path, tmp_path: Path) -> None:
    snippets.run(page, tmp_path, timeout=500)


@pytest.mark.slow
def test_a_page_that_fails_is_a_failure(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for block in ("```python\nassert False\n```", "```bash\nfalse\ntrue\n```"):
        page.write_text(f"Text.\n\n{block}\n")
        with pytest.raises(AssertionError, match=r"page\.md"):
            snippets.run(page, tmp_path, timeout=60)


def test_every_page_has_code_that_is_run() -> None:
    without = [page.name for page in PAGES if not any(s.file is None for s in snippets.snippets(page))]
    assert without in ([], ["source.md"])
