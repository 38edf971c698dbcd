"""Files of a results folder appear all at once or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvsim.errors import InputError


@contextmanager
def all_or_nothing(out_dir: str | os.PathLike[str], names: Iterable[str]) -> Iterator[Path]:
    """A temporary folder inside out_dir, so on its file system.

    On leaving, each file in it that is one of `names` is renamed into out_dir, and the others of `names` are removed from
    there. Nothing changes if the block raises. Raises InputError if out_dir cannot be written.
    """
    target = Path(out_dir)
    new = _missing(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=".kvsim-", dir=target))
    except OSError as error:
        _remove_empty(new)
        raise _unwritable(out_dir, error) from error
    try:
        yield workspace
        for name in names:
            if (workspace / name).exists():
                os.replace(workspace / name, target / name)
            else:
                (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(out_dir, error) from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        _remove_empty(new)


def check_writable(out_dir: str | os.PathLike[str]) -> None:
    """Raise now what `all_or_nothing` would raise after long work; leaves nothing behind."""
    target = Path(out_dir)
    new = _missing(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".kvsim-", dir=target)).rmdir()
    except OSError as error:
        raise _unwritable(out_dir, error) from error
    finally:
        _remove_empty(new)


def _missing(target: Path) -> list[Path]:
    """The folders that writing there will make, innermost first."""
    return [path for path in (target, *target.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _unwritable(out_dir: str | os.PathLike[str], error: OSError) -> InputError:
    exists = isinstance(error, FileExistsError | NotADirectoryError)
    rule = "must be a directory; a file is in the way" if exists else f"cannot be written ({error.strerror or error})"
    return InputError("--out", os.fspath(out_dir), rule, "choose another directory, or free some space")
