"""Train ``models/digits.onnx`` and write its data: ``python -m tools.train_digits`` from the repository root.

scikit-learn's digits (1797 pictures, 8 x 8, pixels 0 to 16) are divided by 16 and split once, stratified: 600 pictures
are held out for the test and never trained on; 512 of the other 1197 are written, without labels, for calibration. The
recipe is fixed beforehand: nothing is chosen by the test accuracy. Needs torch 2.13.0 and scikit-learn; about two
minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import models
from models import digits, layers

SEED = 0
TEST, CALIBRATE = 600, 512
EPOCHS, BATCH = 50, 32
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


class Network(nn.Module):
    """The network of `models.digits` for training; its state_dict has the names of the ONNX initializers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        for name, channels_in, channels in digits.CONVS:
            place, _, leaf = name.rpartition(".")
            parent = self.get_submodule(place)
            parent.add_module(leaf, nn.Conv2d(channels_in, channels, 3, padding=1, bias=False))
            parent.add_module(leaf.replace("conv", "bn"), nn.BatchNorm2d(channels))
        self.fc = nn.Linear(digits.CONVS[-1][2], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, 10)."""
        shortcut = x
        for name, _, _ in digits.CONVS:
            if name == "block.conv1":
                shortcut = x
            if name == "conv4":
                x = functional.max_pool2d(x, 2)
            x = self.get_submodule(name.replace("conv", "bn"))(self.get_submodule(name)(x))
            if name == "block.conv2":
                x = x + shortcut
            x = functional.relu(x)
        return self.fc(x.mean((2, 3)))


def shifted(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every picture moved by -1, 0 or 1 pixel in both directions, zeros coming in."""
    padded = functional.pad(pictures, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(pictures), 2), generator=generator).tolist()
    return torch.stack([padded[i, :, dy : dy + 8, dx : dx + 8] for i, (dy, dx) in enumerate(moves)])


def train(pictures: np.ndarray, labels: np.ndarray) -> Network:
    """Train on (n, 1, 8, 8) pictures: AdamW, one cycle, label smoothing 0.1, random shifts."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # Sums depend on the number of threads: one, so that every machine of a kind gets the same weights.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    x, y = torch.from_numpy(pictures), torch.from_numpy(labels)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = -(-len(x) // BATCH) * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = functional.cross_entropy(network(shifted(x[index], generator)), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        logging.info("epoch %d of %d: loss %.4f", epoch + 1, EPOCHS, total / len(x))
    return network.eval()


def main() -> int:
    """Split, train, write the three files."""
    parser = argparse.ArgumentParser(description="Train models/digits.onnx and write its data.")
    parser.add_argument("--out", type=Path, default=models.DIGITS.parent, help="folder (default: models)")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    data = load_digits()
    pictures = (data.images / 16).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    rows, test = train_test_split(np.arange(len(labels)), test_size=TEST, random_state=SEED, stratify=labels)
    network = train(pictures[rows], labels[rows])

    with torch.no_grad():
        scores = network(torch.from_numpy(pictures[test])).numpy()
    accuracy = float(np.mean(scores.argmax(1) == labels[test]))
    logging.info("test accuracy %.4f on %d pictures", accuracy, len(test))

    state = {name: value.numpy() for name, value in network.state_dict().items()}
    model = layers.export(
        digits.network(layers.stored(state)),
        "Trained by tools/train_digits.py on scikit-learn's digits; the input is the pixels divided by 16.",
    )
    onnx.helper.set_model_props(model, {"test_accuracy": f"{accuracy:.4f}", "test_samples": str(len(test))})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out / models.DIGITS.name)
    np.savez_compressed(out / models.DIGITS_CALIBRATE.name, input=pictures[rows[:CALIBRATE]])
    np.savez_compressed(out / models.DIGITS_TEST.name, input=pictures[test], labels=labels[test])
    return 0


if __name__ == "__main__":
    sys.exit(main())
