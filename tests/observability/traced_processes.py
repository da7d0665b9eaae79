"""Two processes trace a DistributedDataParallel model on their own rows; run by torchrun.

traced_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hf_moe.observability.recording import record_routing
from tiny_moe import hf_moe_model

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(hf_moe_model())
    ids = torch.arange(1, 49).view(4, 12)
    with record_routing(model) as trace, trace.domain(["even", "odd"][rank]):
        model(input_ids=ids[rank::2]).logits.sum().backward()
    trace.reduce()
    trace.save(Path(sys.argv[1]) / f"trace-{rank}")
    torch.distributed.destroy_process_group()
