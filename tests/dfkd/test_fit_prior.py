"""`synthkd fit-prior`: what it learns, that it goes on to the bit after a kill or a stop, and what it refuses."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd import fit_prior, prior_latents, prior_loop
from synthkd.dfkd.fit_prior import PriorFit
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_latents import encode_all
from synthkd.dfkd.prior_loop import StageLoop, StagePlan, checkpoint_of, generator_of, read_log
from synthkd.dfkd.prior_objective import Denoising, draw, learn_words
from synthkd.dfkd.prior_spec import SIZES, PriorSpec, prior_spec
from synthkd.dfkd.progress import Silent
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.training import Stopped
from synthkd.engine import SynthkdError
from synthkd.engine.declared import read_declaration
from synthkd.engine.locks import folder_lock
from synthkd.engine.new_prior import draw_samples, new_scheduler
from synthkd.engine.reading import read_set

Killed = Callable[[Callable[[], object]], bool]
CAPTIONS = ("red", "green", "a blue one")
NETS: dict[str, Any] = {"vae_widths": (16, 16), "unet_widths": (32,), "text_width": 16}
TINY: dict[str, Any] = {
    **NETS, "unet_widths": (16,), "vae_steps": 4, "vae_batch_size": 4, "steps": 5, "batch_size": 4, "warmup_steps": 2,
    "held_out": 8,
}  # fmt: skip


def arrays(count: int) -> dict[str, Any]:
    """Images of 8x8 pixels of one colour each, which their caption names."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, count)
    x = 40.0 + 160.0 * np.eye(3)[y][:, None, None, :] + random.normal(0, 25, (count, 1, 1, 3))
    x = x + random.normal(0, 6, (count, 8, 8, 3))
    return {
        "x": x.clip(0, 255).astype(np.uint8), "y": y, "captions": np.array(CAPTIONS),
        "trained_on": np.array(["toy/train"]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a file."""
    path = tmp_path_factory.mktemp("pool") / "pool.npz"
    np.savez(path, **arrays(160))
    return path


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """Words are warmed up for a moment, and the sheet is one image a caption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_prior, "learn_words", partial(learn_words, steps=100))
        patch.setattr(fit_prior, "_SHEET_EACH", 1)
        patch.setattr(fit_prior, "_ENCODE_AT_ONCE", 50)
        yield


def job(pool: Path, out: Path, **changes: Any) -> PriorFit:
    """A training of nine steps."""
    return PriorFit(data=load_captioned(pool), spec=PriorSpec(**{**TINY, **changes}), out=out)


def files(out: Path) -> dict[str, bytes]:
    """All that a finished training leaves, but for what tells of time."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for name in (".lock", "log.jsonl", "training.html"):
        found.pop(name)
    told = json.loads(found.pop("prior.json"))
    for stage in ("vae", "unet"):
        for figure in ("seconds", "images_per_second"):
            del told[stage][figure]
        del told[stage]["loss"]  # the mean since the last row of the log, or since the last restart
    return {**found, "prior.json": json.dumps(told).encode()}


@pytest.fixture(scope="module")
def whole(pool: Path, tmp_path_factory: pytest.TempPathFactory, short: None) -> dict[str, bytes]:
    """A training that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    job(pool, out).execute()
    return files(out)


@pytest.fixture(scope="module")
def learned(pool: Path, tmp_path_factory: pytest.TempPathFactory, short: None) -> Path:
    """A prior that was trained long enough to know colours by their names."""
    out = tmp_path_factory.mktemp("learned")
    rates = {"vae_learning_rate": 3e-3, "learning_rate": 3e-3, "ema": 0.9, "vae_batch_size": 16, "batch_size": 32}
    job(pool, out, **NETS, **rates, vae_steps=60, steps=130, warmup_steps=10, held_out=20).execute()
    return out


def colours(folder: Path, captions: list[str], scale: float) -> torch.Tensor:
    """Mean colour [N,3] of an image for each caption."""
    return draw_samples(folder, captions, seed=0, steps=8, scale=scale, device="cpu").float().mean((2, 3))


def test_it_learns_colours_by_their_names(learned: Path) -> None:
    """Drawn colours follow captions, classifier-free guidance changes them; without a caption they vary."""
    asked = [caption for caption in CAPTIONS for _ in range(6)]
    named = torch.arange(3).repeat_interleave(6)
    found = {scale: colours(learned / "pipeline", asked, scale) for scale in (1.0, 3.0)}
    assert (found[3.0].argmax(1) == named).float().mean() > 0.9
    ahead = {s: (c.gather(1, named[:, None])[:, 0] - c.mean(1)).mean() for s, c in found.items()}
    assert min(ahead.values()) > 5.0
    assert (found[3.0] - found[1.0]).abs().max() > 0.5
    assert colours(learned / "pipeline", [""] * 12, 1.0).argmax(1).unique().numel() > 1
    losses = [row["held_out_loss"] for row in read_log(learned) if "held_out_loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_what_it_leaves(learned: Path) -> None:
    """A declared pipeline, figures, a log, a sheet and a page that tells of them; no checkpoint."""
    names = sorted(p.name for p in learned.iterdir())
    assert names == [".lock", "log.jsonl", "pipeline", "prior.json", "samples.png", "training.html"]
    assert read_declaration(learned / "pipeline") == ("toy/train",)
    told = json.loads((learned / "prior.json").read_text())
    assert told["sha256"].keys() == {p.relative_to(learned / "pipeline").as_posix()
                                     for p in learned.rglob("pipeline/*/*.safetensors")}  # fmt: skip
    page = (learned / "training.html").read_text()
    for words in ("a blue one", "toy/train", "held out", "images/s", f"{told['vae']['psnr_held_out']:.1f} dB"):
        assert words in page
    assert page.count("<svg") >= 5
    assert page.count("data:image/png") == 1


def test_the_command_draws_from_it(
    learned: Path, teacher_card: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    """`synthkd synth --model` knows the colours too."""
    card = teacher_card.read_text().replace('["cat", "dog", "bird"]', json.dumps(CAPTIONS))
    card = card.replace('"teacher.safetensors"', json.dumps(str(teacher_card.with_name("teacher.safetensors"))))
    (tmp_path / "card.toml").write_text(card)
    (tmp_path / "recipe.toml").write_text(
        'prompts = ["{class}"]\nheight = 8\nwidth = 8\nsteps = 8\nguidance_scale = 3.0\nsamples_per_class = 4\n'
        'classes_per_group = 3\n[guidance]\nscale = 0.05\n'
    )
    done = call("synth", "--model", learned / "pipeline", "--teacher", tmp_path / "card.toml", "--recipe",
                tmp_path / "recipe.toml", "--num-samples", 12, "--out", tmp_path / "set", "--workers", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [(one.meta["label"], one.pixels.mean((0, 1)).argmax()) for one in read_set(tmp_path / "set")]
    assert len(seen) == 12
    assert sum(label == colour for label, colour in seen) >= 10


def _kill_at(number: int) -> None:
    """Let this process be killed at its n-th fsync, rename or removal of a file."""
    calls = iter(range(10**6))

    def counted(inner: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **more)

        return wrapped

    os.fsync = counted(os.fsync)
    for name in ("replace", "rename", "unlink"):
        setattr(Path, name, counted(getattr(Path, name)))


def test_killed_again_and_again_it_ends_in_the_same_bytes(
    pool: Path, whole: dict[str, bytes], killed: Killed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each process is killed somewhere in its disk operations; a checkpoint follows every step."""
    monkeypatch.setattr(prior_loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(prior_latents, "SAVE_SECONDS", -1.0)

    def work(number: int) -> None:
        _kill_at(number)
        job(pool, tmp_path / "p").execute()

    deaths = 0
    while killed(partial(work, 4 + 6 * deaths)):
        deaths += 1
    assert deaths >= 4
    assert files(tmp_path / "p") == whole


def test_stopped_in_every_stage_it_ends_in_the_same_bytes(pool: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Asked to stop in the autoencoder, its latents, the words, the denoiser, the sheet."""
    begun: list[tuple[str, int]] = []

    class Told(Silent):
        def begin(self, stage: str, total: int, unit: str) -> None:
            begun.append((stage, -1))

        def advance(self, stage: str, count: int) -> None:
            if begun[-1] == (stage, -1):
                begun[-1] = stage, count

    one = job(pool, tmp_path / "p")
    one.progress = Told()
    for looks in (2, 4, 8, 103, 10):
        asked = iter([False] * looks)
        one.should_stop = partial(next, asked, True)
        with pytest.raises(Stopped):
            one.execute()
    one.should_stop = lambda: False
    one.execute()
    assert begun == [("vae", 0), ("vae", 3), ("latents", 0), ("latents", 160), ("unet", 0), ("unet", 4), ("unet", 5)]
    assert files(tmp_path / "p") == whole


def test_the_command_stops_in_time_and_goes_on(
    pool: Path, whole: dict[str, bytes], call: Callable[..., Any], tmp_path: Path
) -> None:
    sets = [word for name, value in TINY.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    words = ("fit-prior", pool, "--out", tmp_path / "p", "--device", "cpu", *sets)
    first = call(*words, "--minutes", "0.00001")
    assert (first.returncode, "the same command goes on" in first.stdout) == (75, True)
    assert checkpoint_of(tmp_path / "p", "vae").is_file()
    last = call(*words, "--json")
    assert last.returncode == 0, last.stderr
    assert files(tmp_path / "p") == whole
    assert json.loads(last.stdout.splitlines()[-1])["trained_on"] == ["toy/train"]
    again = call(*words)
    assert "million weights" in again.stdout
    other = call(*words, "--set", "steps=6")
    assert (other.returncode, "holds a prior of another pool or spec" in other.stderr) == (2, True)
    seeded = call(*words, "--set", "seed=5")
    assert (seeded.returncode, "--set seed=5: a seed is given by --seed" in seeded.stderr) == (2, True)


def test_an_autoencoder_outlives_a_change_of_the_denoiser(pool: Path, tmp_path: Path) -> None:
    """Also one that an earlier version noted with the whole spec; one of other fields, or no note, is refused."""
    one = job(pool, tmp_path / "p", vae_steps=1)
    looks = iter(range(100))
    one.should_stop = lambda: next(looks) >= 1  # the autoencoder's step, then its latents
    with pytest.raises(Stopped):
        one.execute()
    path = tmp_path / "p" / "vae.safetensors"
    tensors, note = read_tensors(path)
    assert not {"learning_rate", "steps", "unet_widths"} & set(note["identity"])
    for identity in (note["identity"], one._identity, {**one._identity, "learning_rate": 7.0}):
        write_tensors(path, tensors, {**note, "identity": identity})
        other = job(pool, tmp_path / "p", vae_steps=1, learning_rate=1e-4)
        other.should_stop = lambda: True
        with pytest.raises(Stopped):  # in the latents, not in an autoencoder
            other.execute()
        assert not checkpoint_of(tmp_path / "p", "vae").exists()
    for identity in ({**note["identity"], "vae_learning_rate": 7.0}, {}, None):
        write_tensors(path, tensors, {**note, "identity": identity})
        with pytest.raises(SynthkdError, match="is of another pool or spec"):
            other.execute()


def test_a_folder_of_a_deleted_training_shows_nothing_of_it(
    pool: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Page and sheet go when a training begins; a checkpoint that a kill left goes at its end."""
    out = tmp_path / "p"
    out.mkdir()
    for name in ("training.html", "samples.png"):
        (out / name).write_text("of another prior")
    one = job(pool, out)
    one.should_stop = lambda: True
    with pytest.raises(Stopped):
        one.execute()
    assert not (out / "training.html").exists()
    assert not (out / "samples.png").exists()
    checkpoint_of(out, "latents").write_bytes(b"left by a kill")
    for path, data in whole.items():
        if path.startswith("pipeline"):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(data)
    (out / "prior.json").write_text(json.dumps({**json.loads(whole["prior.json"]), "identity": one._identity}))
    one.should_stop = lambda: False
    (out / "samples.png").write_bytes(whole["samples.png"])
    (out / "training.html").write_text("told")
    one.execute()
    assert not list(out.glob("*.safetensors"))


def test_one_folder_is_one_trainings(pool: Path, tmp_path: Path) -> None:
    """Not of two processes at once, and not of another spec or a checkpoint that does not fit."""
    out = tmp_path / "p"
    out.mkdir()
    with folder_lock(out), pytest.raises(SynthkdError, match="another run is writing there"):
        job(pool, out).execute()
    one = job(pool, out)
    one.should_stop = lambda: True
    with pytest.raises(Stopped):
        one.execute()
    with pytest.raises(SynthkdError, match="is of another pool or spec"):
        job(pool, out, vae_learning_rate=1e-4).execute()
    path = checkpoint_of(out, "vae")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SynthkdError, match=r"not readable .* delete it"):
        job(pool, out).execute()


def test_a_loss_that_is_not_finite_ends_the_training(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(SynthkdError, match="the loss of the vae is not finite at step 4; lower its learning rate"):
        job(pool, tmp_path / "p", vae_learning_rate=1e30).execute()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": None}, "expected arrays x, y, captions and trained_on"),
        ({"captions": None}, "captions are missing; a file of `bench.cifar_pack` or `bench.pacs_pack` that has none"),
        ({"x": np.zeros((9, 8, 8, 1), np.uint8)}, "x is uint8 (9, 8, 8, 1); expected uint8 [N,H,W,3]"),
        ({"x": np.full((9, 8, 8, 3), np.nan)}, "x is float64 (9, 8, 8, 3); expected uint8"),
        ({"y": np.zeros(8, int)}, "y is int64 (8,); expected the whole number of a caption for all 9 images"),
        ({"y": np.full(9, np.nan)}, "y is float64 (9,)"),
        ({"y": np.full(9, 3)}, "y is 3..3; there are 3 captions"),
        ({"captions": np.array("red")}, "captions is <U3 (), not a list of texts"),
        ({"captions": np.array([1, 2, 3])}, "captions is int64 (3,), not a list of texts"),
        ({"captions": np.array(["red", "blue", "Größe 2"])}, "caption 'Größe 2'; expected words of letters a to z"),
        ({"captions": np.array(["red", "blue", None], object)}, "expected arrays x, y, captions and trained_on"),
        ({"trained_on": np.array([], str)}, "trained_on has 0 names; expected 1 to"),
        ({"trained_on": np.array(["CIFAR 100"])}, "trained_on is 'CIFAR 100'; expected a list of names"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_at_once(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {name: value for name, value in {**arrays(9), **changes}.items() if value is not None}
    np.savez(tmp_path / "pool.npz", **given)
    with pytest.raises(SynthkdError) as error:
        load_captioned(tmp_path / "pool.npz")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out": 160}, "held_out is 160 of 160 images"),
        ({"unet_widths": (16, 16, 16, 16)}, "height is 8; this network needs a multiple of 16"),
    ],
)
def test_a_spec_that_does_not_fit_the_pool_is_refused(
    changes: dict[str, Any], words: str, pool: Path, tmp_path: Path
) -> None:
    with pytest.raises(SynthkdError, match=re.escape(words)):
        job(pool, tmp_path / "p", **changes).execute()
    assert not (tmp_path / "p").exists()


def test_sizes_and_fields_by_name(call: Callable[..., Any]) -> None:
    assert prior_spec("small", {"steps": 7}).steps == 7
    assert prior_spec("base") == SIZES["base"]
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("smal", {}, "small"), ("small", {"step": 7}, "step"), ("small", {"ema": 1.0}, "ema is 1.0; expected 0 <= sh"),
    ]  # fmt: skip
    for size, changes, words in wrong:
        with pytest.raises(SynthkdError, match=words):
            prior_spec(size, changes)
    shown = " ".join(call("fit-prior", "--help").stdout.split())
    for words in ("warmup_steps: steps of a linear rise", "small 4000, base 60000", "Example: synthkd fit-prior"):
        assert words in shown


def test_the_objective_is_what_it_says() -> None:
    """Velocity and weight against float64 by hand (arXiv 2202.00512, app. D; arXiv 2303.09556): eight timesteps."""
    told: dict[str, torch.Tensor] = {}

    class Denoiser(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, states: torch.Tensor, return_dict: bool) -> Any:
            told.update(noisy=noisy, states=states)
            return (torch.full_like(noisy, 0.25),)

    net = Denoising(Denoiser(), lambda ids: (ids * 2.0,))
    steps, random = torch.tensor([0, 3, 20, 100, 300, 500, 900, 999]), torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 8, 4, 3, 3, generator=random)
    found = float(net(clean, noise, steps, torch.arange(8).view(8, 1)))
    x, e = clean.double().numpy(), noise.double().numpy()
    betas = np.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=np.float64) ** 2
    a = np.cumprod(1 - betas)[steps.numpy()]
    snr, signal, spread = a / (1 - a), np.sqrt(a)[:, None, None, None], np.sqrt(1 - a)[:, None, None, None]
    weight = np.maximum(np.minimum(snr, 5) / (snr + 1), 0.3)
    wanted = np.mean(weight * ((0.25 - (signal * e - spread * x)) ** 2).mean((1, 2, 3)))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert np.abs(told["noisy"].numpy() - (signal * x + spread * e)).max() < 1e-4
    assert told["states"].flatten().tolist() == [2.0 * i for i in range(8)]
    assert snr[-1] == pytest.approx(2.3e-4, rel=0.01)
    assert float(new_scheduler().alphas_cumprod[999]) == pytest.approx(a[-1], rel=1e-3)


def test_a_step_is_drawn_evenly_and_again_the_same() -> None:
    spec, rows = PriorSpec(batch_size=250, dropout=0.25), torch.arange(7, 57)

    def drawn(step: int, every: bool = False) -> Any:
        return draw(generator_of(0, "unet", step), rows, 2, spec, (4, 2, 2), every)

    one, again, other, held = drawn(5), drawn(5), drawn(6), drawn(0, every=True)
    assert torch.equal(one.noise, again.noise)
    assert not torch.equal(one.noise, other.noise)
    assert set(one.rows.tolist()) == set(rows.tolist())
    assert torch.equal(one.steps // 4, torch.arange(250))  # one in each part of the schedule
    assert 0.15 < float(one.dropped.float().mean()) < 0.35
    assert torch.equal(held.rows, rows)
    assert not held.dropped.any()


def test_latents_are_of_every_image_and_of_every_mirrored_one(pool: Path, tmp_path: Path) -> None:
    one = job(pool, tmp_path / "p")
    rows = torch.tensor([5, 9])
    plain, mirrored = one._pixels(rows), one._pixels(rows, torch.tensor([False, True]))
    assert torch.equal(plain[0], mirrored[0])
    assert torch.equal(plain[1].flip(2), mirrored[1])
    assert ((plain + 1) * 127.5 - one.data.images[rows]).abs().max() < 0.01
    parts = [(part, side) for side in (False, True) for part in torch.arange(7).split(3)]

    def encode(rows: torch.Tensor, side: bool) -> torch.Tensor:
        return (rows + 100 * side).view(-1, 1, 1, 1)

    for _ in range(2):  # made, then found
        found = encode_all(encode, parts, tmp_path / "latents.safetensors", {"of": 1}, Silent(), lambda: False)
        assert found.flatten().tolist() == [*range(7), *range(100, 107)]


def test_averages_and_rates(tmp_path: Path) -> None:
    """The learning rate rises, then falls as half a cosine; slower parts learn less; averages follow EMA's equation."""
    plan = StagePlan("x", 10, 1.0, 2, 0.5, 4, {"slow.": 0.25})
    assert [round(plan.rate(step), 4) for step in (0, 1, 5)] == [0.5, 0.976, 0.51]
    net = torch.nn.ModuleDict({"fast": torch.nn.Linear(1, 1), "slow": torch.nn.Linear(1, 1)})
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    loop = StageLoop(plan, net, tmp_path, {}, "cpu", Silent(), lambda: False)
    expected, seen = {name: value.clone() for name, value in before.items()}, []

    def loss(step: int) -> torch.Tensor:
        if step:  # averages of the step before
            decay = min(0.5, step / (step + 9))
            for name, p in net.named_parameters():
                expected[name] += (1 - decay) * (p.detach() - expected[name])
            seen.append({name: float((p.detach() - before[name]).abs().max()) for name, p in net.named_parameters()})
        return sum((p - 3).square().sum() for p in net.parameters())  # type: ignore[return-value]

    averaged = dict(loop.run(loss, lambda _: {"figure": 1.0}).named_parameters())
    loss(10)
    for name, value in expected.items():
        assert averaged[name].item() == pytest.approx(value.item(), abs=1e-5)
    assert seen[0]["slow.weight"] == pytest.approx(0.25 * seen[0]["fast.weight"], rel=0.05)
    assert loop.figures["figure"] == 1.0
