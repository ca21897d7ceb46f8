"""A convolutional network learns scikit-learn's digits, in plain PyTorch. For the advice it needs one line: the print of a look."""

import argparse
import json
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of examples")
parser.add_argument("--steps", type=int, default=1000, help="updates")
parser.add_argument("--look", type=int, default=10, help="updates between two evaluations")
parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate, over all steps")
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:360]  # the same for every seed
train = torch.ones(len(images), dtype=bool).index_fill(0, held_out, False)
train_images, train_labels = images[train], labels[train]
val_images, val_labels = images[held_out], labels[held_out]

torch.manual_seed(args.seed)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(32 * 2 * 2, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps) if args.schedule == "cosine" else None


def batches():
    """Batches without end: the examples in a new order in every epoch."""
    while True:
        order = torch.randperm(len(train_images))
        for start in range(0, len(order) - args.batch_size + 1, args.batch_size):
            yield order[start : start + args.batch_size]


for step, batch in zip(range(1, args.steps + 1), batches()):
    loss = nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()
    if step % args.look == 0 or step == args.steps:
        with torch.no_grad():
            logits = model(val_images)
        val_loss = nn.functional.cross_entropy(logits, val_labels).item()
        accuracy = (logits.argmax(1) == val_labels).float().mean().item()
        print(json.dumps({"step": step, "seconds": time.perf_counter(), "val_loss": val_loss, "accuracy": accuracy}), flush=True)
