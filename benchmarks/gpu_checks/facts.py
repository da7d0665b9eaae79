"""What a run must say of itself: date, device, versions and commit."""

from datetime import date
from typing import Any

import torch

from ..expert_layers.results import commit, environment
from .products import this_device
from .setting import Setting


def facts(setting: Setting) -> dict[str, Any]:
    found = {"date": date.today().isoformat(), "commit": commit("cuda"), **environment(setting.device, threads=1)}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "tile_table": this_device(),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size >> 20,
            "memory_gb": round(properties.total_memory / 2**30),
        }
    return found
