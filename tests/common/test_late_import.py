"""Acting on a package when somebody imports it."""

import sys

import pytest

from gohgraph.common.late_import import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `late` whose module `late.registry` can be imported."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "registry.py").write_text("KNOWN = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield folder
    sys.meta_path[:] = before
    for name in ("late", "late.registry"):
        sys.modules.pop(name, None)


def note():
    sys.modules["late.registry"].KNOWN.append(1)


def test_nothing_is_imported_before_its_time(package):
    finders = list(sys.meta_path)
    when_imported("late.registry", note)
    assert "late" not in sys.modules and len(sys.meta_path) == len(finders) + 1
    import late

    assert "late.registry" not in sys.modules
    import late.registry

    assert late.registry.KNOWN == [1] and sys.meta_path == finders
    assert type(late.registry.__loader__).__module__ == "_frozen_importlib_external"
    assert late.registry.__spec__.loader is late.registry.__loader__
    # What is there already is not waited for.
    when_imported("late.registry", note)
    assert late.registry.KNOWN == [1, 1] and sys.meta_path == finders


def test_a_module_that_fails_is_waited_for_again(package):
    (package / "registry.py").write_text("KNOWN = []\n1 / 0\n")
    when_imported("late.registry", note)
    with pytest.raises(ZeroDivisionError):
        import late.registry
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        (package / "registry.py").write_text("KNOWN = [0]\n")
        import late.registry

        assert late.registry.KNOWN == [0, 1]
    finally:
        sys.dont_write_bytecode = before


def test_a_package_that_is_not_installed_is_still_missing(package):
    when_imported("late.missing", note)
    with pytest.raises(ModuleNotFoundError):
        import late.missing  # noqa: F401
