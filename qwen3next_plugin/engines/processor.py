"""What the processor can do, as far as programs that were compiled for it need it again."""

import torch


def instructions() -> list[str]:
    """Its instruction sets, as torch names them."""
    return sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
