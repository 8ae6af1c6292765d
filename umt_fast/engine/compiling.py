"""torch.compile as runs use it."""

from __future__ import annotations

import torch
from torch import nn

# Of Inductor. A sum of more than this many tensors is stored where several kernels read it, not computed anew in each: a
# transformer's residual stream then costs every kernel two reads, and not up to five.
OPTIONS = {"realize_reads_threshold": 2}


def compiled(module: nn.Module) -> nn.Module:
    """The module as one graph for each shape of its inputs, or an error when it is called: a break would cost speed in
    silence."""
    return torch.compile(module, fullgraph=True, dynamic=False, options=dict(OPTIONS))
