"""Counts the arithmetic of drawing on the traced graph: on meta tensors nothing is computed, and no weight is needed.

A network's FLOPs are those of its convolutions, matrix products and attention, two per multiply-add; ops of this
project count by the formulas that they register. Elementwise work counts nothing.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from synthkd.bench.as_published import AsPublished
from synthkd.engine import CutMixSpec, Request, Synthesizer, SynthkdError
from synthkd.engine.clock import StageClock
from synthkd.engine.latent_model import Prompted
from synthkd.engine.plan import Plan
from synthkd.engine.sampler import sample

_MATHS = ("mm", "conv", "attention", "dot", "einsum", "fft")  # what an op that must have a formula is named after

Drawer = Synthesizer | AsPublished


def graph_flops(graph: fx.GraphModule) -> int:
    """Sum over the calls in a graph of make_fx, each by its op's formula and the values noted at the nodes.

    Raises SynthkdError for an op of this project, or one that is named after maths, without a formula.
    """
    return sum(_node_flops(graph, node) for node in graph.graph.nodes if node.op == "call_function")


def _node_flops(graph: fx.GraphModule, node: fx.Node) -> int:
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return 0
    formula = flop_registry.get(packet)
    if formula is None:
        _refuse_unknown(str(packet))
        return 0

    def value(x: fx.Node) -> Any:
        return _attribute(graph, str(x.target)) if x.op == "get_attr" else x.meta["val"]

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _attribute(graph: fx.GraphModule, path: str) -> Any:
    found: Any = graph
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _refuse_unknown(name: str) -> None:
    own, (_, _, short) = name.startswith("synthkd."), name.rpartition(".")
    if own or any(part in _MATHS for part in short.split("_")) or short.startswith("conv"):
        raise SynthkdError(f"flops: {name} has no formula; register one with torch.utils.flop_counter")


def count(function: Callable[..., Any], *args: Tensor) -> int:
    """FLOPs of function(*args), gradients taken inside it included; args may be on the meta device."""
    with torch.no_grad():
        # fake inputs: one mode for all nodes, where real ones would make a mode for each
        return graph_flops(make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*args))


def count_step(drawer: Drawer, *, guided: bool, cfg: bool, batch: int = 1) -> int:
    """FLOPs of one denoiser call with all that follows it, per image.

    drawer: over a prior on the meta device. guided: a call inside the guidance's interval (as-published guides all);
    cfg: with the unconditional half.
    """
    one = _one_step(drawer, guided, cfg, batch)
    synth = one.synth if isinstance(one, AsPublished) else one
    unit = Plan(synth.recipe, Request(num_samples=batch)).unit(0)
    clock, scales = StageClock(synth.model.device), (synth.recipe.guidance_scale, synth.recipe.guidance_rescale)
    denoise = Prompted(synth.model, *synth._conditions(synth.prompts(unit, 0)))  # not counted: kept for each prompt
    steer = synth._steering(unit, 0, 0)

    def run(z: Tensor) -> Tensor:
        if isinstance(one, AsPublished):
            return one.latents(z, denoise, steer, clock)
        return sample(z, denoise, synth._tables, scales, steer, clock).latents

    with _ready(synth):
        return count(run, synth.initial_latents(unit.ids, 0)) // batch


def _one_step(drawer: Drawer, guided: bool, cfg: bool, batch: int) -> Drawer:
    """The same over a recipe of one call."""
    synth = drawer.synth if isinstance(drawer, AsPublished) else drawer
    recipe = synth.recipe
    spec = replace(recipe.guidance, start=0.0, stop=1.0, every=1, scale=recipe.guidance.scale if guided else 0.0)
    if guided and spec.scale == 0:
        raise SynthkdError("flops: guidance.scale is 0, so no call is guided")
    changed = replace(
        recipe, steps=1, guidance=spec, cutmix=CutMixSpec(), classes_per_group=1, samples_per_class=batch, previews=(),
        rounds=1, groups_per_round=0, cfg_start=0.0, cfg_stop=1.0 if cfg else 0.0,
    )  # fmt: skip
    one = Synthesizer(synth.model, changed, synth.guidance, synth.look, "off", "off", micro_batch=batch)
    return AsPublished(one) if isinstance(drawer, AsPublished) else one


def _ready(synth: Synthesizer) -> ExitStack:
    """Networks frozen and tapped, as while a group is drawn."""
    stack = ExitStack()
    synth._settle(stack)
    return stack


def count_decode(synth: Synthesizer) -> int:
    """FLOPs of the final decode, per image."""
    z = torch.empty(1, *synth._shape, device="meta", dtype=synth.model.dtype)
    with _ready(synth):
        return count(synth.model.decoder, z)


def count_run(drawer: Drawer) -> int:
    """FLOPs of an image: every call of the recipe by its kind, and the final decode."""
    synth = drawer.synth if isinstance(drawer, AsPublished) else drawer
    recipe, published = synth.recipe, isinstance(drawer, AsPublished)
    kinds = [
        (published or (synth.guidance is not None and recipe.guidance.active(i, recipe.steps)), recipe.cfg_active(i))
        for i in range(recipe.steps)
    ]
    costs = {kind: count_step(drawer, guided=kind[0], cfg=kind[1]) for kind in set(kinds)}
    return sum(costs[kind] for kind in kinds) + count_decode(synth)
