"""The memory planner: plans under made-up costs, costs counted by hand, and a checkpointed decoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from synthkd.engine import GuidanceSpec, SynthkdError, memory
from synthkd.engine.checkpointing import blocks, checkpointed
from synthkd.engine.decoders import VaeDecoder
from synthkd.engine.memory import Cost, Costs, MemoryPlan, Passes, choose_plan, measure, peak_bytes, plan_memory


def costs(checkpointed: int | None = 20, **changes: Any) -> Costs:
    """A sample costs 10 to denoise, 100 to guide and 30 to decode; passes have 5 of their own."""
    fields: dict[str, Any] = {"denoise": Cost(5, 10), "guide": Cost(5, 100), "decode": Cost(5, 30)}
    again = None if checkpointed is None else lambda: Cost(5, checkpointed)
    return Costs(**{**fields, "guide_checkpointed": again, **changes})


@pytest.mark.parametrize(
    ("group", "free", "picked"),
    [  # denoise, guide, decode, checkpoint, needed
        (40, 4005, (40, 40, 40, False, 4005)),
        (40, 4004, (40, 20, 40, False, 2005)),  # 39 fit: two equal parts
        (40, 2004, (40, 10, 40, False, 1205)),  # 19 fit: a divisor above half of that
        (40, 1204, (40, 10, 20, False, 1005)),
        (40, 404, (20, 2, 10, False, 305)),  # 3 fit
        (40, 105, (10, 1, 2, False, 105)),
        (40, 104, (8, 4, 2, True, 85)),
        (40, 35, (2, 1, 1, True, 35)),
        (15, 1504, (15, 8, 15, False, 805)),  # 14 fit, the best divisor is 5
        (7, 705, (7, 7, 7, False, 705)),
        (7, 704, (7, 4, 7, False, 405)),  # a prime group: 6 fit, two parts of 4 and 3
        (7, 305, (7, 3, 7, False, 305)),
        (7, 205, (7, 2, 4, False, 205)),
        (1, 105, (1, 1, 1, False, 105)),
        (1, 104, (1, 1, 1, True, 35)),
    ],
)
def test_the_largest_parts_that_fit(group: int, free: int, picked: tuple[int, int, int, bool, int]) -> None:
    plan = choose_plan(costs(), group, free)
    assert plan == MemoryPlan(group, *picked, free)
    assert plan.whole == (plan.guide == group and not plan.checkpoint)


@pytest.mark.parametrize(
    ("free", "splits", "made_up", "says"),
    [
        (34, True, costs(), "final decoder needs 0.0 MiB for 1 of a group's 40 images of 8x8"),
        (24, True, costs(), "guidance needs"),
        (14, True, costs(), "denoiser needs"),
        (104, True, costs(None), "guidance needs 0.0 MiB for 1 of a group's 40"),
        (804, False, costs(), "guidance needs 0.0 MiB for 40 of a group's 40"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(free: int, splits: bool, made_up: Costs, says: str) -> None:
    with pytest.raises(SynthkdError, match="is free; ") as error:
        choose_plan(made_up, 40, free, splits, "8x8")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_guidance_that_cannot_be_taken_in_parts_is_checkpointed_whole() -> None:
    assert choose_plan(costs(), 40, 805, splits=False) == MemoryPlan(40, 40, 40, 20, True, 805, 805)


def test_what_waits_and_what_is_held_counts() -> None:
    """A finished image is 20 of the 30 of its decoding; the group's latents take 3 a sample."""
    made_up = costs(image=20, held=Cost(0, 3))
    assert choose_plan(made_up, 10, 265) == MemoryPlan(10, 10, 2, 2, False, 255, 265)


def test_a_plan_says_itself() -> None:
    plan = MemoryPlan(40, 20, 4, 10, True, 3 * 2**30, 5 * 2**29)
    assert plan.describe() == (
        "memory: of groups of 40 at once: denoiser 20, guidance 4 in two passes (decoder and loss forward once more) "
        "with a checkpointed decoder (its forward once more), final decoder 10; needs 3.00 GiB, 2.50 GiB free"
    )
    assert MemoryPlan(7, 7, 7, 7, False, 2**20, 2**30).describe() == (
        "memory: groups of 7 whole; needs 1.0 MiB, 1.00 GiB free"
    )


