"""Fits a small guidance decoder to a prior's own VAE, on latents that the prior itself goes through: no data.

Two sittings: the first learns from plain runs; the second adds runs that the guidance steers, looking through what the
first has learned, since a steered run visits other latents. The loss is the distance of images and, where a guidance is
given, of the directions in which it pulls the latent (arXiv 1706.04859): guidance uses the gradient, not the image.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, SHARE, Kind, check_fields, is_whole, whole
from synthkd.dfkd.progress import Progress, Silent
from synthkd.engine import Recipe, SynthkdError
from synthkd.engine.calibration import Recorder, Trajectory, cosines, images_at_once, own_seed
from synthkd.engine.decoders import latent_layout
from synthkd.engine.fitted import SMALL, FittedDecoder, FittedNet, resized, shape_for, vae_digest
from synthkd.engine.guidance import Guidance, frozen
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.workers import one_thread

_KINDS: Mapping[str, Kind] = {
    "samples": whole(0),
    "steps": whole(1),
    "batch_size": whole(1),
    "learning_rate": ABOVE_ZERO,
    "slope": AMOUNT,
    "jitter": AMOUNT,
    "steered": SHARE,
    "hidden": whole(0),
    "blocks": whole(0),
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}
_RUNS, _HELD_OUT = ("fit-decoder plain", "fit-decoder steered"), "fit-decoder held out"


@dataclass(frozen=True, kw_only=True)
class FitSpec:
    """How a guidance decoder is fitted.

    samples: latents to learn from, rounded up to whole groups, all calls of each; 0 for 11,000, or 3,000 where a latent
    has many positions, each of which is a lesson; steered: the share of them that
    comes from guided runs; steps of batch_size latents under AdamW, learning_rate with a cosine to 0; slope: weight of
    1 - cosine of the gradients beside the mean squared error of the images; jitter: root-mean-square of the Gaussian
    noise on every other call's latents; hidden, blocks: size of the network, 0 for what `shape_for` says.
    """

    samples: int = 0
    steps: int = 1200
    batch_size: int = 40
    learning_rate: float = 2e-3
    slope: float = 0.1
    jitter: float = 0.05
    steered: float = 0.5
    hidden: int = 0
    blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range."""
        check_fields("fit-decoder", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)


    def for_latents(self, shape: tuple[int, int, int]) -> "FitSpec":
        """With the samples that latents (C, h, w) need, where it says 0."""
        return replace(self, samples=self.samples or (11_000 if shape[1] * shape[2] <= SMALL else 3_000))


class Stopped(Exception):  # noqa: N818 - not an error
    """The caller wants to stop; nothing is kept."""


@dataclass(frozen=True)
class Source:
    """What a decoder is fitted to: a prior, the recipe's runs of it, the images' size and, if given, the guidance."""

    model: LatentModel
    recipe: Recipe
    size: tuple[int, int]
    guidance: Guidance | None = None

    @property
    def plain(self) -> Recipe:
        """The recipe without guidance."""
        return replace(self.recipe, guidance=replace(self.recipe.guidance, scale=0.0))

    @property
    def steers(self) -> Guidance | None:
        """The guidance, where the recipe uses it."""
        return self.guidance if self.recipe.guidance.scale > 0 else None


class Lessons(NamedTuple):
    """Latents [N,C,h,w] and the VAE's images of them [N,3,H,W], on the host in float16 at the decoder's size.

    pulls: cotangents of the images [N,3,H,W], unit root-mean-square; slopes: the VAE's gradient of <pull, image> with
    respect to the latent, [N,C,h,w]; both without a batch where no guidance is given.
    """

    latents: Tensor
    images: Tensor
    pulls: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Fitted:
    """A fitted network, how it was fitted, its training curve, and its errors on latents that it was not fitted to."""

    net: FittedNet
    spec: FitSpec
    curve: list[dict[str, float]]
    errors: dict[str, Any]


