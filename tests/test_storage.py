"""Storage: publication is atomic, transient errors are tried again, final ones are not."""

import os

import pytest

from metatrain import storage
from metatrain.errors import StorageError


@pytest.mark.parametrize("root", ["disk", "memory://storage-test"])
def test_write_read_list_remove(root, tmp_path):
    base = str(tmp_path / "a b") if root == "disk" else root
    storage.write_atomic(storage.join(base, "x", "one.txt"), "grüße")
    storage.write_atomic(storage.join(base, "x", "two.txt"), b"2")
    assert storage.read_text(storage.join(base, "x", "one.txt")) == "grüße"
    assert storage.list_folder(storage.join(base, "x")) == ["one.txt", "two.txt"]
    assert storage.size(storage.join(base, "x", "two.txt")) == 1
    storage.remove(storage.join(base, "x"))
    assert not storage.exists(storage.join(base, "x", "one.txt"))
    assert storage.list_folder(storage.join(base, "x")) == []


def test_a_failed_publication_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    storage.write_atomic(path, "old")

    def full(*_):
        raise PermissionError("the disk says no")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PermissionError):
        storage.write_atomic(path, "new")
    assert storage.read_text(path) == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("root", ["disk", "memory://open-atomic-test"])
def test_a_file_written_in_pieces_is_published_when_the_block_ends_well(root, tmp_path):
    base = str(tmp_path / "a b") if root == "disk" else root
    path = storage.join(base, "file")
    with storage.open_atomic(path) as file:
        file.write(b"one ")
        file.write(b"two")
        assert not storage.exists(path)
    assert storage.read_bytes(path) == b"one two"
    with pytest.raises(TypeError), storage.open_atomic(path) as file:
        file.write("not bytes")
    assert storage.read_bytes(path) == b"one two"
    assert storage.list_folder(base) == ["file"]


def test_a_transient_error_is_tried_again_and_a_final_one_is_not(monkeypatch):
    calls = []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise OSError("throttled")
        return "there"

    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    assert storage.retried(flaky) == "there"
    assert len(calls) == 3

    def missing():
        calls.append(1)
        raise FileNotFoundError("no")

    calls.clear()
    with pytest.raises(FileNotFoundError):
        storage.retried(missing)
    assert len(calls) == 1


def test_a_missing_file_and_an_unknown_store_say_what_to_do(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        storage.read_bytes(str(tmp_path / "none"))
    with pytest.raises(StorageError, match="No file system"):
        storage.exists("nosuchstore://bucket/x")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be made"):
        storage.make_folder(str(tmp_path / "file" / "folder"))


def test_a_relative_path_becomes_absolute_and_a_url_stays():
    assert storage.absolute("runs") == os.path.join(os.getcwd(), "runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_a_moved_folder_is_whole_and_gone_from_where_it_was(tmp_path, store):
    url = str(tmp_path) if store == "disk" else "memory://moved"
    storage.write_atomic(storage.join(url, "a/new/x/1"), "one")
    storage.write_atomic(storage.join(url, "a/new/2"), "two")
    storage.move(storage.join(url, "a/new"), storage.join(url, "old"))
    assert storage.list_folder(storage.join(url, "old")) == ["2", "x"]
    assert storage.read_text(storage.join(url, "old/x/1")) == "one"
    assert not storage.exists(storage.join(url, "a/new/2"))
    storage.move(storage.join(url, "old/2"), storage.join(url, "3"))
    assert storage.read_text(storage.join(url, "3")) == "two"


def test_what_a_killed_publication_leaves_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: None)
    monkeypatch.setattr("os.unlink", lambda _: None)
    storage.write_atomic(str(tmp_path / "a.json"), "{}")
    (left,) = storage.list_folder(str(tmp_path))
    assert left != "a.json"
    assert storage.published_name(left) == "a.json"
    assert storage.published_name("a.json") == "a.json"
    assert storage.published_name("notes.tmp") == "notes.tmp"
