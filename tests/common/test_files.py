"""Files written whole: what a failure leaves, what it says, and many writers at once."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from gohgraph.common import files
from gohgraph.common.files import checked_path, move_whole, parse_json, read_json, write_text_whole, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Crash(BaseException):
    """Neither Exception nor OSError: nothing may swallow it."""


def half(error):
    """A writer that fails midway."""

    def write(path):
        path.write_text("half of it")
        raise error

    return write


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("name", ["log.csv", "a.b.json", "LICENSE", ".config.json.new", "kürzer.txt"])
def test_a_file_is_written_and_replaced_whole(tmp_path, name, flush):
    path = tmp_path / name
    for text in ("first, and longer", "ä\n"):
        write_text_whole(path, text, flush=flush)
        assert path.read_text(encoding="utf-8") == text and names(tmp_path) == [name]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt, Crash])
def test_a_write_that_fails_midway_keeps_the_old_file_and_leaves_nothing(tmp_path, old, error):
    path = tmp_path / "heads.svg"
    if old:
        path.write_text(old)
    kind = type(error) if isinstance(error, Exception) else error
    with pytest.raises(kind):
        write_whole(path, half(error))
    assert names(tmp_path) == (["heads.svg"] if old else []) and (not old or path.read_text() == old)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("encoder error -2"), "encoder error -2"),
    ],
)
def test_the_error_names_the_path_and_what_to_do(tmp_path, error, reason):
    path = tmp_path / "heads.gif"
    with pytest.raises(OSError) as caught:
        write_whole(path, half(error))
    assert str(caught.value) == (
        f"Expected a place where heads.gif can be written (got {path}: {reason}). Do choose another path."
    )
    assert caught.value.__cause__ is error


def test_a_move_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match=r"Expected a place where table\.md can .*: Permission denied\)\. Do "):
        write_text_whole(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["table.md"]


def test_places_that_take_no_file(tmp_path):
    (tmp_path / "taken.md").mkdir()
    (tmp_path / "file").write_text("mine")
    reasons = {"taken.md": "Is a directory", "missing/table.md": "No such file", "file/table.md": "Not a directory"}
    for name, reason in reasons.items():
        with pytest.raises(OSError, match=rf"Expected a place where .*got .*{name}: {reason}.*Do choose another path"):
            write_text_whole(tmp_path / name, "text")
    assert names(tmp_path) == ["file", "taken.md"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"Expected a place where table\.md can be written .*Permission denied"):
            write_text_whole(path, "new")
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "old" and names(tmp_path) == ["table.md"]


def test_safetensors_errors_are_told_the_same_way(tmp_path):
    with pytest.raises(OSError, match=r"Expected a place where w\.safetensors .*No such file.*Do choose another path"):
        path = tmp_path / "missing" / "w.safetensors"
        write_whole(path, lambda pending: save_file({"w": torch.ones(3)}, pending))


def test_an_unfinished_file_of_a_killed_writer_is_written_over(tmp_path):
    (tmp_path / ".log.new.csv").write_text("half of it")
    write_text_whole(tmp_path / "log.csv", "whole")
    assert names(tmp_path) == ["log.csv"] and (tmp_path / "log.csv").read_text() == "whole"


def test_flushing_comes_before_and_after_the_move(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(files, "_flush", lambda path: calls.append(("flush", path.name)))
    monkeypatch.setattr(
        os, "replace", lambda source, target: calls.append(("move", target.name)) or replace(source, target)
    )
    write_text_whole(tmp_path / "a.json", "{}", flush=True)
    assert calls == [("flush", ".a.new.json"), ("move", "a.json"), ("flush", tmp_path.name)]
    calls.clear()
    write_text_whole(tmp_path / "b.json", "{}")
    move_whole(tmp_path / "b.json", tmp_path / "a.json", flush=True)
    assert calls == [("move", "b.json"), ("flush", "b.json"), ("move", "a.json"), ("flush", tmp_path.name)]


def test_writers_of_different_files_in_one_folder(tmp_path):
    # Names that share their stem, their suffix or both but the last part.
    targets = ["run.json", "run.csv", "run", "run.new.json", "other.json", ".run.json", "run.2.json"]
    everyone = threading.Barrier(len(targets))

    def write(name):
        def in_two_parts(pending):
            pending.write_text(name)
            everyone.wait(60)
            with open(pending, "a") as file:
                file.write(name)
            everyone.wait(60)

        for _ in range(5):
            write_whole(tmp_path / name, in_two_parts)

    threads = [threading.Thread(target=write, args=(name,)) for name in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: 2 * name for name in targets}


def test_writers_of_one_file_that_write_beside_each_other(tmp_path):
    path, both = tmp_path / "corpus.txt", threading.Barrier(2)

    def write(letter):
        def in_two_parts(pending):
            pending.write_text(letter)
            both.wait(60)
            with open(pending, "a") as file:
                file.write(letter)

        write_whole(path, in_two_parts, pending=tmp_path / f".corpus.{letter}.new")

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("aa", "bb") and names(tmp_path) == ["corpus.txt"]


KILLED = """
import os, pathlib, signal
from gohgraph.common.files import write_whole
def write(pending):
    pending.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(pathlib.Path({path!r}), write)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED.format(path=str(path))], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert path.read_text() == "old"


def test_paths_are_checked_before_the_work(tmp_path):
    assert checked_path(None) is None
    assert checked_path(str(tmp_path / "heads.PNG")) == tmp_path / "heads.PNG"
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg or \.pdf \(got heads\.gif\)"):
        checked_path("heads.gif")
    with pytest.raises(ValueError, match=r"ends in \.html \(got heads\.gif\)"):
        checked_path("heads.gif", (".html",))
    with pytest.raises(FileNotFoundError, match=r"Expected a folder for heads\.png \(got .*missing, which is not"):
        checked_path(tmp_path / "missing" / "heads.png")


def test_json_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps({"step": 5, "unit": "ä"}), encoding="utf-8")
    assert read_json(path, "delete it") == {"step": 5, "unit": "ä"} == parse_json(path.read_text("utf-8"), path, "")
    for damage in (b'{"step": ', b"", b"\xff\xfe\x00"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"^Expected JSON in .*trainer\.json \(got .*\)\. Do delete it\.$"):
            read_json(path, "delete it")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json", "delete it")
