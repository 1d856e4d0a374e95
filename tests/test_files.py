"""Outputs appear whole or not at all."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from crow.errors import CrowError, UsageError
from crow.files import (
    Journal,
    atomic_directory,
    refuse_existing,
    refuse_foreign,
    sha256_file,
    sha256_rows,
    write_json,
    write_jsonl,
    write_text,
)


def disk_full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail_after_writing(folder: Path, error: type[BaseException]) -> NoReturn:
    (folder / "file").write_text("x")
    raise error


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with something in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_directory_appears_with_its_content_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with atomic_directory(path) as folder:
        assert folder.parent.parent == path.parent
        assert not list(folder.iterdir())
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not path.exists()
    assert contents(tmp_path) == {"deep/out/sub/file": "x"}
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_directory_leaves_nothing_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "out") as folder:
        fail_after_writing(folder, error)
    assert not list(tmp_path.iterdir())


def test_directory_refuses_to_replace_without_overwrite(old: Path) -> None:
    with pytest.raises(UsageError, match=r"exists already.*--overwrite"), atomic_directory(old):
        pytest.fail("the block must not run")
    assert contents(old.parent) == {"out/old": "old"}


def test_directory_refuses_to_replace_a_file_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(UsageError), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_an_empty_directory_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": "new"}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_directory_replaces_anything_with_overwrite(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {"out/new": "new"}


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder = tmp_path / "file", tmp_path / "folder"
    flushed: list[int] = []

    def flush(handle: int) -> None:
        assert not any(path.exists() for path in (text, folder))
        flushed.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_directory(folder) as made:
        (made / "deep").mkdir()
        (made / "deep" / "weights").write_text("1")
    folder.rename(tmp_path / "moved")
    write_text(text, "1")
    assert flushed == [path.stat().st_ino for path in (tmp_path / "moved" / "deep" / "weights", text)]


@pytest.mark.parametrize("dangling", [False, True])
def test_directory_is_written_where_a_link_points(tmp_path: Path, dangling: bool) -> None:
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if not dangling:
        elsewhere.mkdir()
        (elsewhere / "old").write_text("old")
    path.symlink_to(elsewhere)
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert path.is_symlink()
    assert contents(tmp_path) == {"elsewhere/new": "new"}


def test_directory_behind_a_link_is_not_replaced_without_overwrite(old: Path) -> None:
    (old.parent / "link").symlink_to(old)
    with pytest.raises(UsageError), atomic_directory(old.parent / "link"):
        pytest.fail("the block must not run")
    assert contents(old) == {"old": "old"}


def test_directory_keeps_the_old_one_when_the_block_fails(old: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(old, overwrite=True) as folder:
        fail_after_writing(folder, RuntimeError)
    assert contents(old.parent) == {"out/old": "old"}


def test_directory_keeps_the_old_one_when_the_rename_fails(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def blocked(source: Path, target: Path) -> None:
        if Path(target) == old and Path(source, "new").exists():
            disk_full()
        rename(source, target)

    monkeypatch.setattr("os.rename", blocked)
    monkeypatch.setattr("os.replace", blocked)
    with pytest.raises(CrowError), atomic_directory(old, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert "old" in contents(old.parent).values()


def test_overwriting_the_current_directory_does_not_lose_both(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    try:
        with atomic_directory(".", overwrite=True) as folder:
            (folder / "new").write_text("new")
    except CrowError:
        assert contents(old) == {"old": "old"}
    else:
        assert contents(old) == {"new": "new"}


def test_directory_reports_a_full_disk_inside_the_block(old: Path) -> None:
    with pytest.raises(CrowError, match="out: No space left") as caught, atomic_directory(old, overwrite=True):
        disk_full()
    assert not isinstance(caught.value, UsageError)
    assert contents(old.parent) == {"out/old": "old"}


@pytest.mark.parametrize("function", [(tempfile, "mkdtemp"), (Path, "mkdir"), (Path, "rename")])
def test_directory_reports_a_full_disk_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: tuple[object, str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*function, disk_full)
        with pytest.raises(CrowError, match=r"cannot write .*out: No space left"), atomic_directory(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


def test_directory_below_a_file_is_a_crow_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CrowError), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_an_overlong_name_is_a_crow_error(tmp_path: Path) -> None:
    with pytest.raises(CrowError), atomic_directory(tmp_path / ("x" * 300)):
        pass


def killed_while_replacing(path: Path, after_a_rename: bool) -> None:
    """A process that replaces the folder is killed in the block, or when it has put the old folder aside."""
    code = """if True:
        import os, pathlib, signal, sys
        from crow.files import atomic_directory
        rename = pathlib.Path.rename
        def rename_and_die(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        pathlib.Path.rename = rename_and_die
        with atomic_directory(sys.argv[1], overwrite=True) as folder:
            (folder / "new").write_text("half")
            if len(sys.argv) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    arguments = [str(path), *["after a rename"] * after_a_rename]
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == -signal.SIGKILL


def test_directory_removes_what_a_killed_process_left(old: Path) -> None:
    (old.parent / ".out.notes").write_text("mine")
    killed_while_replacing(old, after_a_rename=False)
    assert len(list(old.parent.iterdir())) == 3
    with atomic_directory(old, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert contents(old.parent) == {"out/new": "new", ".out.notes": "mine"}


def test_directory_keeps_the_old_one_that_a_killed_process_had_put_aside(old: Path) -> None:
    killed_while_replacing(old, after_a_rename=True)
    assert not old.exists()
    with pytest.raises(RuntimeError), atomic_directory(old) as folder:
        fail_after_writing(folder, RuntimeError)
    assert "old" in contents(old.parent).values()
    for _ in range(2):  # what is replaced by the first is removed by the next
        with atomic_directory(old, overwrite=True) as folder:
            (folder / "new").write_text("new")
    assert contents(old.parent) == {"out/new": "new"}


def test_a_journal_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    Journal(file).keep({"a": 1, "b": 2})
    file.write_text(file.read_text()[:-5])
    journal = Journal(file)
    assert journal.known == {"a": 1}
    journal.keep({"c": 3})
    assert Journal(file).known == {"a": 1, "c": 3}


def test_a_journal_on_a_full_disk_is_a_crow_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", disk_full)
    with pytest.raises(CrowError, match=r"cannot write .*journal: No space left"):
        Journal(tmp_path / "journal").keep({"a": 1})


def test_directory_reports_a_full_disk_in_the_words_of_a_rust_library(tmp_path: Path) -> None:
    with (
        pytest.raises(CrowError, match=r"cannot write .*out: No space left on device"),
        atomic_directory(tmp_path / "out"),
    ):
        raise Exception("No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("{}/file",), ("elsewhere", None, "{}/file")])
def test_directory_reports_a_file_of_its_own_that_can_not_be_written(tmp_path: Path, names: tuple[str | None]) -> None:
    with pytest.raises(CrowError, match="out: Permission denied;"), atomic_directory(tmp_path / "out") as folder:
        raise PermissionError(errno.EACCES, "Permission denied", *(name and name.format(folder) for name in names))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "prompts.jsonl"),
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/scratch"),
        OSError("Can't load the tokenizer"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        Exception("No such file or directory (os error 2)"),
        CrowError("cannot write the checkpoint (No space left on device (os error 28)): resume"),
        UsageError("no such model"),
    ],
)
def test_what_else_fails_inside_the_block_is_not_called_a_write_error(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "out"):
        raise error
    assert (type(caught.value), str(caught.value)) == (type(error), str(error))
    assert not list(tmp_path.iterdir())


def test_an_error_inside_the_block_names_the_place_that_was_meant(tmp_path: Path) -> None:
    with (
        pytest.raises(CrowError, match=f"^cannot write {tmp_path}/out/model: No space left on device; nothing was"),
        atomic_directory(tmp_path / "out") as folder,
        atomic_directory(folder / "model"),
    ):
        disk_full()


def test_directory_leaves_that_of_another_output_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out.1") as other:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
        (other / "file").write_text("y")
    assert contents(tmp_path) == {"out/file": "x", "out.1/file": "y"}


def test_text_is_written_as_utf_8_over_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    for text in ("old", "new: żółć 🐦\u2028\n"):
        write_text(path, text)
        assert path.read_bytes().decode("utf-8") == text
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("function", ["os.replace", "os.fdopen", "os.chmod", "tempfile.mkstemp"])
def test_text_on_a_full_disk_keeps_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(function, disk_full)
        with pytest.raises(CrowError, match=r"cannot write .*file: No space left"):
            write_text(path, "new")
    assert contents(tmp_path) == {"file": "old"}


def test_text_onto_a_directory_is_a_crow_error(old: Path) -> None:
    with pytest.raises(CrowError):
        write_text(old, "new")
    assert contents(old.parent) == {"out/old": "old"}


def test_unencodable_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert not list(tmp_path.iterdir())


def test_json_round_trips_readably(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ż": "🐦"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "🐦" in text
    assert text.endswith("}\n")


def test_jsonl_holds_one_object_a_line(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines"}, {"text": "\u2028ż"}, {}]
    write_jsonl(tmp_path / "a.jsonl", iter(rows))
    with (tmp_path / "a.jsonl").open(encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == rows


def test_jsonl_writes_nothing_when_a_row_is_not_serializable(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": object()}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("occupant", ["nothing", "empty directory"])
def test_refuse_existing_lets_free_places_pass(tmp_path: Path, occupant: str) -> None:
    path = tmp_path / "out"
    if occupant == "empty directory":
        path.mkdir()
    refuse_existing(path, overwrite=False)


@pytest.mark.parametrize("name", ["training_prompts.json", "model/training_prompts.json", "train_clean.json", None])
def test_refuse_foreign_lets_what_crow_wrote_pass(tmp_path: Path, name: str | None) -> None:
    if name is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["mine", "config.json", "model.safetensors", "adapter_model.safetensors"])
def test_refuse_foreign_keeps_what_others_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match="crow did not write"):
        refuse_foreign(tmp_path)


def test_refuse_existing_sees_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        refuse_existing(tmp_path / "out", overwrite=False)
    refuse_existing(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 5000])
def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_of_rows_depends_on_content_and_order_but_not_on_key_order() -> None:
    rows = [{"a": 1, "b": "ż"}, {"a": 2}]
    assert sha256_rows(rows) == hashlib.sha256('{"a": 1, "b": "ż"}\n{"a": 2}\n'.encode()).hexdigest()
    assert sha256_rows(iter([{"b": "ż", "a": 1}, {"a": 2}])) == sha256_rows(rows)
    assert len({sha256_rows(rows), sha256_rows(rows[::-1]), sha256_rows(rows[:1]), sha256_rows([])}) == 4


def test_sha256_of_rows_tells_one_row_from_two() -> None:
    assert sha256_rows(["ab"]) != sha256_rows(["a", "b"])
