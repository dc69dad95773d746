"""A small set on disk and a way to call the command line in this process."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_job(pipeline_folder: Path, teacher_card: Path) -> Any:
    """A job on the tiny pipeline: three classes, guided, Latent CutMix on."""
    from synthkd.dfkd.job import SynthJob
    from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe

    recipe = Recipe(
        classes=("cat", "dog", "bird"),
        prompts=("a photo of a {class}", "a {class}"),
        height=16,
        width=16,
        steps=4,
        guidance_scale=3.0,
        guidance=GuidanceSpec(scale=0.2),
        cutmix=CutMixSpec(every=1, last_clean=2),
        classes_per_group=3,
        samples_per_class=2,
        groups_per_shard=3,
    )
    return SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=recipe)


@pytest.fixture(scope="session")
def tiny_set(tiny_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of the tiny job in two shards."""
    from synthkd.dfkd.rounds import draw_set
    from synthkd.engine import Request

    folder = tmp_path_factory.mktemp("set") / "shards"
    draw_set(tiny_job, Request(num_samples=30, seed=5), folder, workers=1)
    return folder


Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the command in this process: exit code, standard output and error."""

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        from synthkd.dfkd import cli

        monkeypatch.setattr(cli, "_add_plugins", lambda: None)
        monkeypatch.setattr(sys, "argv", ["synthkd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, shown.out, shown.err)

    return run


def _file(pixels: Any, image_format: str) -> bytes:
    """An image file; JPEG at quality 90."""
    from synthkd.engine.encoders import encode_image

    return encode_image(pixels, image_format, 90)


@pytest.fixture
def file_set() -> Callable[..., Path]:
    """`file_set(folder, count, (h, w), ...)`: a finished set of smooth random pictures, without a diffusion model.

    sizes: stored sizes in turn; changed: other bytes for an image's file, by key; flipped: keys whose file has one
    bit turned after its digest was taken.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from synthkd.engine.encoding import tar_member
    from synthkd.engine.rows import rows_path
    from synthkd.engine.shards import file_digest, short_digest

    def make(
        folder: Path,
        count: int,
        *sizes: tuple[int, int],
        image_format: str = "png",
        per_shard: int = 8,
        changed: Mapping[str, bytes] | None = None,
        flipped: Sequence[str] = (),
    ) -> Path:
        (folder / "rows").mkdir(parents=True)
        generator, rows = torch.Generator().manual_seed(0), []
        for shard, start in enumerate(range(0, count, per_shard)):
            tar, members = b"", {}
            for i in range(start, min(count, start + per_shard)):
                coarse = torch.rand(1, 3, 5, 5, generator=generator) * 255
                smooth = F.interpolate(coarse, size=sizes[i % len(sizes)], mode="bicubic").clamp(0, 255)
                pixels = smooth[0].permute(1, 2, 0).numpy().astype(np.uint8)
                key, image = f"{i:09d}", _file(np.ascontiguousarray(pixels), image_format)
                image = (changed or {}).get(key, image)
                meta = json.dumps({"key": key, "label": i % 3, "class": "abc"[i % 3]}).encode()
                for name, data in ((f"{key}.{image_format}", image), (f"{key}.json", meta)):
                    members[name] = short_digest(data)
                    turned = key in flipped and not name.endswith("json")
                    tar += tar_member(name, data[:-20] + bytes([data[-20] ^ 1]) + data[-19:] if turned else data)
            path = folder / f"shard-{shard:06d}.tar"
            path.write_bytes(tar + b"\0" * 1024)
            group = {"group": shard, "attempt": 0, "kept": len(members) // 2, "end": len(tar), "environment": ""}
            listed = json.dumps(group | {"members": members}) + "\n"
            rows_path(folder, shard).write_text(listed)
            row = {"shard": shard, "file": path.name, "samples": len(members) // 2, "bytes": len(tar) + 1024}
            row |= {"sha256": file_digest(path), "groups": 1, "rows": hashlib.sha256(listed.encode()).hexdigest()}
            rows.append(json.dumps(row) + "\n")
        (folder / "index.jsonl").write_text("".join(rows))
        recipe = {"image_format": image_format, "classes": ["a", "b", "c"]}
        manifest = {"format": 2, "fingerprint": "", "recipe": recipe, "guidance": {}, "model_sha256": "", "seed": 0}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"num_samples": count}))
        return folder

    return make
