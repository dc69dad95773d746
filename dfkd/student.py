"""Images -> student: a plain loop with the teacher beside it, temperature-scaled KL and a cosine schedule."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.evaluate import predict
from synthkd.dfkd.fields import (
    ABOVE_ZERO,
    AMOUNT,
    TABLE,
    TEXT,
    YES_NO,
    Kind,
    check_fields,
    check_value,
    is_number,
    is_whole,
    whole,
)
from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import write_atomically
from synthkd.kernels import kd_loss

_KINDS: Mapping[str, Kind] = {
    "arch": TEXT,
    "arch_args": TABLE,
    "steps": whole(1),
    "batch_size": whole(2),
    "learning_rate": ABOVE_ZERO,
    "weight_decay": AMOUNT,
    "warmup_steps": Kind(lambda v: is_whole(v, 0, 2**31), "a whole number >= 0, below 2**31"),
    "temperature": ABOVE_ZERO,
    "held_out": Kind(lambda v: is_number(v) and 0 < v < 1, "0 < share < 1"),
    "shift": AMOUNT,
    "rotate": AMOUNT,
    "zoom": AMOUNT,
    "flip": YES_NO,
    "mix": Kind(lambda v: is_number(v) and 0 <= v <= 1, "0 to 1"),
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}


@dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """How a student is trained; the same for guided sets and their unguided controls.

    arch, arch_args: a built-in network (`dfkd/nets.py`) and its arguments; steps of batch_size images; learning_rate
    with cosine decay after warmup_steps; temperature of the KL; held_out: share of the set kept for the agreement
    curve; shift, rotate (radians), zoom: reach of the affine augmentation; mix: share of batches blended with a
    shuffled copy (arXiv 1710.09412), the teacher labels the blend.
    """

    arch: str = "resnet"
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    warmup_steps: int = 50
    temperature: float = 4.0
    held_out: float = 0.1
    shift: float = 0.1
    rotate: float = 0.2
    zoom: float = 0.1
    flip: bool = False
    mix: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range; 4 and 4.0 are one temperature."""
        check_fields("distill", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)
        for f in fields(self):
            if f.type is float:
                object.__setattr__(self, f.name, float(getattr(self, f.name)))


def spec_from(data: Any, where: str, base: DistillSpec | None = None) -> DistillSpec:
    """A DistillSpec from plain values on top of `base` (the defaults).

    Raises SynthkdError that begins with `where` for a field it does not have, of the wrong type or out of range.
    """
    check_value(where, data, TABLE)
    check_fields(where, data, _KINDS)
    return replace(base or DistillSpec(), **data)


@dataclass(frozen=True)
class Student:
    """A trained network with its preprocessing, and its training log."""

    net: Teacher
    log: list[dict[str, float | None]]
    agreement: float


