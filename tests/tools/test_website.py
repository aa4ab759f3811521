"""The site is read from disk: what its pages load lies beside them."""

from __future__ import annotations

import pytest
from website.offline import on_post_build


@pytest.mark.parametrize(
    "name, text, address",
    [
        ("index.html", '<p><script async src="https://cdn.test/a.js"></script>', "https://cdn.test/a.js"),
        ("index.html", '<link rel="stylesheet" href="//fonts.test/b.css">', "//fonts.test/b.css"),
        ("a/style.css", "p { background: url('https://cdn.test/c.png') }", "https://cdn.test/c.png"),
    ],
)
def test_a_page_that_loads_from_another_host_stops_the_build(tmp_path, name, text, address):
    (tmp_path / "a").mkdir()
    (tmp_path / "links.html").write_text('<a href="https://pyg.org">PyG</a><img src="pictures/heads.png">')
    on_post_build({"site_dir": tmp_path})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="load nothing from other hosts .*" + address):
        on_post_build({"site_dir": tmp_path})
