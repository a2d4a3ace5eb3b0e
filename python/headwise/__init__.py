"""Every input chooses how many attention heads run, and which; the others cost nothing."""

import torch  # noqa: F401  (LibTorch must be loaded before the extension)

from headwise import _C  # noqa: F401  (registers torch.ops.headwise.*)
