"""Outputs that are never half-written: each is made beside its place and renamed into it."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from threading import Lock
from typing import Any

from crow.errors import CrowError, UsageError

_UNFINISHED = ".unfinished"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


SEEN = "training_prompts.json"
"""Lies in every model's folder that crow writes: fingerprints of the prompts that the model was trained on."""

_WRITTEN = (SEEN, f"model/{SEEN}", "train_clean.json")
"""One of these lies in every folder that crow writes as a whole: a model's, the demo's, one of poisoned data."""


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise `UsageError` if `path` holds something that `overwrite` does not allow to be replaced."""
    occupied = any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
    if occupied and not overwrite:
        raise UsageError(f"{path} exists already: choose another place or pass --overwrite")


def refuse_foreign(path: Path) -> None:
    """Raise `UsageError` if `path` is a folder of something else, which would be lost with all that it holds."""
    if path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in _WRITTEN):
        raise UsageError(f"{path} is a folder that crow did not write, and would be deleted: choose another place")


def refuse_read(path: Path, *sources: str | Path | None) -> None:
    """Raise `UsageError` if what is read lies in the folder `path`, which would be replaced with all that it holds."""
    for source in sources:
        # Of a name that no file can have this says no, where Path's own raises
        if source is not None and os.path.exists(source) and Path(source).resolve().is_relative_to(path.resolve()):
            raise UsageError(f"{source} is read, and would be lost with what {path} holds: choose another place")


def check_writable(path: Path) -> None:
    """Raise `CrowError` if nothing can be written where `path` is to be: before the work, and not after it."""
    place = path.resolve().parent
    while not place.exists():
        place = place.parent
    with _reporting_os_errors(path), tempfile.TemporaryFile(dir=place):
        pass


@contextmanager
def _reporting_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error.strerror or error) from error


def _cannot_write(path: Path, reason: object) -> CrowError:
    return CrowError(f"cannot write {path}: {reason}; nothing was left half-written")


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which becomes `path` if the block ends without an error.

    What a killed process left of such folders is removed first.

    Raises:
        UsageError: `path` exists and `overwrite` is false.
        CrowError: the folder cannot be written (a full disk, a read-only place).
    """
    path = Path(path).resolve()
    with _reporting_os_errors(path):
        refuse_existing(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of `.out.1.*` the folder is another's; the eight characters are mkdtemp's
        for left in path.parent.glob(f".{escape(path.name)}.{'?' * 8}{_UNFINISHED}"):
            if path.exists() or not (left / "old").exists():  # killed between two renames, it holds what was here
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent))
    made, old = temporary / "new", temporary / "old"
    try:
        with _reporting_os_errors(path):
            made.mkdir()
        try:
            yield made
        except CrowError as error:  # it says more, but of a folder that no one will find
            error.args = (str(error).replace(str(made), str(path)),)
            raise
        except Exception as error:
            if (reason := _unwritable(error, made)) is None:
                raise
            raise _cannot_write(path, reason) from error
        with _reporting_os_errors(path):
            for file in made.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                path.rename(old)
            try:
                made.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(file: str | Path) -> None:
    """Have a file's content on the disk before its name is: after a power cut it would be empty."""
    with open(file, "rb") as opened:  # of a file that is read-only too
        os.fsync(opened.fileno())


def _unwritable(error: Exception, folder: Path) -> str | None:
    """Why a file in the folder could not be written, if the error is of that; what else fails meanwhile is not."""
    if isinstance(error, OSError) and error.filename is not None:
        return error.strerror if str(folder) in f"{error.filename} {error.filename2}" else None
    # To write to an open file names none; nor do Rust's libraries, which have the number in their message alone
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    return os.strerror(number) if number in _UNWRITABLE else None


def beside(path: Path, ending: str) -> Path:
    """Where what belongs to a JSON file goes: beside `after.json`, `after.ending`."""
    return path.with_name(f"{path.name.removesuffix('.json')}.{ending}")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 beside `path` and rename it into place.

    Raises:
        CrowError: the file cannot be written.
    """
    path = Path(path)
    with _reporting_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            _flush(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Journal:
    """Results by key, each appended to a file as it is made, so that a second start goes on; or only in memory.

    A last line that an interruption cut off is left out.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, Any] = {}
        self._lock = Lock()
        text = file.read_text("utf-8") if file is not None and file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if file is not None and whole != text:  # what is appended to half a line would be lost with it
            write_text(file, whole)
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                kept = json.loads(line)
                self.known[kept["key"]] = kept["value"]

    def keep(self, results: dict[str, Any]) -> None:
        with self._lock:
            self.known |= results
            if self.file is not None:
                lines = "".join(json.dumps({"key": k, "value": v}) + "\n" for k, v in results.items())
                with _reporting_os_errors(self.file):
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    with self.file.open("a", encoding="utf-8") as file:
                        file.write(lines)


def name_elsewhere(source: str) -> str:
    """What to call a source where others read of it: of an absolute path, which leads nowhere there, the last part."""
    path = Path(source)
    return path.name if path.is_absolute() else source


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_rows(rows: Iterable[Any]) -> str:
    """SHA-256 of JSON-serializable rows in their order, in hexadecimal: names a data set by its content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
