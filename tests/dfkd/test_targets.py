"""Per-class targets from a TOML file."""

from pathlib import Path

import pytest

from synthkd.dfkd.targets import read_targets
from synthkd.engine import SynthkdError

CLASSES = ("cat", "dog", "bird")


def write(tmp_path: Path, text: str) -> Path:
    """A targets file."""
    path = tmp_path / "targets.toml"
    path.write_text(text)
    return path


def test_weights_exclusions_and_words(tmp_path: Path) -> None:
    path = write(tmp_path, '[cat]\nweight = 3\nwords = "tabby cat"\n[bird]\nexclude = true\n')
    assert read_targets(path, CLASSES) == {"class_weights": [3, 1, 0], "class_words": ["tabby cat", "dog", "bird"]}


def test_a_file_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    assert read_targets(write(tmp_path, "[dog]\nweight = 1\n"), CLASSES) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cta]\nweight = 2\n", "no class 'cta'; did you mean 'cat'"),
        ("[cat]\nwieght = 2\n", r"\[cat\] has unknown field 'wieght'; did you mean 'weight'"),
        ("[cat]\nweight = 2.5\n", "weight is 2.5; expected a whole number"),
        ("[cat]\nexclude = 1\n", "exclude is 1; expected true or false"),
        ("[cat]\nwords = 3\n", "words is 3; expected a text"),
        ("[cat]\nweight = true\n", "weight is True; expected a whole number"),
        ("[cat]\nweight = -1\n", "weight is -1; expected a whole number >= 0"),
        ("cat = 2\n", r"cat is 2; expected a table \[cat\]"),
        ("".join(f"[{c}]\nexclude = true\n" for c in CLASSES), "every class is left out"),
        ("[cat\n", "not valid TOML"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SynthkdError, match=message) as caught:
        read_targets(write(tmp_path, text), CLASSES)
    assert str(caught.value).startswith("--targets ")
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SynthkdError, match="cannot be read"):
        read_targets(tmp_path / "none.toml", CLASSES)
