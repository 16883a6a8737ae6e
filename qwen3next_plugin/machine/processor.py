"""The processor's features that compiled programs depend on."""

import torch


def instructions() -> list[str]:
    """Its instruction sets, as torch names them."""
    return sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
