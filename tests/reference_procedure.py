"""The published procedure of LEWIS in plain loops and whole forward passes, for tests."""

from __future__ import annotations

import copy
import math
import re

import torch

from lewis_hub.calibration.model import block_lists, linears, matrix


def importance(model, texts):
    """Every pass goes through the whole model; earlier blocks are pruned by then."""
    model = copy.deepcopy(model)
    [(path, blocks)] = block_lists(model).items()
    found = {}
    for b in range(len(blocks)):
        inside = dict(linears(f"{path}.{b}", blocks[b]))
        seen = {at: [] for at in inside}
        handles = [
            module.register_forward_pre_hook(lambda _, args, at=seen[at]: at.append(args[0][0]))
            for at, module in inside.items()
        ]
        for text in texts:
            with torch.no_grad():
                model(input_ids=text[None])
        for handle in handles:
            handle.remove()
        for at, module in inside.items():
            if not seen[at]:
                continue  # its weight is used without a call
            weight = matrix(module)
            n_out, n_in = weight.shape
            squares = [0.0] * n_in
            for x in seen[at]:
                for j in range(n_in):
                    squares[j] += float((x[:, j].double() ** 2).sum()) / len(seen[at])
            total = 0.0
            for i in range(n_out):
                metric = [abs(float(weight[i, j])) * math.sqrt(squares[j]) for j in range(n_in)]
                total += sum(value**2 for value in metric)
                for j in sorted(range(n_in), key=lambda j: metric[j])[: n_in // 2]:
                    weight[i, j] = 0.0
            found[at] = math.sqrt(total)
    return found


def densities(base, expert, gamma, epsilon):
    """Importance of both to densities: shares of a component, 5 decimals, one min-max over all."""
    shares = {}
    for name in base:
        total = 0.0
        for other in base:
            if _component(other) == _component(name):
                total += abs(expert[other] - base[other])
        shares[name] = round(abs(expert[name] - base[name]) / total, 5)
    low, high = min(shares.values()), max(shares.values())
    return {
        name: gamma + (epsilon - gamma) * (share - low) / (high - low)
        for name, share in shares.items()
    }


def _component(module):
    return re.sub(r"\.\d+\.", ".", module, count=1)
