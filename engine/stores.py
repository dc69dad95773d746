"""Remote folders by URL, through fsspec: files written whole, counted after every write, retried where the line fails.

What a reader sees while a file is written:

========================  =====================================================================================
s3 gs gcs az abfs abfss   a PUT: the old file or the new one, never a part of it
memory                    the same; of this process alone, for tests
file sftp hdfs            written beside it under a name that ends in .tmp, then moved over it: the old or the new
smb, schemes of your own  the same where a move replaces; else the old one is removed first: old, none, or new
========================  =====================================================================================
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from synthkd.engine.errors import SynthkdError
from synthkd.engine.untrusted import MAX_NOTE
from synthkd.export.artifacts import sync_folder

SCHEMES_VARIABLE = "SYNTHKD_URL_SCHEMES"
_ANSWER = TypeVar("_ANSWER")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)")
_TEMPORARY = ".tmp"
_LONGEST_WAIT = 30.0  # seconds


class Scheme(NamedTuple):
    """What serves a scheme: its package on PyPI ("" for none but fsspec), and whether a write shows all or nothing."""

    package: str
    whole_puts: bool


SCHEMES = {
    "file": Scheme("", False),
    "memory": Scheme("", True),
    "s3": Scheme("s3fs", True),
    "gs": Scheme("gcsfs", True),
    "gcs": Scheme("gcsfs", True),
    "az": Scheme("adlfs", True),
    "abfs": Scheme("adlfs", True),
    "abfss": Scheme("adlfs", True),
    "hdfs": Scheme("pyarrow", False),
    "sftp": Scheme("paramiko", False),
    "smb": Scheme("smbprotocol", False),
}


def schemes() -> tuple[str, ...]:
    """Schemes that may be opened: those above, or what SYNTHKD_URL_SCHEMES lists; `+NAME` there adds one to them."""
    said = [word.strip().lower() for word in os.environ.get(SCHEMES_VARIABLE, "").split(",") if word.strip()]
    chosen = [word for word in said if not word.startswith("+")] or list(SCHEMES)
    return tuple(dict.fromkeys([*chosen, *(word[1:] for word in said if word.startswith("+"))]))


def is_url(text: str) -> bool:
    """Whether a text is a URL and no local path.

    Raises SynthkdError for a path that looks like a URL of ours with slashes missing, unless there is such a path.
    """
    if "://" in text or "::" in text:
        return _URL.match(text) is not None or "::" in text
    found = _URL.match(text)
    if found is None or found[1].lower() not in SCHEMES or Path(text).exists():
        return False
    raise SynthkdError(f"{text!r} looks like a URL; expected {found[1]}://..., or ./{text} for a local path")


def checked_url(text: str) -> str:
    """A URL without its last slash.

    Raises SynthkdError for a scheme that is not allowed, chained URLs, credentials, queries and paths that climb. What
    could be a secret is not shown.
    """
    scheme, _, rest = text.partition("://")
    shown = f"{scheme[:20]}://{rest.rpartition('@')[2]}"[:200] if text.isprintable() else ascii(text)[:60]
    if "::" in text:
        raise SynthkdError(f"URL {scheme.partition('::')[0][:20]!r}::...: chained URLs are not opened; name one place")
    if scheme.lower() not in schemes():
        hint = f"allowed: {', '.join(schemes())} ({SCHEMES_VARIABLE}=+{scheme[:20].lower()} adds one)"
        raise SynthkdError(f"URL {shown!r}: scheme {scheme[:20]!r} is not allowed; {hint}")
    parts = urlsplit(text)
    if parts.password is not None or parts.query or "?" in text or "#" in text:
        raise SynthkdError(
            f"URL {scheme}://...: holds credentials, a query or a fragment; give credentials by the environment or the "
            "configuration file of the store's own client"
        )
    if not text.isprintable() or "\\" in text or ".." in rest.split("/") or not rest.strip("/"):
        raise SynthkdError(f"URL {shown!r}: expected SCHEME://PLACE/FOLDER of printable characters, without '..'")
    if scheme.lower() == "file" and not rest.startswith("/"):
        raise SynthkdError(f"URL {shown!r}: expected file:///ABSOLUTE/PATH")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


@lru_cache(maxsize=16)
def filesystem(url: str, process: int) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL, one a process; raises SynthkdError where a package is missing."""
    scheme = url.partition("://")[0]
    package = SCHEMES.get(scheme, Scheme("", False)).package or "fsspec"
    try:
        import fsspec
    except ImportError as error:
        raise SynthkdError("fsspec is not installed: pip install fsspec") from error
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise SynthkdError(f"URL {url!r}: {package} is not installed: pip install {package}") from error
    except Exception as error:  # each client has errors of its own
        raise SynthkdError(f"URL {url!r}: cannot be opened ({_brief(error)})") from error
    return found


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@dataclass(frozen=True)
class Store:
    """A remote folder; picklable, connects where it is used. Names are relative, with '/'.

    tries, wait: how often something is tried, and the seconds before the second try, which double up to half a minute.
    Every method raises SynthkdError, one line, once that is used up or access is denied.
    """

    url: str
    tries: int = 7
    wait: float = 0.5

    @property
    def _system(self) -> tuple[Any, str]:
        return filesystem(self.url, os.getpid())

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    def _path(self, name: str) -> str:
        return f"{self._system[1].rstrip('/')}/{name}"

    def _tried(self, what: str, action: Callable[[], _ANSWER]) -> _ANSWER:
        """An answer, asked for again while that may help; FileNotFoundError is an answer too."""
        for count in range(1, self.tries + 1):
            try:
                return action()
            except (FileNotFoundError, SynthkdError):
                raise
            except Exception as error:  # each client has errors of its own
                denied = isinstance(error, (PermissionError, NotImplementedError, TypeError))
                if denied or count == self.tries:
                    raise SynthkdError(
                        f"{self.url}: {what} failed after {count} tries ({_brief(error)}); every published shard is "
                        "safe: mend that and run the same command again"
                    ) from error
            time.sleep(min(_LONGEST_WAIT, self.wait * 2 ** (count - 1)))
        raise AssertionError("tries is at least 1")

    def read(self, name: str, limit: int = MAX_NOTE) -> bytes | None:
        """A file's bytes, at most `limit`; None where there is none."""
        size = self.size(name)
        if size is None:
            return None
        if size > limit:
            raise SynthkdError(f"{self.url}/{name}: has {size} bytes; expected at most {limit}")
        try:
            data: bytes = self._tried(f"reading {name}", lambda: self._system[0].cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file as a whole (see the table above), and compare its size."""
        self._store(name, len(data), lambda path: self._system[0].pipe_file(path, data))

    replace = write

    def put(self, source: Path, name: str) -> None:
        """Write a local file there as a whole, and compare its size."""
        self._store(name, source.stat().st_size, lambda path: self._system[0].put_file(str(source), path))

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Make a file; False where there is one. Not exclusive where the store's client only looks before it writes."""
        if self.size(name) is not None:
            return False
        path = self._path(name)

        def create() -> bool:
            self._make_parent(path)
            try:
                self._system[0].pipe_file(path, data, mode="create")
            except FileExistsError:
                return self.read(name) == data  # an earlier try of ours may have arrived
            return True

        return self._tried(f"making {name}", create)

    def fetch(self, name: str, target: Path) -> None:
        """A file's bytes into a local file, whole or not at all; raises SynthkdError where it is not there."""
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._tried(f"fetching {name}", lambda: self._system[0].get_file(self._path(name), str(temporary)))
            temporary.replace(target)
        except FileNotFoundError as error:
            raise SynthkdError(f"{self.url}/{name}: is not there") from error
        finally:
            temporary.unlink(missing_ok=True)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a prefix that ends in '/', or of all; without what is being written."""
        root = self._path(prefix)

        def find() -> Any:
            self._system[0].invalidate_cache()
            return self._system[0].find(root, detail=True)

        try:
            found = self._tried("listing", find)
        except FileNotFoundError:
            return {}
        start = len(self._path(""))
        names = {path[start:]: int(info.get("size") or 0) for path, info in found.items() if info.get("type") == "file"}
        return {name: size for name, size in names.items() if not name.endswith(_TEMPORARY)}

    def names(self, prefix: str = "") -> list[str]:
        """The files below a prefix, in order."""
        return sorted(self.sizes(prefix))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

        def look() -> int:
            self._system[0].invalidate_cache()
            return int(self._system[0].info(self._path(name))["size"])

        try:
            return self._tried(f"looking at {name}", look)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(f"removing {name}", lambda: self._system[0].rm_file(self._path(name)))

    def _store(self, name: str, size: int, upload: Callable[[str], object]) -> None:
        final, direct = self._path(name), SCHEMES.get(self._scheme, Scheme("", False)).whole_puts

        def attempt() -> None:
            path = final if direct else f"{final}.{secrets.token_hex(4)}{_TEMPORARY}"
            self._make_parent(path)
            try:
                upload(path)
                self._compare(path, size)
                if path != final:
                    self._move(path, final)
            except BaseException:
                if path != final:
                    with contextlib.suppress(Exception):
                        self._system[0].rm_file(path)
                raise

        try:
            self._tried(f"writing {name}", attempt)
        except FileNotFoundError as error:
            raise SynthkdError(f"{self.url}: {name} cannot be written there ({_brief(error)})") from error

    def _make_parent(self, path: str) -> None:
        if not SCHEMES.get(self._scheme, Scheme("", False)).whole_puts or self._scheme == "memory":
            self._system[0].makedirs(path.rpartition("/")[0], exist_ok=True)

    def _compare(self, path: str, size: int) -> None:
        self._system[0].invalidate_cache()
        found = int(self._system[0].info(path)["size"])
        if found != size:
            raise OSError(f"{found} of {size} bytes arrived")

    def _move(self, path: str, final: str) -> None:
        system = self._system[0]
        if self._scheme == "file":  # durable before it counts
            with Path(path).open("rb") as f:
                os.fsync(f.fileno())
            Path(path).replace(final)
            sync_folder(Path(final).parent)
            return
        try:
            system.mv(path, final)
        except Exception:
            if not system.exists(final):
                raise
            system.rm_file(final)
            system.mv(path, final)
