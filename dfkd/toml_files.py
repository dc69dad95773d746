"""TOML files from users."""

import re
import tomllib
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError

_MAX_FILE = 4 * 2**20  # bytes
# The parser takes a dotted name apart in a time that grows with the square of its parts.
_LONG_NAME = re.compile(r"""(?:(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""", re.ASCII)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file as a table; raises SynthkdError that begins with `what`, the option and file it came from."""
    try:
        text = _text(path)
        if _LONG_NAME.search(text):
            raise ValueError("a dotted name of more than 64 parts")
        found = tomllib.loads(text)
        repr(found)  # ValueError for a hexadecimal number too long to be shown in any message
        return found
    except OSError as error:
        raise SynthkdError(f"{what}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SynthkdError(f"{what}: not valid TOML ({error})") from error


def _text(path: Path) -> str:
    """Raises ValueError for a file above the bound, or that is none."""
    if path.exists() and not path.is_file():
        raise ValueError("not a plain file")
    with path.open("rb") as f:
        data = f.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ValueError(f"above {_MAX_FILE} bytes")
    return data.decode()
