"""A layer of experts on the CPU against loops over them, as JSON. Usage: python -m benchmarks.experts [--threads N]

The layer of `xllm bench throughput --shape moe`: 64 experts of 256 over hidden 512, of which a token has 8. The rivals
take turns, and the best of the rounds counts. What they are:

  loop_kernels  for each expert that was hit: its rows by index, our own packed `linear`, the sum by index_add_
  loop_torch    the same with torch's `linear` and the weights as they are: transformers' "eager"
  grouped_mm    rows sorted, torch's `grouped_mm`: transformers' "grouped_mm", which is its default
  fp32, int8, w8a8   our operators

Beside the times: bytes of weights that were read (pages counted by the system), the arithmetic's speed and the
machine's, and the memory that a layer takes for one chunk of a prompt and for one of 32,768 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends import get_backend
from backends.cpu.expert_kernels import PanelExperts
from backends.expert_choice import ExpertChoice, RouteRule
from backends.opset import OpSet
from backends.parallel_group import ALONE
from benchmarks.ops import race
from benchmarks.pages_read import watch_experts
from serving.commands.bench.report import environment
