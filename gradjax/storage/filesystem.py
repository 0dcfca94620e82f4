"""Where a store's files lie: a local directory, or an object store that fsspec reaches by its URL.

Both places do the same few things. A file is put whole: whoever reads sees all of it or nothing.
And one run holds a place at a time, by one lock per process: process 0 of a run comes in only
where no lock of another run lives, the others come in after it.
"""

import errno
import fcntl
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import fsspec
from absl import logging

from gradjax import strict_json
from gradjax.config import as_directory
from gradjax.errors import GradjaxError, extras

# A lock object says by being renewed that its process lives. A process that could not renew it
# writes no more, well before others take it for dead.
_RENEW_SECONDS = 15.0
_LOST_SECONDS = 45.0
_DEAD_SECONDS = 60.0
WORK = ".tmp"  # of a directory of ours: locks, and files that are being written


def open_place(directory: str | Path) -> "LocalPlace | RemotePlace":
    """The place behind a path or a URL (`s3://bucket/run`); nothing is made or read yet.

    Raises:
      GradjaxError: if no file system has such a URL.
    """
    directory = as_directory(directory)
    return RemotePlace(directory) if isinstance(directory, str) else LocalPlace(directory)


@contextmanager
def whole_file(target: Path, flag: str = "output") -> Iterator[Path]:
    """A path to write to, whose file takes the place of `target` at the end: whole, or not at all.

    Raises:
      GradjaxError: if it cannot be written, naming `--flag`.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        _put_in_place(temporary, target)
    except OSError as error:
        raise GradjaxError(
            f"{target} cannot be written ({error.strerror}); give a writable place with room left "
            f"with --{flag}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json_lines(rows: Iterable[Mapping[str, Any]], target: Path) -> int:
    """Writes objects, one per line, the whole file or none; returns their number.

    Raises:
      GradjaxError: if it cannot be written, naming `--output`; whatever making the rows raises.
    """
    count = 0
    with whole_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(strict_json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def url_to_fs(url: str, **options: Any) -> tuple[Any, str]:
    """fsspec's: the file system of a URL and the path in it.

    Raises:
      GradjaxError: if the package that reaches such URLs is not installed.
    """
    with extras():
        return fsspec.url_to_fs(url, **options)


class LocalPlace:
    """A directory. Files are put by a temporary name, fsync and rename; locks are flocks."""

    filesystem = None  # pyarrow's own

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, name: str) -> str:
        """What `filesystem` calls a file."""
        return str(self.directory / name)

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, sorted; nothing if there is no such folder."""
        with self.faults("read"):
            try:
                return sorted(path.name for path in (self.directory / folder).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is no such file."""
        with self.faults("read"):
            try:
                return (self.directory / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, name: str, data: bytes) -> None:
        """Makes or replaces a file at once, after its bytes are on disk."""
        temporary = self.directory / WORK / name.replace("/", "-")
        target = self.directory / name
        with self.faults("write to"):
            try:
                temporary.write_bytes(data)
                _put_in_place(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def put_written(self, names: Iterable[str]) -> None:
        """Makes or replaces files, one after the other, by those of the same name in `WORK`."""
        with self.faults("write to"):
            for name in names:
                _put_in_place(self.directory / WORK / name, self.directory / name)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files."""
        with self.faults("write to"):
            for name in names:
                (self.directory / name).unlink()

    def make_folders(self, folders: Iterable[str]) -> None:
        """Makes folders that are not there."""
        with self.faults("write to"):
            for folder in folders:
                (self.directory / folder).mkdir(exist_ok=True)
            _sync_directory(self.directory)

    @contextmanager
    def lock(self, process: int) -> Iterator[None]:
        """Holds the place for one process of a run; process 0 clears what killed ones left.

        Raises:
          GradjaxError: if another run holds it, or it cannot be written.
        """
        work = self.directory / WORK
        with self.faults("write to"):
            if process == 0:
                work.mkdir(parents=True, exist_ok=True)
            elif not (work / "lock").exists():
                raise GradjaxError(
                    f"{self.directory} is not what process 0 prepared, seen from process {process} "
                    f"on {socket.gethostname()}; give an --output_dir that all processes share"
                )
        name = f"lock-{process:04d}" if process else "lock"
        with self._locked(work / name) as file:
            with self.faults("write to"):
                if process == 0:
                    for other in work.glob("lock-*"):
                        with self._locked(other):
                            pass
                    for leftover in work.iterdir():
                        if leftover.name != "lock":
                            leftover.unlink()
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield

    @contextmanager
    def _locked(self, path: Path) -> Iterator[TextIO]:
        with self.faults("write to"):
            file = path.open("a+")
        with file:
            with self.faults("write to"):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise _held(self.directory, file.read() or "unknown") from None
            yield file

    @contextmanager
    def faults(self, doing: str) -> Iterator[None]:
        """Makes what the disk has to say a GradjaxError. `doing`: `read` or `write to`."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise GradjaxError(
                    f"the disk is full ({error.strerror}) while writing to {self.directory}; "
                    "finished rows are kept: free some space and run the same command again"
                ) from error
            raise GradjaxError(
                f"cannot {doing} {self.directory} ({error.strerror or error}); check its "
                "permissions, or give another directory (--output_dir, --run)"
            ) from error


class RemotePlace:
    """A URL of fsspec's. An object is put by one upload; locks are objects that are kept renewed.

    The locks need nothing but that a listing shows what was written before it (S3 and Google
    Cloud Storage say so): each has a name of its own, so that none ever takes another's place.
    Ages are told by the store's clock alone.
    """

    def __init__(self, url: str):
        self.directory = url
        with self.faults("reach"):
            # Others write there as well: what was listed once is not what is there now.
            self.filesystem, self._root = url_to_fs(url, use_listings_cache=False)
        self._lock = ""
        self._renewed = 0.0  # seconds since the epoch, before the renewal was sent

    def path(self, name: str) -> str:
        """What `filesystem` calls an object."""
        return f"{self._root}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, sorted; nothing if there is no such folder."""
        with self.faults("read"):
            try:
                found = self.filesystem.ls(self.path(folder).rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None if there is no such object."""
        with self.faults("read"):
            try:
                return self.filesystem.cat_file(self.path(name))
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        """Makes or replaces an object at once; only while the lock is held."""
        self._require_lock()
        with self.faults("write to"):
            self.filesystem.pipe_file(self.path(name), data)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects."""
        if paths := [self.path(name) for name in names]:
            with self.faults("write to"):
                self.filesystem.rm(paths)

    def make_folders(self, folders: Iterable[str]) -> None:
        """Nothing: an object store has none."""

    @contextmanager
    def lock(self, process: int) -> Iterator[None]:
        """Holds the place for one process of a run, as long as it can be reached.

        Waits where another run's lock is neither renewed nor old enough to count as dead.

        Raises:
          GradjaxError: if another run holds it, or it cannot be written.
        """
        if process == 0:
            self._come_in_alone()
        else:
            self._place_lock()
        ended = threading.Event()
        renewing = threading.Thread(target=self._keep_renewed, args=(ended,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            with suppress(GradjaxError):  # it dies by itself
                self.remove([self._lock])

    def _come_in_alone(self) -> None:
        """Places a lock where no other lives, by the order: write one's own, then look."""
        seen: dict[str, datetime] = {}
        while True:
            self._place_lock()
            locks = self._locks()
            now = locks.pop(self._lock)
            dead = [k for k, at in locks.items() if (now - at).total_seconds() >= _DEAD_SECONDS]
            living = {name: at for name, at in locks.items() if name not in dead}
            if not living:
                self.remove(dead)
                return
            self.remove([self._lock])
            renewed = [name for name, at in living.items() if seen.get(name, at) != at]
            if renewed:
                raise _held(self.directory, ", ".join(map(_owner, renewed)))
            if not seen:
                logging.info(
                    "%s was written by process %s not long ago; waiting until its lock is renewed "
                    "(it lives) or %.0f s old (it was killed)",
                    self.directory,
                    ", ".join(map(_owner, living)),
                    _DEAD_SECONDS,
                )
            seen |= living
            # Two that wait for the same lock must not look at the same moments.
            time.sleep(random.uniform(0.1, 0.3) * _RENEW_SECONDS)

    def _place_lock(self) -> None:
        owner = f"{os.getpid()}-{socket.gethostname()}"
        self._lock = f"{WORK}/lock-{uuid.uuid4().hex}-{owner}"
        self._write_lock()

    def _write_lock(self) -> None:
        now = time.time()
        with self.faults("write to"):
            self.filesystem.pipe_file(self.path(self._lock), b"held\n")
        self._renewed = now

    def _locks(self) -> dict[str, datetime]:
        """When each lock was last renewed, by the store's clock."""
        locks = {}
        with self.faults("read"):
            for name in self.names(WORK):
                with suppress(FileNotFoundError):  # its process has ended since
                    lock = f"{WORK}/{name}"
                    locks[lock] = self.filesystem.modified(self.path(lock))
        return locks

    def _keep_renewed(self, ended: threading.Event) -> None:
        while not ended.wait(_RENEW_SECONDS):
            # Tried again the next time; `put` says so when it has failed for too long.
            with suppress(GradjaxError):
                self._require_lock()
                self._write_lock()

    def _require_lock(self) -> None:
        age = time.time() - self._renewed
        if age > _LOST_SECONDS:
            raise GradjaxError(
                f"{self.directory} could not be reached for {age:.0f} s, so that another run may "
                "have taken it over; finished rows are kept: run the same command again"
            )

    @contextmanager
    def faults(self, doing: str) -> Iterator[None]:
        """Makes what the network or the store has to say a GradjaxError."""
        try:
            yield
        except GradjaxError:
            raise
        except Exception as error:  # fsspec's file systems have no kind of error in common
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise GradjaxError(
                f"cannot {doing} {self.directory} ({said}); check the URL, the bucket, and the "
                "endpoint and keys in the environment"
            ) from error


def _held(directory: str | Path, owner: str) -> GradjaxError:
    return GradjaxError(
        f"{directory} is being written by process {owner}; wait for it, or give another "
        "--output_dir"
    )


def _owner(lock: str) -> str:
    _, _, pid, host = lock.split("-", 3)
    return f"{pid} on {host}"


def _put_in_place(temporary: Path, target: Path) -> None:
    """Makes or replaces `target` at once, after the bytes of `temporary` are on disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
