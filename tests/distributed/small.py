"A small training that a process of its own and the test beside it can both run."
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sft_course.loop import batches
from sft_course.tools.steps import epoch_sums

N = 19  # divides by nothing
WAYS = {"steps": {}, "micro": {"micro": 3}, "unfrozen": {"unfreeze": True}, "masked": {"masked": True}}


def known_labels(outputs, targets):
    "Cross-entropy as a sum over the labels that are known, and their number."
    known = targets >= 0
    return F.cross_entropy(outputs[known], targets[known], reduction="sum"), int(known.sum())


def trained(micro=None, unfreeze=False, masked=False):
    """Two epochs of a small network; the gradient and the weights at the end, and each epoch's mean loss and number of terms.

    unfreeze: its first layer learns from the second epoch on; masked: the label of every second image is not known."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 6, generator=draw), torch.randint(0, 3, (N,), generator=draw)
    if masked:
        y[1::2] = -1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    net[0].requires_grad_(not unfreeze)
    step, losses, counts = 0, [], []
    for epoch in range(2):
        if epoch:
            net[0].requires_grad_(True)
        order = [*batches(N, 8, (0, epoch)), np.array([epoch])]  # 8, 8, 3, and one that is too small for all
        if masked:  # of the last batch process 1 knows no label
            order = [*order, np.arange(4)]
        total, terms, step = epoch_sums(net, x.__getitem__, y, order, optimizer, lambda s: 1., step, micro=micro,
                                        loss=known_labels if masked else None)
        losses.append(total / terms)
        counts.append(terms)
    return {"grad": net[0].weight.grad.clone(), "weights": net[2].weight.detach().clone(), "losses": losses, "terms": counts}
