"""Two ranks under FSDP2 with torch and this package alone: trained, saved and loaded. ``torchrun fsdp2.py FOLDER``."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorapre_dist import LoRAPre, checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 16)

    def forward(self, tokens, wanted):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), wanted.flatten())


dist.init_process_group("gloo")
torch.manual_seed(0)
model, mesh = Net(), init_device_mesh("cpu", (dist.get_world_size(),))
for module in (*model.blocks, model):
    fully_shard(module, mesh=mesh)
optimizer = LoRAPre(model.named_parameters(), lr=0.02, rank=4)
tokens = torch.randint(16, (8, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
losses = []
for _ in range(20):
    loss = model(tokens, (3 * tokens + 1) % 16)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
checkpoint.save(model, optimizer, sys.argv[1], "step20")
checkpoint.load(model, optimizer, sys.argv[1], "step20")
print(f"rank {dist.get_rank()}: {losses[0]:.2f} {losses[-1]:.2f} {len(optimizer.factors())} matrices", flush=True)
dist.destroy_process_group()