class _Net(nn.Module):
    """A latent [B,1,4,4] -> three channels, by one product and three sigmoids."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = (z * self.weight).sigmoid().sigmoid().sigmoid()
        return out


def _passes(**changes: Any) -> Passes:
    fields: dict[str, Any] = {
        "denoise": lambda z: z * 2, "decode": _Net(), "shape": (1, 4, 4), "classes": 2, "dtype": torch.float32,
        "device": torch.device("cpu"), "look": _Net(), "loss": lambda images, targets: images.sum(),
    }  # fmt: skip
    return Passes(**{**fields, **changes})


def test_costs_agree_with_a_count_by_hand() -> None:
    latent, image = 16 * 4, 3 * 16 * 4
    found = measure(_passes())
    assert found.denoise == Cost(0, 2 * latent)
    assert found.decode == Cost(0, latent + 2 * image)  # input and output of one operation, and the latent
    with FakeTensorMode(allow_non_fake_inputs=True):
        z, net = torch.empty(1, 1, 4, 4, requires_grad=True), _Net()
        assert peak_bytes(lambda: net(z)) == 3 * image  # the product is gone when the third is made
    # three sigmoids and their clamped image, the sum's gradient (a view) times the clamp's mask, and the next two
    assert found.guide.fixed < 20
    assert 4 * image <= found.guide.each <= latent + 8 * image
    assert (found.held.each, found.image) == (8 * latent, image)
    through = measure(_passes(denoise=torch.sigmoid, through=True))  # its output is kept, and z added to it
    assert latent <= through.guide.each - found.guide.each <= 3 * latent


def test_views_and_weights_hold_nothing() -> None:
    weight = torch.ones(64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 64)
        assert peak_bytes(lambda: (x @ weight.t()).view(8, 8).t()) == 64 * 4


def test_a_real_step_is_measured_and_whole(synthesizer: Callable[..., Any]) -> None:
    """The engine's own passes; their tensors are counted, and none is made."""
    synth = synthesizer(guidance=GuidanceSpec(scale=0.2))
    assert synth.guidance is not None
    passes = Passes(
        denoise=lambda z: z,
        decode=synth.model.decoder,
        look=synth.model.decoder,
        loss=lambda images, targets: synth.guidance(images, targets)[0],
        shape=(4, 8, 8), classes=3, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    plan = plan_memory(passes, 6, free=2**30)
    assert plan.whole
    assert 2**16 < plan.needed < 2**26
    half = plan_memory(passes, 6, free=int(0.7 * plan.needed))
    assert (half.guide, half.checkpoint) == (3, False)


def test_what_cannot_be_measured_is_drawn_whole() -> None:
    plan = plan_memory(_passes(loss=lambda images, targets: images.sum() * images.sum().item()), 6, free=1)
    assert plan.whole
    assert "not measured" in plan.describe()


def test_free_memory_is_shared_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.free_memory(torch.device("cpu")) is None
    assert plan_memory(_passes(), 6).describe() == (
        "memory: groups of 6 whole; the system does not say how much is free"
    )
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    1000 kB\n")
    assert memory.free_memory(torch.device("cpu"), workers=3) == 307_200  # 1000 KiB, less a tenth, by three


@pytest.fixture
def decoders(build: Any) -> dict[str, Any]:
    """A full and a tiny decoder in float64, the full one left in training mode."""
    torch.manual_seed(0)
    nets = {"full": build.autoencoder(block_out_channels=(8, 16)), "tiny": build.tiny_autoencoder()}
    nets["full"].double().train()
    for dropout in (m for m in nets["full"].modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.5
    return {name: VaeDecoder(net.double().requires_grad_(False), 0.7) for name, net in nets.items()}


@pytest.mark.parametrize(("name", "share"), [("full", 0.85), ("tiny", 1.0)])
def test_a_checkpointed_decoder_has_the_plain_ones_gradient(
    decoders: dict[str, Any], name: str, share: float
) -> None:
    """And asks for less memory; a tiny one of a single block a level little less."""
    decode = decoders[name]
    again = checkpointed(decode)
    z = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    plain, images = decode(z), again(z)
    weight = torch.randn_like(plain)
    wanted, found = (torch.autograd.grad((out * weight).sum(), z)[0] for out in (plain, images))
    assert torch.equal(images, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert not any("forward" in vars(m) for m in decode.module.modules())
    with FakeTensorMode(allow_non_fake_inputs=True):
        latents = torch.empty(2, 4, 64, 64, dtype=torch.float64, requires_grad=True)
        peaks = [peak_bytes(lambda d=d: torch.autograd.grad(d(latents).sum(), latents)) for d in (decode, again)]
    assert peaks[1] < share * peaks[0]


def test_blocks_cover_what_is_large(decoders: dict[str, Any]) -> None:
    names = [type(b).__name__ for b in blocks(decoders["full"].module.decoder)]
    assert names.count("ResnetBlock2D") == 6
    assert {"Attention", "Upsample2D"} <= set(names)
    assert blocks(nn.Conv2d(3, 3, 1)) == []
