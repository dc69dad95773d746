"""TOML files from users."""

import tomllib
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file as a table; raises SynthkdError that begins with `what`, the option and file it came from."""
    try:
        found = tomllib.loads(path.read_text())
        repr(found)  # ValueError for a hexadecimal number too long to be shown in any message
        return found
    except OSError as error:
        raise SynthkdError(f"{what}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SynthkdError(f"{what}: not valid TOML ({error})") from error
