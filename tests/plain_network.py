"""A network of two convolutions, for tests in which it does not matter what a network computes: it
is traced, and runs, within moments. Started as a program, this file stores its weights anew."""

from pathlib import Path

import safetensors.torch
import torch

FACTORY = f'{Path(__file__).resolve()}:build'
WEIGHTS = Path(__file__).with_name('plain_network.safetensors')


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(4, 1, 3, padding=1)
    )


if __name__ == '__main__':
    safetensors.torch.save_file(build().state_dict(), WEIGHTS)