def fit_decoder(
    source: Source,
    spec: FitSpec,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Fit a network; a function of (source, spec), on a CPU with one thread.

    Raises SynthkdError where the loss is not finite, and Stopped where `should_stop` says so.
    """
    told, recipe = progress or Silent(), source.recipe
    spec = spec.for_latents(source.model.latent_shape(recipe.height, recipe.width))
    steered = source.steers is not None and spec.steered > 0
    shares = (1 - spec.steered, spec.steered) if steered else (1.0,)
    per_group = recipe.group_size * recipe.steps
    groups = [max(1, math.ceil(spec.samples * share / per_group)) for share in shares]
    with _deterministic(source.model.device):
        net = _fresh(source, spec)
        lessons: list[Lessons] = []
        curve: list[dict[str, float]] = []
        told.begin("decoder runs", sum(groups), "groups")
        for sitting, count in enumerate(groups):
            run, seed = _runs(source, FittedDecoder(net) if sitting else None), own_seed(spec.seed, _RUNS[sitting])
            for group in range(count):
                lessons.append(_lessons(source, run(seed, group), spec, group, bool(sitting)))
                told.advance("decoder runs", 1)
                _heed(should_stop)
            last = sitting + 1 == len(groups)
            steps = spec.steps if last else max(1, spec.steps // 4)
            curve += _train(net, lessons, replace(spec, steps=steps), f"decoder, part {sitting + 1}", told, should_stop)
        told.end("decoder runs")
        return Fitted(net, spec, curve, _errors(source, net, spec))


def about(source: Source, fitted: Fitted) -> dict[str, Any]:
    """What an artifact's card says beside its network: what it was fitted to, how, and how far it is off."""
    described = {"guidance": source.guidance.describe()} if source.guidance else {}
    runs = source.recipe.to_dict()
    return {
        "fitted_to": {"vae_sha256": vae_digest(source.model.decoder), "recipe": runs, **described},
        "spec": asdict(fitted.spec),
        "curve": fitted.curve,
        "held_out": fitted.errors,
    }


def _runs(source: Source, through: FittedDecoder | None) -> Callable[[int, int], Trajectory]:
    """Draws groups by seed and number: plain ones, or guided through what is fitted so far."""
    if through is None:
        return Recorder(source.model, source.plain)
    return Recorder(source.model, source.recipe, source.guidance, through)


def _fresh(source: Source, spec: FitSpec) -> FittedNet:
    """A new network on the prior's device, in float32."""
    device, recipe = source.model.device, source.recipe
    shape = shape_for(
        source.model.latent_shape(recipe.height, recipe.width),
        latent_layout(source.model.decoder.module)[1],
        source.size,
        spec.hidden,
        spec.blocks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        net = FittedNet(shape)
    memory = torch.channels_last if device.type == "cpu" else torch.preserve_format
    return net.to(device=device).to(memory_format=memory)  # type: ignore[call-overload]


def _lessons(source: Source, run: Trajectory, spec: FitSpec, group: int, steered: bool) -> Lessons:
    """What the VAE makes of all latents of a run, call by call; every other call's are moved a little first."""
    generator = torch.Generator().manual_seed(own_seed(spec.seed, f"jitter {steered} {group}"))
    found = []
    for call, (x0, targets) in enumerate(zip(run.latents, run.targets, strict=True)):
        noise = torch.randn(x0.shape, generator=generator).to(x0) * (spec.jitter * (call % 2))
        found.append(_lesson(source, x0 + noise, targets, slope=spec.slope > 0))
    return Lessons(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _lesson(source: Source, x0: Tensor, targets: Tensor, slope: bool) -> Lessons:
    """Of one call; in parts where images are large, each decoded again then for its gradient."""
    guidance, recipe, empty = source.guidance, source.recipe, torch.empty(0)
    parts = torch.split(x0, images_at_once(len(x0), recipe.height, recipe.width))
    with frozen(source.model.modules()):
        if guidance is None or not slope:
            with torch.no_grad():
                return Lessons(_kept(x0), _kept(torch.cat([_seen(source, z) for z in parts])), empty, empty)
        leaves = [z.detach().requires_grad_() for z in parts]
        whole = len(parts) == 1
        with torch.set_grad_enabled(whole):
            images = torch.cat([_seen(source, z) for z in leaves])
        pulls = _pulls(guidance, images.detach(), targets)
        slopes: list[Tensor] = []
        for z, pull in zip(leaves, torch.split(pulls, len(leaves[0])), strict=True):
            slopes += torch.autograd.grad(images if whole else _seen(source, z), z, pull)
    return Lessons(_kept(x0), _kept(images), _kept(pulls), torch.cat(slopes).detach().float().cpu())


def _seen(source: Source, z: Tensor) -> Tensor:
    """The VAE's images of latents at the decoder's size, float32."""
    return resized(source.model.decoder(z).float(), source.size)


def _pulls(guidance: Guidance, images: Tensor, targets: Tensor) -> Tensor:
    """The guidance's gradient with respect to images [B,3,H,W], each of root-mean-square 1, or 0."""
    leaf = images.requires_grad_()
    with frozen(guidance.modules()):
        (pulls,) = torch.autograd.grad(guidance(leaf.clamp(0.0, 1.0), targets)[0], leaf)
    size = pulls.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return pulls / size.clamp_min(torch.finfo(size.dtype).tiny)


def _kept(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float16)


def _train(
    net: FittedNet,
    lessons: list[Lessons],
    spec: FitSpec,
    stage: str,
    told: Progress,
    should_stop: Callable[[], bool],
) -> list[dict[str, float]]:
    """Train on all lessons; returns the curve."""
    device = net.stem.weight.device
    data = Lessons(*(torch.cat(parts) for parts in zip(*lessons, strict=True)))
    generator = torch.Generator().manual_seed(own_seed(spec.seed, stage))
    optimizer = torch.optim.AdamW(net.parameters(), lr=spec.learning_rate, weight_decay=1e-4)
    curve = []
    net.train()
    told.begin(stage, spec.steps, "steps")
    for step in range(spec.steps):
        pick = torch.randint(len(data.latents), (spec.batch_size,), generator=generator)
        batch = Lessons(*(t[pick].to(device).float() if len(t) else t for t in data))
        image_loss, slope_loss = _losses(net, batch)
        loss = image_loss + spec.slope * slope_loss
        optimizer.param_groups[0]["lr"] = _rate(spec, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == spec.steps:
            curve.append(_row(stage, step + 1, image_loss, slope_loss))
        told.advance(stage, 1)
        _heed(should_stop)
    told.end(stage)
    net.eval()
    return curve


def _losses(net: FittedNet, batch: Lessons) -> tuple[Tensor, Tensor]:
    """Mean squared error of the images, and 1 - mean cosine of the gradients along the same pulls (0 without)."""
    if not len(batch.pulls):
        return F.mse_loss(net(batch.latents), batch.images), torch.zeros((), device=batch.latents.device)
    leaf = batch.latents.requires_grad_()
    images = net(leaf)
    (slopes,) = torch.autograd.grad(images, leaf, batch.pulls, create_graph=True)
    agree = F.cosine_similarity(slopes.flatten(1), batch.slopes.flatten(1), dim=1)
    return F.mse_loss(images, batch.images), 1 - agree.mean()


def _rate(spec: FitSpec, step: int) -> float:
    """Learning rate at a step: a rise over a twentieth of the steps, then a cosine to 0."""
    rise = max(1, spec.steps // 20)
    share = min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / spec.steps))
    return spec.learning_rate * share


def _row(stage: str, step: int, image_loss: Tensor, slope_loss: Tensor) -> dict[str, float]:
    values = float(image_loss.detach()), 1 - float(slope_loss.detach())
    if not all(map(math.isfinite, values)):
        raise SynthkdError(f"fit-decoder: the loss is not finite at step {step}; lower learning_rate")
    return {"part": float(stage[-1]), "step": step, "mse": round(values[0], 6), "cosine": round(values[1], 4)}


def _errors(source: Source, net: FittedNet, spec: FitSpec) -> dict[str, Any]:
    """Errors on one group of plain runs of another seed, call by call from the noisiest to the last.

    rmse, psnr: of images in [0,1]; cosine: of the guidance's gradients with respect to the latent.
    """
    run = Recorder(source.model, source.plain)(own_seed(spec.seed, _HELD_OUT), 0)
    pair, rmse, agree = (FittedDecoder(net), source.model.decoder), [], []
    chunk = images_at_once(run.latents.shape[1], source.recipe.height, source.recipe.width)
    for x0, targets in zip(run.latents, run.targets, strict=True):
        with torch.no_grad():
            off = [(pair[0](z).clamp(0, 1) - _seen(source, z).clamp(0, 1)).square() for z in torch.split(x0, chunk)]
        rmse.append(float(torch.cat(off).mean().sqrt()))
        if source.guidance is not None:
            agree.append(float(cosines(source.guidance, pair, x0, targets, chunk).mean()))
    out: dict[str, Any] = {"rmse": [round(e, 5) for e in rmse]}
    out["psnr"] = [round(-20 * math.log10(max(e, 1e-9)), 2) for e in rmse]
    if agree:
        out |= {"cosine": [round(c, 4) for c in agree], "mean_cosine": round(sum(agree) / len(agree), 4)}
    return out


def _heed(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """One thread on a CPU, and cuDNN's deterministic algorithms: the same decoder comes out again."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with one_thread(device):
            yield
    finally:
        torch.backends.cudnn.deterministic = before
