"""Convert the BatchNorm layers of a small torch model to bnkernels and train it in channels_last.

python examples/convert_and_train.py               # --autocast: the forward in bfloat16
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import bnkernels as bnk

parser = argparse.ArgumentParser()
parser.add_argument("--autocast", action="store_true", help="run the forward in bfloat16")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

model = nn.Sequential(
    *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
).to(device)
model.to(memory_format=torch.channels_last)
bnk.convert(model)  # in place; parameters, buffers and state_dict are unchanged
print("BatchNorm layers:", [type(layer).__module__ for layer in model if isinstance(layer, nn.BatchNorm2d)])

labels = torch.arange(64, device=device) % 4  # four classes of random images, each with its own mean colour
images = torch.randn(64, 3, 16, 16, device=device) + torch.randn(4, 3, 1, 1, device=device)[labels]
images = images.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(1, 21):
    with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
