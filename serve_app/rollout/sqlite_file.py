"""A SQLite file that threads and processes of one machine share. A write that ended is on the disk."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from serve_app.rollout.store import StoreUnavailable

WAIT_S = 1.0  # for other processes
# For other threads, one of which may wait for the disk; less than a lease.
_WAIT_FOR_THREADS_S = 4.0


class SqliteFile:
    """`path` is on a local disk: SQLite's log needs shared memory, which network file systems lack. It is opened
    at first use, where a new file may be made, and again after a failure, where none may: an empty one in the
    place of one that is gone would tell everybody that nothing was ever stored."""

    def __init__(self, path: str, url: str, schema: str, version: int) -> None:
        self.path = Path(path)
        self.url = url
        self._schema = schema
        self._version = version
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def read(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """A transaction that sees one state of the file. Raises StoreUnavailable."""
        return self._transaction("BEGIN")

    def write(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """A transaction that nobody writes beside; undone where the block raises. Raises StoreUnavailable."""
        return self._transaction("BEGIN IMMEDIATE")

    def close(self) -> None:
        with self._lock:
            self._drop()

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if not self._lock.acquire(timeout=_WAIT_FOR_THREADS_S):
            raise StoreUnavailable(
                self.url,
                f"was busy with other threads for {_WAIT_FOR_THREADS_S:g} s",
                "is its disk slow? try again",
            )
        try:
            db = self._connected()
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # SQLite undoes by itself what a full disk stopped.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.DatabaseError, OSError) as error:
            raise self._unavailable(error) from error
        finally:
            self._lock.release()

    def _connected(self) -> sqlite3.Connection:
        if self._db:
            if _identity(self.path) == self._inode:
                return self._db
            # SQLite would go on writing to a file that nobody finds any more. What it has in its log goes there,
            # and to no other file that takes the place.
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._drop()
            if _identity(self.path):
                raise FileNotFoundError("the file was replaced while in use")
        if not self._inode:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not _identity(self.path):
            todo = "put it back, or restart the rollouts application to start empty"
            raise StoreUnavailable(self.url, "is away: the file is gone", todo)
        # With an authority, an empty one, a path may begin with two slashes.
        uri = f"file://{quote(os.fsencode(self.path.absolute()))}?mode={'rw' if self._inode else 'rwc'}"
        db = sqlite3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._db, self._inode = db, _identity(self.path)
        return db

    def _drop(self) -> None:
        if self._db:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _prepare(self, db: sqlite3.Connection) -> None:
        if self._inode and _version(db) == 0:
            raise OSError("what is there now is no rollout store; put the file back")
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                # Not only waits: refused at once while another process is at it too.
                mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if "SQLITE_BUSY" not in error.sqlite_errorname or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise OSError("its file system has no shared memory; use a local disk")
        db.execute("PRAGMA synchronous = FULL")
        if _version(db) == 0:
            db.execute("BEGIN IMMEDIATE")
            # Another process may have been faster.
            if _version(db) == 0:
                for statement in self._schema.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {self._version}")
            db.execute("COMMIT")
        if _version(db) != self._version:
            raise OSError(f"its format is {_version(db)}, and this version of serve-app reads {self._version}")

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        # Such as SQLITE_IOERR_WRITE: the second word is the kind.
        kind = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").split("_")[0]
        failed, todo = PROBLEMS.get(
            kind, ("failed", "see the error, and whether this user can write the file and its folder")
        )
        if kind not in ("BUSY", "FULL"):
            self._drop()
        return StoreUnavailable(self.url, f"{failed} ({error})", todo)


PROBLEMS = {
    "BUSY": (f"was locked by another process for {WAIT_S:g} s", "try again"),
    "LOCKED": ("was locked", "try again"),
    "FULL": ("has no room", "free space on its disk"),
    "CORRUPT": (
        "is damaged",
        "stop what uses it, and restore it from a backup; or move it away, and restart the rollouts application "
        "to start empty",
    ),
    "NOTADB": ("is not a SQLite file", "name another file, or move this one away"),
    "READONLY": ("cannot be written", "let this user write the file and its folder"),
    "CANTOPEN": ("cannot be opened", "let this user write the file and its folder"),
    "IOERR": ("could not be read or written", "check its disk"),
}


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None
