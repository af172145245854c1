"""Reduced precision: which type pays on which device, and a copy of a network in such a type."""

from __future__ import annotations

import copy

import torch
from torch import nn


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (x86: AVX-512 or AMX; ARM)."""
    if not hasattr(torch.cpu, 'get_capabilities'):  # torch before 2.10
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16'))


def reduced_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of convolutions for a precision setting; None for float32.

    `auto` reduces precision only where the hardware multiplies in the reduced type: to bfloat16 on
    CPUs that have instructions for it, and on GPUs from Ampere on.
    """
    if precision == 'auto':
        if device.type == 'cuda':
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            native = device.type == 'cpu' and cpu_has_bfloat16()
        return torch.bfloat16 if native else None
    return None if precision == 'float32' else getattr(torch, precision)


def reduced_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for autocast whose convolutions and linear layers hold their weights in this type,
    so that the weights are not converted in every pass."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return network
