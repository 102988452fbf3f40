"""The device that tests of the engine run on: `pytest --device cuda`, else CUDA where there is one."""

from __future__ import annotations

import os

import torch

VARIABLE = "TEST_DEVICE"
"""How the option reaches this module. Named unlike the service's settings, which services would read."""

DEVICE = torch.device(os.environ.get(VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu"))