def affine(x: Tensor, spec: DistillSpec, generator: torch.Generator) -> Tensor:
    """Random shift, rotation and zoom of images [B,3,H,W]; the border repeats outwards (no black edges)."""
    draw = torch.rand(4, len(x), generator=generator).mul(2).sub(1).to(x.device)
    angle, scale = draw[0] * spec.rotate, 1 + spec.zoom * draw[1]
    c, s = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = (torch.stack([c, -s, draw[2] * 2 * spec.shift], 1), torch.stack([s, c, draw[3] * 2 * spec.shift], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    out = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if spec.flip:
        mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
        out = torch.where(mirrored.view(-1, 1, 1, 1), out.flip(3), out)
    return out


def blend(x: Tensor, spec: DistillSpec, generator: torch.Generator) -> Tensor:
    """With probability `mix`, a convex blend of the batch with a shuffled copy of itself."""
    if float(torch.rand((), generator=generator)) >= spec.mix:
        return x
    share = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
    return share * x + (1 - share) * x[torch.randperm(len(x), generator=generator).to(x.device)]


def learning_rate(spec: DistillSpec, step: int) -> float:
    """Linear warm-up, then half a cosine to zero (arXiv 1608.03983, eq. 5)."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    share = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def distill(
    data: LabelledImages, teacher: Teacher, spec: DistillSpec, on_step: Callable[[int], None] = lambda _: None
) -> Student:
    """Train a fresh student on synthetic images [0,1] under the teacher's outputs; the log has a row every 25 steps.

    Previews are trained on like any image; agreement is measured on finished images alone.

    on_step is called with the number of finished steps. Raises SynthkdError for a set too small to split, for an arch
    that does not take the teacher's images, and for a loss that is not finite.
    """
    kept, held = data.held_out(spec.held_out)
    if len(kept) < 2:
        raise SynthkdError(f"distill: the set has {len(data)} images; expected at least 4")
    device = teacher.get_buffer("mean").device
    generator = torch.Generator().manual_seed(spec.seed)
    torch.manual_seed(spec.seed)
    net = build_net(spec.arch, len(teacher.classes), spec.arch_args).to(device)
    student = Teacher(
        net,
        mean=teacher.get_buffer("mean").flatten().tolist(),
        std=teacher.get_buffer("std").flatten().tolist(),
        input_size=teacher.input_size,
        classes=teacher.classes,
    ).to(device)
    _try_out(student, spec)
    log: list[dict[str, float | None]] = []
    _fit(student, teacher, kept.to(device), held, spec, generator, log, on_step)
    return Student(student, log, float(log[-1]["agreement"] or 0.0))


def _try_out(student: Teacher, spec: DistillSpec) -> None:
    """One forward pass on a black image: raises SynthkdError where the network does not take it."""
    try:
        with torch.no_grad():
            student(torch.zeros(1, 3, *student.input_size, device=student.get_buffer("mean").device))
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        size, reason = "x".join(map(str, (3, *student.input_size))), " ".join(str(error).split())[:160]
        raise SynthkdError(f"distill: arch {spec.arch!r} does not take {size} images ({reason})") from error


def _fit(
    student: Teacher,
    teacher: Teacher,
    images: Tensor,
    held: Tensor,
    spec: DistillSpec,
    generator: torch.Generator,
    log: list[dict[str, float | None]],
    on_step: Callable[[int], None],
) -> None:
    net, held_teacher = student.net.requires_grad_(True).train(), predict(teacher, held).argmax(dim=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        if len(order) < min(spec.batch_size, len(images)):
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        pick, order = order[: spec.batch_size].to(images.device), order[spec.batch_size :]
        x = blend(affine(images[pick].float() / 255, spec, generator), spec, generator)
        with torch.no_grad():
            wanted = teacher(x)
        loss = kd_loss(net(student.preprocess(x)), wanted, spec.temperature)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == spec.steps:
            last = step + 1 == spec.steps or (step + 1) % 100 == 0
            agreement = _agreement(student, held, held_teacher) if last else None
            log.append(_row(step + 1, loss, learning_rate(spec, step), agreement))
        on_step(step + 1)
    student.net.eval().requires_grad_(False)


def _row(step: int, loss: Tensor, rate: float, agreement: float | None) -> dict[str, float | None]:
    value = loss.item()
    if not math.isfinite(value):
        raise SynthkdError(f"distill: the loss is {value} at step {step}; lower learning_rate")
    return {"step": step, "loss": round(value, 6), "lr": round(rate, 8), "agreement": agreement}


def _agreement(student: Teacher, held: Tensor, wanted: Tensor) -> float:
    student.net.eval()
    same = (predict(student, held).argmax(dim=1) == wanted).float().mean().item()
    student.net.train()
    return round(100 * same, 3)


def save_student(student: Student, spec: DistillSpec, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write student.safetensors, its card student.toml (loads like a teacher's), student.md and student_log.jsonl.

    about: short texts for the model card. Returns the card's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in student.net.net.state_dict().items()}
    fresh = folder / "student.safetensors.tmp"
    save_file(state, fresh, metadata={"card": json.dumps(_card(student, spec, about))})
    fresh.replace(folder / "student.safetensors")
    write_atomically(folder / "student.toml", _toml(_card(student, spec, about)))
    write_atomically(folder / "student_log.jsonl", "".join(json.dumps(row) + "\n" for row in student.log))
    write_atomically(folder / "student.md", _model_card(student, spec, about))
    return folder / "student.toml"


def _card(student: Student, spec: DistillSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    net = student.net
    return {
        "arch": spec.arch,
        "weights": "student.safetensors",
        "input_size": list(net.input_size),
        "mean": net.get_buffer("mean").flatten().tolist(),
        "std": net.get_buffer("std").flatten().tolist(),
        "classes": list(net.classes),
        "arch_args": dict(spec.arch_args),
        "about": dict(about),
    }


def _toml(card: Mapping[str, Any]) -> str:
    """A card as TOML; JSON's strings, numbers and arrays are TOML's."""
    top = [f"{k} = {json.dumps(v)}" for k, v in card.items() if not isinstance(v, Mapping)]
    for name, table in card.items():
        if isinstance(table, Mapping):
            top += ["", f"[{name}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(top) + "\n"


def _model_card(student: Student, spec: DistillSpec, about: Mapping[str, Any]) -> str:
    lines = [
        "# Student model card",
        "",
        "Trained by synthkd on synthetic images only: no image of the teacher's training set was used.",
        "",
        f"- Parameters: {count_parameters(student.net.net):,}",
        f"- Input: {student.net.input_size[0]}x{student.net.input_size[1]} RGB in [0,1], normalised as in student.toml",
        f"- Classes: {', '.join(student.net.classes)}",
        f"- Agreement with the teacher on held-out synthetic images: {student.agreement:.1f} %",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "## Training",
        "",
        *(f"- {name}: {value}" for name, value in asdict(spec).items()),
        "",
        'Load it: `from synthkd.dfkd import load_teacher; net = load_teacher("student.toml")`.',
    ]
    return "\n".join(lines) + "\n"
