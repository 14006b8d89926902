"""The joint diffusion network (BJD) with one task-oriented adapter (TOA) per task.

Li, Zhang, Heng, Gu: "Comprehensive Generative Replay for Task-Incremental Segmentation with Concurrent Appearance and
Semantic Forgetting", MICCAI 2024. One U-Net predicts the noise of an image and of its mask, which is one more channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.joint_diffusion.extra import need
from perdure.networks.network import Network

Size = Literal["full", "small", "smoke"]


class Plan(NamedTuple):
    """One size of the U-Net.

    Args:
        widths: Channels per level, from full resolution down.
        blocks: Residual blocks per level of the encoder; the decoder has one more.
        attended: How many of the coarsest levels have attention to the image and to the prompt.
        head: Channels per attention head.
        groups: Groups of the normalisation.
    """

    widths: tuple[int, ...]
    blocks: int
    attended: int
    head: int
    groups: int


PLANS: Final[dict[Size, Plan]] = {
    "full": Plan((128, 128, 256, 256, 512, 512), 2, 3, 64, 32),
    "small": Plan((64, 128, 256, 256), 2, 2, 64, 32),
    # eight groups: with 32 every channel of the first level would lose its mean
    "smoke": Plan((32, 64), 1, 1, 32, 8),
}


class JointDiffusion(Network):
    """Noise of noisy image-mask pairs, given how noisy they are and what they show.

    Args:
        channels: Channels of the images; a pair has one more.
        text_width: Length of the embedding of a token of a prompt.
        size: Which U-Net.
        checkpointing: Compute activations again in the backward pass, which takes less memory and more time.

    Attributes:
        adapters: One :class:`Adapter` per task, in task order; see :meth:`add_adapter`.

    Raises:
        UsageError: diffusers is not installed.
    """

    def __init__(self, channels: int, text_width: int, *, size: Size = "full", checkpointing: bool = False) -> None:
        super().__init__(2, in_channels=channels + 1)
        self.plan, self.text_width = PLANS[size], text_width
        self.unet = _unet(self.plan, channels + 1, text_width, checkpointing)
        zero_outputs(self.unet)
        self.adapters = nn.ModuleList()

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless each side can be halved from level to level."""
        super().check_size(size)
        step = 2 ** (len(self.plan.widths) - 1)
        if any(side % step or side < step for side in size):
            raise UsageError(
                f"the generator cannot make images of {'×'.join(map(str, size))}: sides must be multiples of {step}",
                "choose another image size, or another method.generator.size",
            )

    def add_adapter(self, gamma: float = 1e-4) -> None:
        """Append the adapter of a new task; the earlier ones are not changed."""
        like = next(self.unet.parameters())
        self.adapters.append(Adapter(self.text_width, gamma).to(like.device, like.dtype))

    def forward(self, pairs: Tensor, times: Tensor, text: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Predicted noise ``(N, C + 1, H, W)`` of noisy pairs.

        Args:
            pairs: ``(N, C + 1, H, W)``, the mask in the last channel.
            times: ``(N,)`` int64, 0 to 999.
            text: ``(N, T, text_width)`` embedded prompts.
            tasks: ``(N,)`` int64, which adapter each prompt passes through; ``None``: none.
        """
        if tasks is not None:
            text = self.adapted(text, tasks)
        noise: Tensor = self.unet(pairs, times, text, return_dict=False)[0]
        return noise

    def adapted(self, text: Tensor, tasks: Tensor) -> Tensor:
        """Prompts ``(N, T, width)`` after the adapters of their tasks ``(N,)``.

        An adapter is only applied to prompts of its own task, so that no other sample gives it a gradient.
        """
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        result = text
        for number, adapter in enumerate(self.adapters):
            mine = (tasks == number).nonzero()[:, 0]
            if len(mine):
                result = result.index_copy(0, mine, adapter(text[mine]).to(text.dtype))
            elif shared:  # processes that average gradients wait for those of every parameter
                result = result + 0.0 * torch.stack([p.sum() for p in adapter.parameters()]).sum().to(text.dtype)
        return result

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``unet``, ``adapters`` and their ``gammas``: each has a weight decay of its own."""
        parts: dict[str, list[nn.Parameter]] = {"unet": list(self.unet.parameters()), "adapters": [], "gammas": []}
        for name, parameter in self.adapters.named_parameters():
            parts["gammas" if name.endswith("gamma") else "adapters"].append(parameter)
        return {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}

    def compilable(self) -> list[nn.Module]:
        """The U-Net."""
        return [self.unet]


class Adapter(nn.Module):
    """``e + γ ⊙ (W₂ GELU(W₁ e + b₁) + b₂)`` for each token, W₁ to half of the width.

    Args:
        width: Length of an embedding.
        gamma: First value of every entry of γ: a new adapter changes almost nothing.
    """

    def __init__(self, width: int, gamma: float = 1e-4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        self.gamma = nn.Parameter(torch.full((width,), gamma))

    def forward(self, text: Tensor) -> Tensor:
        """Embeddings ``(..., width)`` to embeddings ``(..., width)``."""
        moved: Tensor = text + self.gamma * self.up(F.gelu(self.down(text)))
        return moved


def _unet(plan: Plan, channels: int, text_width: int, checkpointing: bool) -> nn.Module:
    plain = len(plan.widths) - plan.attended
    down = ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * plan.attended
    up = ("CrossAttnUpBlock2D",) * plan.attended + ("UpBlock2D",) * plain
    made = need("diffusers").UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        layers_per_block=plan.blocks,
        block_out_channels=plan.widths,
        down_block_types=down,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=up,
        cross_attention_dim=text_width,
        # the library's name is wrong: it takes the number of heads of each level
        attention_head_dim=tuple(max(1, width // plan.head) for width in plan.widths),
        norm_num_groups=plan.groups,
        norm_eps=1e-6,
    )
    if checkpointing:
        made.enable_gradient_checkpointing()
    unet: nn.Module = made
    return unet


def zero_outputs(unet: nn.Module) -> None:
    """Set the last layer of every residual block, of every transformer and of the network to zero, in place.

    The network then predicts exactly 0; diffusers leaves its layers at random.
    """
    for name, part in unet.named_modules():
        if name.rpartition(".")[2] in ("conv2", "proj_out", "conv_out"):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
