from __future__ import annotations

import hashlib
import os

import pytest
import torch

from gohgraph.learning.data import corpus as module
from gohgraph.learning.data import python_text
from gohgraph.learning.data.corpus import Corpus, evaluation_batches, load_corpus, sample_batch

NAME = "tiny-shakespeare"
TEXT = bytes(range(256)) * 13


@pytest.fixture(autouse=True)
def gathered_anew(monkeypatch):
    """What all other tests share is gathered anew by each of these."""
    monkeypatch.setattr(python_text, "documentation", python_text.documentation.__wrapped__)


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return python_text.documentation()


@pytest.fixture(scope="module")
def python_docs() -> Corpus:
    return load_corpus()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve TEXT as the download, from a `file:` address that urllib opens like any other."""
    served = tmp_path / "served.txt"
    served.write_bytes(TEXT)
    monkeypatch.setitem(module._DOWNLOADS, NAME, (served.as_uri(), hashlib.sha256(TEXT).hexdigest()))
    return served


def as_bytes(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def test_python_docs_are_real_documentation(python_docs):
    assert python_docs.name == "python-docs"
    assert python_docs.train.dtype == python_docs.validation.dtype == torch.uint8
    assert 1_000_000 < len(python_docs.train) < 10_000_000
    text = as_bytes(python_docs.train) + as_bytes(python_docs.validation)
    # A topic of pydoc, and a docstring of a standard module.
    assert b'The "pass" statement' in text
    assert b"Extract, format and print information about Python stack traces." in text


def test_python_docs_are_deterministic(python_docs, documents):
    train, validation = module.split_documents(documents, 0.1)
    assert as_bytes(python_docs.train) == train
    assert as_bytes(python_docs.validation) == validation


def test_python_docs_hold_out_whole_documents(python_docs, documents):
    train, validation = as_bytes(python_docs.train), as_bytes(python_docs.validation)
    long = [text.encode("utf-8", "backslashreplace") for text in documents.values() if len(text) > 1000]
    sides = [(text in train, text in validation) for text in long]
    assert all(a != b for a, b in sides)
    assert {(True, False), (False, True)} == set(sides)


@pytest.mark.parametrize("wanted", [0.03, 0.1, 0.5])
def test_python_docs_hold_out_the_fraction_asked_for(documents, wanted):
    train, validation = module.split_documents(documents, wanted)
    share = len(validation) / (len(train) + len(validation))
    assert wanted - 1e-3 < share < wanted + 0.05


def test_python_docs_hold_each_docstring_once(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f'"""Shared."""\ndef f():\n    """Only in {name}."""\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text('"""Of another package."""\n')
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    documents = python_text.documentation()
    assert documents["a.py"] == "Shared.\n\nOnly in a."
    assert documents["b.py"] == "Only in b."
    assert not any("site-packages" in name for name in documents)


def test_python_sources_are_whole_files_but_for_tables(tmp_path, monkeypatch):
    kept = {"a.py": "import this\n", "b/c.py": '"""Docs."""\nx = 1\n'}
    left_out = {"b/copy.py": kept["a.py"], "encodings/cp7.py": "y = 2\n", "test/d.py": "z = 3\n", "empty.py": ""}
    left_out["big.py"] = "# a table\n" * 40_000
    for name, text in {**kept, **left_out}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    documents = python_text.library()
    assert {name: text for name, text in documents.items() if not name.startswith("topics/")} == kept
    assert "topics/pass" in documents
    monkeypatch.setattr(python_text, "PACKAGES", ("networkx",))
    package = {name for name in python_text.packages() if name not in documents}
    assert "networkx/classes/graph.py" in package and not any("/tests/" in name for name in package)
    corpus = load_corpus("python")
    assert corpus.name == "python" and len(corpus.train) > 5 * len(corpus.validation) > 0


def test_python_without_its_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="Expected a Python with its documentation .* Do install"):
        load_corpus()


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_file_is_split_at_its_end(tmp_path, as_path):
    file = tmp_path / "text.bin"
    file.write_bytes(TEXT)
    corpus = load_corpus(as_path(file), validation_fraction=0.25)
    assert corpus.name == str(file)
    assert as_bytes(corpus.train) + as_bytes(corpus.validation) == TEXT
    assert len(corpus.validation) == len(TEXT) // 4


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 500])
def test_a_short_file_is_refused(tmp_path, content):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected at least 100 bytes .*\(got .* Do "):
        load_corpus(file)


@pytest.mark.parametrize("source", ["absent.txt", "python-doc", "nan", "", ".", "a\0b", "x" * 5000])
def test_an_unreadable_path_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)Expected 'python-docs' .*\(got .*\)\. Do "):
        load_corpus(source)


@pytest.mark.parametrize("source", [None, float("nan"), 7, b"text.txt"])
def test_a_source_of_another_type_is_refused(source):
    with pytest.raises(TypeError, match=r"Expected the name .*\(got .* Do pass"):
        load_corpus(source)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="Expected validation_fraction to be a finite number > 0 and < 1"):
        load_corpus(validation_fraction=fraction)


def test_a_download_is_cached(tmp_path, server):
    cache = tmp_path / "new" / "cache"
    first = load_corpus(NAME, cache=cache)
    assert [file.name for file in cache.iterdir()] == [f"{NAME}.txt"]
    # Offline from here on.
    server.unlink()
    second = load_corpus(NAME, cache=cache)
    assert as_bytes(first.train) + as_bytes(first.validation) == TEXT
    assert torch.equal(first.train, second.train) and torch.equal(first.validation, second.validation)


def test_the_cache_is_named_by_the_environment(tmp_path, server, monkeypatch):
    monkeypatch.setenv("GOHGRAPH_CACHE", str(tmp_path / "named"))
    load_corpus(NAME)
    assert (tmp_path / "named" / f"{NAME}.txt").read_bytes() == TEXT


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, server):
    server.write_bytes(TEXT + b"!")
    with pytest.raises(ValueError, match=r"Expected SHA-256 .*\(got [0-9a-f]{64}\)\. Do try again"):
        load_corpus(NAME, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, server, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"Expected a folder .* No space left .* Do set GOHGRAPH_CACHE"):
        load_corpus(NAME, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_refused(tmp_path, server):
    cache = tmp_path / "cache"
    load_corpus(NAME, cache=cache)
    (cache / f"{NAME}.txt").write_bytes(TEXT[:-1])
    with pytest.raises(ValueError, match="Expected SHA-256 .* Do delete that file"):
        load_corpus(NAME, cache=cache)


def test_without_a_network_the_error_names_the_way_out(tmp_path, server):
    server.unlink()
    with pytest.raises(ValueError, match=r"Expected to download .*\(got .* --data FILE"):
        load_corpus(NAME, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, server):
    with pytest.raises(ValueError, match="Expected a folder .* Do set GOHGRAPH_CACHE"):
        load_corpus(NAME, cache=server)


def test_sampled_targets_follow_their_inputs():
    data = torch.randint(256, (997,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs, targets = sample_batch(data, 5, batch_size=3, length=7, seed=2)
    assert inputs.shape == targets.shape == (3, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    text = as_bytes(data)
    for row, following in zip(inputs, targets, strict=True):
        assert as_bytes(row) + as_bytes(following[-1:]) in text
        assert torch.equal(row[1:], following[:-1])


def test_samples_depend_on_seed_and_step_alone():
    data = torch.arange(251, dtype=torch.uint8)

    def draw(step: int, seed: int) -> torch.Tensor:
        return sample_batch(data, step, batch_size=11, length=3, seed=seed)[0]

    before = torch.get_rng_state()
    first = draw(5, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)
    assert torch.equal(draw(5, 2), first)
    # Neither the sum nor the order of the two numbers may decide.
    for step, seed in [(6, 2), (5, 3), (4, 3), (6, 1), (2, 5)]:
        assert not torch.equal(draw(step, seed), first)


def test_samples_reach_both_ends_of_the_text():
    data = torch.arange(13, dtype=torch.uint8)
    inputs, targets = sample_batch(data, 0, batch_size=500, length=5, seed=0)
    assert inputs.min() == 0 and targets.max() == 12


def test_a_text_of_one_window_is_enough():
    data = torch.arange(6, dtype=torch.uint8)
    assert sample_batch(data, 0, batch_size=2, length=5, seed=0)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert len(list(evaluation_batches(data, batch_size=2, length=5))) == 1


@pytest.mark.parametrize("limit, windows", [(None, 33), (1000, 33), (33, 33), (13, 13), (1, 1)])
def test_evaluation_windows_are_fixed_spread_and_apart(limit, windows):
    data = torch.arange(233, dtype=torch.uint8)
    batches = list(evaluation_batches(data, batch_size=5, length=7, limit=limit))
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert inputs.shape == (windows, 7) and inputs.dtype == torch.int64
    assert [len(batch) for batch, _ in batches[:-1]] == [5] * (len(batches) - 1)
    assert torch.equal(targets, inputs + 1)
    assert targets.unique().numel() == targets.numel()
    gaps = inputs[:, 0].diff()
    if len(gaps):
        assert gaps.min() >= 7 and gaps.max() - gaps.min() <= 7
        # Spread over the whole text: what is left after the last window is no more than one gap.
        assert 233 - inputs[-1, 0] <= gaps.max() + 7


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"length": 0}, {"length": 101}, {"length": -3}])
def test_impossible_windows_are_refused(options):
    data = torch.arange(101, dtype=torch.uint8)
    options = {"batch_size": 2, "length": 5} | options
    with pytest.raises(ValueError, match=r"Expected .*\(got .* Do "):
        sample_batch(data, 0, seed=0, **options)
    # At the call, not at the first batch.
    with pytest.raises(ValueError, match=r"Expected .*\(got .* Do "):
        evaluation_batches(data, limit=None, **options)


def test_an_impossible_limit_is_refused():
    with pytest.raises(ValueError, match="Expected limit to be an int >= 1"):
        evaluation_batches(torch.arange(101, dtype=torch.uint8), batch_size=2, length=5, limit=0)
