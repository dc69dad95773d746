"""Activation regions: that a student looks where its teacher does (CAM and Grad-CAM consistency).

mSARC of SpaceshipNet (Yu, Chen, Han and Jiang, CVPR 2023), which DiffDFKD's paper (arXiv 2504.00870) takes over. Its
published code fixes what a name leaves open, and is followed here: CAM at the deepest stage, Grad-CAM at all earlier
ones; no ReLU and no normalisation of a map; mean squared errors, each weighed 1 and summed over stages. The KL there is
a mean over batch and classes; beside `kd_loss`, which sums over the K classes, equal shares mean weights of K, not 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.dfkd.losses import wide
from synthkd.dfkd.stages import Stages, paired
from synthkd.engine.errors import SynthkdError

_ALONE = "grad_cam: the networks have one stage in common, which is cam's; set grad_cam to 0"


def check_cam(student: Stages, teacher: Stages, heads: Sequence[Tensor]) -> None:
    """Raise SynthkdError where a classifier does not read its network's deepest maps; heads: student's, teacher's."""
    for stages, head in zip((student, teacher), heads, strict=True):
        class_activation(torch.zeros(1, stages.channels[-1], *stages.sizes[-1]), head.detach().cpu())


def check_grad_cam(student: Stages, teacher: Stages) -> None:
    """Raise SynthkdError where the networks have no stage in common but the deepest."""
    if len(paired(student.names, teacher.names)) < 2:
        raise SynthkdError(_ALONE)


def class_activation(maps: Tensor, head_weight: Tensor, classes: Tensor | None = None) -> Tensor:
    """Class activation maps M_k(y,x) = sum_c w_kc f_c(y,x) (arXiv 1512.04150, eq. 2), float32 at least.

    maps: f, [B,C,h,w], what the classifier pools; head_weight: w, [K,C] of the linear layer behind the pooling, or
    [K,C*h*w] of one behind a flattening: then M_k(y,x) = h w sum_c w_kcyx f_c(y,x). Either way the mean of M_k is the
    logit without its bias. Returns [B,K,h,w], or [B,1,h,w] of one class each for classes int64 [B].
    Raises SynthkdError where the layer reads something else.
    """
    f = wide(maps)
    w = head_weight.to(f.dtype)
    channels, height, width = f.shape[1:]
    if w.shape[1] == channels:
        w = w[:, :, None, None]
    elif w.shape[1] == channels * height * width:
        w = w.view(-1, channels, height, width) * (height * width)
    else:
        raise SynthkdError(
            f"cam: the classifier reads {w.shape[1]} values, the deepest maps are [{channels},{height},{width}]; it "
            "must read them pooled or flattened (set cam to 0)"
        )
    if classes is not None:
        return (w[classes] * f).sum(dim=1, keepdim=True)
    if w.shape[2:] == (1, 1):
        return F.conv2d(f, w)
    return torch.einsum("kcyx,bcyx->bkyx", w, f)


def cam_consistency(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    student_head_weight: Tensor,
    teacher_head_weight: Tensor,
    classes: Tensor | None = None,
    *,
    train_head: bool = False,
) -> Tensor:
    """Mean squared difference of both networks' class activation maps at the deepest stage, a scalar.

    student_maps, teacher_maps: [B,C,h,w] of stages, the deepest last; head weights: see `class_activation`. All K
    classes are compared, as in the published code; classes int64 [B] leaves one per sample. The student's are resized
    (bilinear) to the teacher's size where it differs (there it never does). train_head: let the gradient reach the
    student's head too; in the published code the head is copied and learns nothing from this term.
    """
    head = student_head_weight if train_head else student_head_weight.detach()
    found = class_activation(student_maps[-1], head, classes)
    wanted = class_activation(teacher_maps[-1], teacher_head_weight, classes).detach()
    return _mean_square(found, wanted)


def gradient_activation(maps: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """Grad-CAM without its ReLU, as mSARC has it, per stage [B,h,w]: sum_c a_c f_c (arXiv 1610.02391, eq. 1 and 2).

    maps: f, [B,C,h,w]; slopes: the gradients of a class's logit in them; a_c: their mean over positions.
    """
    return [
        (wide(g).mean(dim=(2, 3), keepdim=True) * wide(f)).sum(dim=1) for f, g in zip(maps, slopes, strict=True)
    ]


def slopes_of(logits: Tensor, maps: Sequence[Tensor], classes: Tensor, *, twice: bool = False) -> list[Tensor]:
    """Gradients of each sample's logit of its class in maps of its pass, constant unless `twice`.

    logits: [B,K] before softmax; maps: [B,C,h,w]; classes: int64 [B]. torch.compile traces it only where
    torch._dynamo.config.trace_autograd_ops is on.
    """
    chosen = logits.gather(1, classes[:, None]).sum()
    found = torch.autograd.grad(chosen, list(maps), retain_graph=True, create_graph=twice)
    return list(found) if twice else [g.detach() for g in found]


def grad_cams(
    maps: Sequence[Tensor], logits: Tensor, classes: Tensor, *, through_weights: bool = False
) -> list[Tensor]:
    """Grad-CAMs [B,h,w] of all stages but the deepest, which is CAM's; see `grad_cam_consistency`.

    Raises SynthkdError for maps without a graph.
    """
    earlier = maps[:-1]
    if not all(x.requires_grad for x in earlier):
        raise SynthkdError("grad_cam: the maps have no graph; read them with differentiable=True (Stages.reading)")
    if not earlier:
        return []
    return gradient_activation(earlier, slopes_of(logits, earlier, classes, twice=through_weights))


def region_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared differences of activation maps [B,h,w], summed over stages paired from the deepest, a scalar.

    The student's are resized (bilinear) where sizes differ; the teacher's are constant. Raises SynthkdError for none.
    """
    pairs = paired(student, teacher)
    if not pairs:
        raise SynthkdError(_ALONE)
    return torch.stack([_mean_square(student[s][:, None], teacher[t][:, None].detach()) for s, t in pairs]).sum()


def grad_cam_consistency(
    student_maps: Sequence[Tensor],
    student_logits: Tensor,
    teacher_maps: Sequence[Tensor],
    teacher_logits: Tensor,
    classes: Tensor | None = None,
    *,
    through_weights: bool = False,
) -> Tensor:
    """Mean squared differences of both networks' Grad-CAMs, summed over all paired stages but the deepest, a scalar.

    maps: [B,C,h,w] of stages, the deepest last, with their graphs; logits: [B,K]. classes: int64 [B] whose logits are
    explained; the teacher's top one by default, for both networks, as in the published code. The student's maps
    are resized (bilinear) where sizes differ.
    through_weights: differentiate the channels' weights a_c as well, which takes a second backward pass (no Triton
    kernel and no compiled graph has one). The published code does not: there a_c is a constant of each step.
    Where teacher and student run apart, `grad_cams` of each and `region_distance` are the same.
    Raises SynthkdError for networks with one paired stage only, and for maps without a graph.
    """
    chosen = teacher_logits.argmax(dim=1) if classes is None else classes
    return region_distance(
        grad_cams(student_maps, student_logits, chosen, through_weights=through_weights),
        grad_cams(teacher_maps, teacher_logits, chosen),
    )


def _mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """Of maps [B,K,h,w], at the size of `wanted`."""
    if found.shape[2:] != wanted.shape[2:]:
        found = F.interpolate(found, size=wanted.shape[2:], mode="bilinear", align_corners=False)
    return (found - wanted.to(found.dtype)).square().mean()
