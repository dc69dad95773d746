"""A synthkd wheel as modules that Ray sends to a cluster.

Ray would install a wheel by pip with all its dependencies, torch among them; unpacked, only synthkd itself travels, and
its version is found beside it.
"""

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from synthkd.engine.errors import SynthkdError

_MOST = 2**30  # bytes, unpacked


@contextlib.contextmanager
def shipped(wheel: Path | None) -> Iterator[list[str]]:
    """The folders of a wheel that go onto the actors' path, unpacked while the block lasts; none without a wheel.

    Raises SynthkdError for a file that is no synthkd wheel.
    """
    if wheel is None:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="synthkd-wheel-") as folder:
        _unpack(wheel, Path(folder))
        found = sorted(path for path in Path(folder).iterdir() if path.is_dir())
        names = {path.name.partition("-")[0] for path in found}
        if names != {"synthkd"} or len(found) != 2:
            raise SynthkdError(f"--ray-wheel {wheel}: holds {sorted(names)}; expected a wheel of synthkd")
        yield [str(path) for path in found]


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST:
                raise SynthkdError(f"--ray-wheel {wheel}: is above {_MOST} bytes; expected a wheel of synthkd")
            archive.extractall(folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise SynthkdError(f"--ray-wheel {wheel}: cannot be unpacked ({error})") from error


def editable() -> Path | None:
    """The source tree that synthkd runs from, which other machines may not have; None for an installed wheel."""
    try:
        told = json.loads(distribution("synthkd").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(str(told.get("url", ""))).path))
