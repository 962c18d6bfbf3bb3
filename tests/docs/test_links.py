"""Links of README and docs: each points at a file, and at a heading of it, that is there."""

import pytest
from pages import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_points_at_what_is_there(page):
    for target in links(page):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; headings: {sorted(anchors(file))}"


def test_links_headings_and_code_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, twice\n\n[here](other.md#place) ![picture](a.svg) `[no](link.md)`\n\n"
        '<img src="b.svg">\n\n    [code](no.md)\n\n```bash\n# no heading\n[code](no.md)\n```\n'
    )
    assert links(page) == ["other.md#place", "a.svg", "b.svg"] and anchors(page) == {"a-title-twice"}
