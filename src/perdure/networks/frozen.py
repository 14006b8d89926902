"""A frozen copy of a network: what distillation and replay compare with."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Frozen(Generic[ModuleT]):
    """A copy in evaluation mode that is neither trained nor saved.

    Not an ``nn.Module`` itself: as a submodule the copy would be listed among the owner's parameters, saved with
    every checkpoint and written to every task's weights. A method moves its frozen copies along with itself, see
    :class:`perdure.methods.method.Method`, and makes them again in ``begin``.

    Args:
        module: What to copy; the original is left as it is.
    """

    def __init__(self, module: ModuleT) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
