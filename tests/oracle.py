"""What gradjax must equal: float64 PyTorch autograd and LAPACK's whole SVD, one row at a time."""

import copy

import numpy as np
import torch

from gradjax.structs import ATTENTION, PROJECTIONS


def linear_layer(block: torch.nn.Module, projection: str) -> torch.nn.Module:
    """A projection of a block of transformers."""
    part = block.self_attn if projection in ATTENTION else block.mlp
    return getattr(part, f"{projection}_proj")


def torch_loss_and_gradients(model, tokens: np.ndarray, targets: np.ndarray):
    """Mean loss over the target tokens, and {(layer, projection): gradient}, all float64."""
    model = copy.deepcopy(model).double()
    ids = torch.tensor(np.asarray(tokens), dtype=torch.int64)[None]
    labels = torch.where(torch.tensor(np.asarray(targets)), ids[0], -100)
    logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels[1:])  # mean, ignores -100
    loss.backward()
    gradients = {
        (layer, p): linear_layer(block, p).weight.grad.numpy()
        for layer, block in enumerate(model.model.layers)
        for p in PROJECTIONS
    }
    return loss.item(), gradients


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two gradients flattened in row-major order."""
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def effective_rank(values: np.ndarray) -> float:
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
