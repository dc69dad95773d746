"""`build`: a function and example inputs -> a callable of another backend, from the store where it was built before."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from synthkd.export import aoti, onnx, tensorrt
from synthkd.export.artifacts import (
    Manifest,
    Slot,
    check_maker,
    default_store,
    described,
    differences,
    processor,
    read_manifest,
    state_of,
    versions_for,
    weights_sha256,
)
from synthkd.export.errors import ExportError, suggest
from synthkd.export.gradient import exported_gradient
from synthkd.export.graph import Call, call_of, exported, first_line, resized
from synthkd.export.making import Build, Run, compare, judge, loaded, opset_of, outputs_of
from synthkd.export.spec import BACKENDS, Options, Signature, TensorSpec
from synthkd.export.structure import built

_log = logging.getLogger("synthkd")


class Compiled:
    """A function in another backend; called like the function, with tensors of any batch that it was built for.

    A larger batch is cut into runs, and where the batch is fixed a smaller one is filled up, if every output is one of
    samples and no gradient was taken inside (that of a mean, say, knows the batch); otherwise ExportError.
    manifest: None for eager and compile, which leave nothing behind.
    """

    def __init__(
        self, call: Call, signature: Signature, structure: Any, run: Run, manifest: Manifest | None, samples: bool
    ) -> None:
        """run: flat tensors in, flat tensors out; structure: see `structure_of`; samples: they stand alone."""
        self.signature, self.manifest = signature, manifest
        self._call, self._structure, self._run = call, structure, run
        self.samples = samples and all(spec.batched for spec in signature.outputs)

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        tensors = self._call.flat(args)
        batch = self._checked(tensors)
        return built(self._structure, iter(self.flat(tensors, batch)))

    def flat(self, tensors: list[Tensor], batch: int) -> Sequence[Tensor]:
        """The same for tensors one by one, which are known to fit."""
        most = self.signature.most if self.signature.dynamic else self.signature.batch
        if batch == most or (self.signature.dynamic and batch < most):
            return self._run(tensors)
        if not self.samples:
            raise ExportError(
                f"a batch of {batch}; built for {'at most ' if self.signature.dynamic else ''}{most}, and what it "
                "returns belongs to the whole batch"
            )
        runs = [self._part(tensors, start, min(start + most, batch), most) for start in range(0, batch, most)]
        return [torch.cat(parts) for parts in zip(*runs, strict=True)]

    def _part(self, tensors: list[Tensor], start: int, stop: int, most: int) -> list[Tensor]:
        size = stop - start if self.signature.dynamic else most
        rows = zip(tensors, self.signature.inputs, strict=True)
        given = [resized(x[start:stop], size) if spec.batched else x for x, spec in rows]
        return [x[: stop - start] for x in self._run(given)]

    def _checked(self, tensors: list[Tensor]) -> int:
        """The batch of a call; raises ExportError for a tensor of another shape or dtype than it was built for."""
        found: int | None = None
        for x, spec, example in zip(tensors, self.signature.inputs, self._call.tensors, strict=True):
            if x.device != example.device:
                raise ExportError(f"{spec.name} lies on {x.device}; built for {example.device}")
            batch = len(x) if spec.batched and x.dim() else self.signature.batch
            if tuple(x.shape) != spec.at(batch) or x.dtype != spec.dtype:
                want = ["B", *spec.shape[1:]] if spec.batched else list(spec.shape)
                raise ExportError(f"{spec.name} is {x.dtype} {list(x.shape)}; built for {spec.dtype} {want}")
            if spec.batched and found not in (None, batch):
                raise ExportError(f"{spec.name} has a batch of {batch}, an input before it one of {found}")
            found = batch if spec.batched else found
        if found == 0:
            raise ExportError("an empty batch; expected at least one sample")
        return found or self.signature.batch


def build(
    function: Callable[..., Any],
    example_inputs: Sequence[Any],
    *,
    backend: str = "onnx",
    modules: Iterable[nn.Module] | None = None,
    batched: Sequence[bool] | None = None,
    dynamic: bool = True,
    most: int = 0,
    gradient: bool = False,
    traced: bool = False,
    name: str = "module",
    identity: Mapping[str, Any] | None = None,
    store: Path | None = None,
    options: Options | None = None,
    trust: bool = False,
    tolerance: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Compiled:
    """A function (an nn.Module, or anything that calls some) as a callable of another backend.

    >>> compiled = build(vae_decoder, (latents,), backend="onnx")
    >>> images = compiled(latents)

    example_inputs: its arguments, tensors in tuples, lists and dicts, at the batch that it shall be fastest at;
    backend: one of BACKENDS; modules: the networks that a plain function calls, whose weights go along;
    batched: per argument, whether dimension 0 of its tensors is the batch (all of them by default; a 0-d tensor has
    none); dynamic: any batch from 1 to `most` (0: twice the example's), else the example's alone;
    gradient: the function calls torch.autograd.grad inside: it becomes a graph of forward operators;
    traced: `compile` takes a graph of the function, for one that Dynamo cannot follow;
    name: a word for the artifact's folder; identity: plain values that decide what it computes beside weights and
    shapes (settings in closures, say); store: where artifacts are kept (`default_store()`); trust: load machine code
    that somebody else made; tolerance: largest relative difference from eager, by dtype if None; say: told each stage.
    Raises ExportError, one line, for wrong arguments, a missing package, a graph that cannot be built, a result that
    differs from eager by more than the tolerance, and machine code from elsewhere.
    """
    if backend not in BACKENDS:
        raise ExportError(f"backend {backend!r}: {suggest(backend, BACKENDS)}")
    if not re.fullmatch(r"[\w-]+", name):
        raise ExportError(f"name {name!r}: expected letters, digits, '-' and '_'")
    call = call_of(function, example_inputs, modules, batched)
    chosen, say = options or Options(), say or _log.debug
    most = max(most or 2 * call.batch, call.batch)
    if backend in ("eager", "compile"):
        return _live(call, backend, chosen, dynamic, most, gradient, traced)
    device = call.tensors[0].device
    _check_possible(backend, chosen, device, dynamic)
    parts = _parts(call, backend, device, chosen, dynamic, most, gradient, identity or {})
    slot = Slot(store or default_store(), name, backend, parts)
    manifest = slot.found(trust)  # without the lock: a store that cannot be written can be read
    if manifest is None:
        plan = partial(Build, call, slot, device, chosen, dynamic, most, gradient, tolerance, say)
        manifest = _made(slot, plan, trust)
    signature = _signature(call, manifest)
    run = loaded(slot.folder, backend, signature, chosen, device)
    return Compiled(call, signature, manifest.structure, run, manifest, manifest.samples)


def _made(slot: Slot, plan: Callable[[], Build], trust: bool) -> Manifest:
    """Built now, unless another process has done so while this one waited for the lock."""
    with slot.locked():
        if (manifest := slot.found(trust)) is not None:
            return manifest
        why, making = slot.why_new(), plan()
        making.say(f"building {slot.name} for {slot.backend}" + (f" ({why})" if why else ""))
        try:
            return making.made(Compiled)
        except OSError as error:
            raise ExportError(f"artifacts folder {slot.store}: cannot be written ({error})") from error


def available() -> dict[str, str]:
    """Each backend, and why it cannot be used here; "" for one that can."""
    found = dict.fromkeys(BACKENDS, "")
    try:
        onnx.check_installed()
    except ExportError as error:
        found["onnx"] = str(error)
    found["aoti"] = aoti.unavailable()
    found["tensorrt"] = tensorrt.unavailable() or found["onnx"]
    return found


def _live(
    call: Call, backend: str, options: Options, dynamic: bool, most: int, gradient: bool, traced: bool
) -> Compiled:
    """Eager, and torch.compile, whose graphs torch itself keeps on disk."""
    outputs, structure, samples = outputs_of(call)
    samples = samples and not gradient
    signature = Signature(inputs=call.inputs(), outputs=outputs, batch=call.batch, most=most, dynamic=dynamic)
    if backend == "eager":
        return Compiled(call, signature, structure, lambda tensors: call.run(*tensors), None, samples)
    run: Any = call.run
    if gradient or traced:
        run = (exported_gradient if gradient else exported)(call, dynamic).module()
    mode = None if options.mode == "default" else options.mode
    compiled: Any = torch.compile(run, fullgraph=True, dynamic=None if dynamic else False, mode=mode)

    def running(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        for x, batched in zip(tensors, call.batched, strict=True):
            if dynamic and batched and len(x) > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)  # the batch alone: all else stays a number
        try:
            with torch.no_grad():
                out: Sequence[Tensor] = compiled(*tensors)
        except TorchDynamoException as error:  # a compiler's own failures are among them
            raise ExportError(f"compile: the function cannot be made one graph ({first_line(error)})") from error
        return [x.clone() for x in out] if mode else out  # a replay writes over what the one before returned

    if gradient:  # of our own operators, so compared here as an artifact is when it is built
        judge(f"the gradient for {backend}", {"the example": compare(call, running, call.tensors)}, call)
    return Compiled(call, signature, structure, running, None, samples)


def _check_possible(backend: str, options: Options, device: torch.device, dynamic: bool) -> None:
    """Refuse now what would fail after minutes: a missing package, a place or a batch that the backend cannot have."""
    if backend == "aoti" and (why_not := aoti.unavailable()):
        raise ExportError(why_not)
    if backend == "onnx":
        onnx.pick_provider(options, device)
    if backend == "tensorrt":
        onnx.check_installed()
        if why_not := tensorrt.unavailable(device):
            raise ExportError(why_not)
    if options.cuda_graph and dynamic:
        raise ExportError("cuda_graph: a recorded run has one batch; pass dynamic=False")


def _parts(
    call: Call, backend: str, device: torch.device, options: Options, dynamic: bool, most: int, gradient: bool,
    identity: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All that the key knows."""
    return {
        "weights": weights_sha256(call.modules),
        "networks": described([[repr(m) for m in call.modules], state_of(call.modules)]),
        "identity": json.loads(json.dumps(dict(identity), default=str)),
        "call": call.identity(),
        "threads": torch.get_num_threads() if backend == "aoti" and device.type == "cpu" else 0,
        "inputs": [spec.to_dict() for spec in call.inputs()],
        "dynamic": dynamic,
        "most": most if dynamic else call.batch,
        "gradient": gradient,
        "options": {**options.to_dict(), "opset": opset_of(options, backend, device)},
        "versions": _versions(backend),
        "processor": processor(device),
    }


def _versions(backend: str) -> dict[str, str]:
    """TensorRT's distribution has several names, so it is asked itself."""
    own = {"tensorrt": tensorrt.version()} if backend == "tensorrt" else {}
    return versions_for(backend) | own


def _signature(call: Call, manifest: Manifest) -> Signature:
    told = manifest.signature
    outputs = tuple(
        TensorSpec(o["name"], tuple(o["shape"]), getattr(torch, o["dtype"].removeprefix("torch.")), o["batched"])
        for o in told["outputs"]
    )
    return Signature(
        inputs=call.inputs(), outputs=outputs, batch=told["batch"], most=told["most"], dynamic=told["dynamic"]
    )


def load(
    folder: Path, function: Callable[..., Any], example_inputs: Sequence[Any], *, trust: bool = False,
    batched: Sequence[bool] | None = None, options: Options | None = None,
) -> Compiled:  # fmt: skip
    """An artifact from its folder, for arguments like the example's; nothing is built, the function is not run.

    Raises ExportError with the reason where it is damaged, was made for another processor or other library versions
    or tensors, or holds machine code that this user has not made.
    """
    manifest, why_not = read_manifest(folder)
    if manifest is None or why_not:
        raise ExportError(f"artifact {folder}: {why_not}")
    call = call_of(function, example_inputs, None, batched)
    device = call.tensors[0].device
    now = {"versions": _versions(manifest.backend), "processor": processor(device)}
    stale = differences({name: manifest.parts.get(name) for name in now}, now)
    if stale:
        raise ExportError(f"artifact {folder}: made for something else ({stale[0]}); build it anew")
    have = [(i["name"], i["dtype"]) for i in manifest.signature["inputs"]]
    want = [(spec.name, str(spec.dtype)) for spec in call.inputs()]
    if have != want:
        raise ExportError(f"artifact {folder}: takes {have}; the example has {want}")
    check_maker(folder, manifest, trust)
    signature = _signature(call, manifest)
    run = loaded(folder, manifest.backend, signature, options or Options(), device)
    return Compiled(call, signature, manifest.structure, run, manifest, manifest.samples)
