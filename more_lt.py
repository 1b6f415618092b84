# SPDX-License-Identifier: MIT
"""MORE: Long-tailed Recognition with Model Rebalancing (Luo et al., NeurIPS 2025, arXiv 2510.08177), in one file.

Every weight is W_g + B A. A second forward pass with W_g alone must agree with the full one, the more so the more frequent an image's
class is and by a weight that rises and falls as a sine over the training: frequent classes move into W_g, the low-rank term is left to
the rare ones. After training B A is merged into W_g, so the network and its cost are the plain ones. The equations are given here as
known at second hand; the paper's text was not at hand.

    python more_lt.py --dataset synth                                             a minute on two CPU cores
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --data-root data   CIFAR-100-LT on top of balanced softmax
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --no-more          the paired baseline
"""
import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from data_lt import (DEFAULT_IMB, GROUPS, ClassSampler, InputError, add_data_arguments, add_system_arguments, argument_parser, batches_in, channel_stats,
                     expected_calibration_error, group_accuracy, group_means, known_name,
                     load_dataset, normalize, on_device, show, test_batches, training_batches)
from models import (EXIT_STOPPED, LowRank, Replay, add_low_rank, all_sum, build_model, check_size, clock, distribute, flops, general_only,
                    git_commit, join_processes, load_checkpoint, load_optimizer, measure, merge_low_rank, random_batch, random_state, report_bench,
                    run_script, save_checkpoint, set_random_state, share_batchnorm, should_stop, stop_at_once, use_bf16, usual_side, write_atomic, write_json, write_log)

CLIP_STATS = torch.tensor([122.7709, 116.7460, 104.0937]), torch.tensor([68.5005, 66.6322, 70.3232])  # open_clip's, in 0..255

RECIPES = {
    "cifar10": dict(arch="resnet32", epochs=200, lr=0.05, batch_size=256, aug="strong"),
    "cifar100": dict(arch="resnet32", epochs=200, lr=0.05, batch_size=256, aug="strong"),
    "imagenet_lt": dict(arch="resnet50", epochs=200, lr=0.02, batch_size=256, aug="strong"),
    "places_lt": dict(arch="resnet152", epochs=200, lr=0.02, batch_size=256, aug="strong", pretrained=True),
    "inat18": dict(arch="resnet50", epochs=200, lr=0.02, batch_size=256, aug="strong"),
    "synth": dict(arch="resnet20", epochs=24, lr=0.05, batch_size=32, aug="basic"),
    "synth_mlt": dict(arch="resnet20", epochs=24, lr=0.05, batch_size=32, aug="basic"),
    "folder": dict(arch="resnet50", epochs=200, lr=0.02, batch_size=256, aug="strong"),
    "voc_mlt": dict(arch="resnet50", epochs=80, lr=0.02, batch_size=32, aug="strong", pretrained=True),
    "coco_mlt": dict(arch="resnet50", epochs=80, lr=0.02, batch_size=32, aug="strong", pretrained=True),
    "miml": dict(arch="resnet50", epochs=80, lr=0.02, batch_size=32, aug="strong", pretrained=True),
    "nuswide_scene": dict(arch="resnet50", epochs=40, lr=0.02, batch_size=32, aug="strong", pretrained=True),
    "clip": dict(epochs=20, lr=1e-5, batch_size=64, aug="basic", pretrained=True),  # whatever the dataset; AdamW
}


# --------------------------------------------------------------------------------------------- the equations, one function each

def sinusoidal_weight(step, total, amplitude):
    """a(t) = A sin(pi t / T): the weight of the discrepancy loss after `step` of `total` steps. The paper's A is A' x classes, A' = 2."""
    return amplitude * math.sin(math.pi * step / total)


def discrepancies(full, general, kind="l2", multi_label=False):
    """D by logit, n x K; an image's discrepancy is the sum over its row. full, general: n x K logits of W_g + B A and of W_g.
    "l2": squared difference; "mse": the same over K, a mean over the logits. "kl": p log(p / q) of the two softmaxes, or of the two coins of
    each label."""
    if kind in ("l2", "mse"):
        return (full - general).square() / (full.shape[1] if kind == "mse" else 1)
    if multi_label:
        p, q = full.sigmoid(), [F.logsigmoid(s * general) for s in (1, -1)]
        return p * (F.logsigmoid(full) - q[0]) + (1 - p) * (F.logsigmoid(-full) - q[1])
    return F.kl_div(general.log_softmax(1), full.log_softmax(1), log_target=True, reduction="none")


def more_loss(full, general, prior, target, discrepancy="l2", prior_weight="sample"):
    """Mean over the batch of prior(y) x discrepancy of the two passes' logits, without the schedule; a scalar.

    full, general: n x K. prior: (K,) class frequencies, a tensor or array (several labels: shares of all labels). target: int (n,), or 0/1 n x K with several labels an image: an image's weight is
    then the mean prior of its labels ("sample"), or each logit's difference is weighted by its own class's prior ("class").
    """
    terms = discrepancies(full, general, discrepancy, target.dim() == 2)
    prior = torch.as_tensor(prior, dtype=terms.dtype, device=terms.device)
    if target.dim() == 2 and prior_weight == "class":
        return (terms @ prior).mean()
    weight = prior[target] if target.dim() == 1 else target.to(terms) @ prior / target.sum(1).clamp_min(1)
    return (weight * terms.sum(1)).mean()


def balanced_softmax(logits, target, counts):
    """CE(f + log N_c, y), the mean (Ren et al., NeurIPS 2020): logit adjustment with tau 1. counts: (K,) tensor or array."""
    return F.cross_entropy(logits + torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).log(), target)


def focal_loss(logits, target, gamma=2.0):
    """Mean of (1 - p_y)^gamma * CE (Lin et al., ICCV 2017). target: int (n,), or 0/1 n x K with a coin for each label."""
    if target.dim() == 2:
        ce = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    else:
        ce = F.cross_entropy(logits, target, reduction="none")
    return ((1 - (-ce).exp()) ** gamma * ce).mean()


def ldam_loss(logits, target, counts, max_margin=0.5, weight=None):
    """Label-distribution-aware margins, N_c^(-1/4) with the largest max_margin (Cao et al., NeurIPS 2019), on a plain linear head:
    the margin is taken off the true class's logit and nothing is scaled. weight: (K,) class weights for the deferred re-weighting, of mean
    1 over the training images (its code divides by the batch's own mean). The paper's cosine head times 30 makes the margins far stronger."""
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    margins = counts.clamp_min(1) ** -0.25
    margins = margins * (max_margin / margins.max())
    ce = F.cross_entropy(logits - F.one_hot(target, len(counts)) * margins, target, reduction="none")
    return (ce if weight is None else torch.as_tensor(weight, dtype=ce.dtype, device=ce.device)[target] * ce).mean()


def effective_weights(counts, beta=0.9999):
    """Class weights (1 - beta) / (1 - beta^N_c), float array (K,) (Cui et al., CVPR 2019): LDAM-DRW's re-weighting. Their mean over the
    images, weighted by counts (K,), is 1."""
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 1)
    weights = (1 - beta) / (1 - beta ** counts)
    return weights * counts.sum() / (weights * counts).sum()


def asymmetric_loss(logits, target, gamma_pos=0.0, gamma_neg=4.0, margin=0.05):
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7), the mean over n x K: positives -(1 - p)^gamma_pos log p, negatives
    -q^gamma_neg log(1 - q) with q = max(p - margin, 0). target: 0/1 n x K. (Its code sums where this takes the mean.)"""
    p = logits.sigmoid()
    q = (p - margin).clamp_min(0)
    positive = (1 - p) ** gamma_pos * F.logsigmoid(logits)
    negative = q ** gamma_neg * torch.log1p(-q.clamp_max(1 - 1e-7))
    return -torch.where(target > 0, positive, negative).mean()


def distribution_balanced_loss(logits, target, counts, total, alpha=0.1, beta=10.0, mu=0.3, kappa=0.05, scale=5.0, gamma=2.0):
    """Distribution-balanced loss (Wu et al., ECCV 2020), the mean over n x K; the values are its code's for VOC-MLT.

    Re-balanced weight: r = (1 / N_k) / sum over the image's labels of 1 / N_j, smoothed to alpha + sigmoid(beta (r - mu)).
    Negative-tolerant logits: z - nu_k, nu_k = kappa log(total / N_k - 1) / scale, for negatives times scale and their loss over it.
    gamma > 0 makes it its focal form, which the code doubles. The weights take class-aware draws for granted. target: 0/1 n x K; counts: (K,); total: training images.
    """
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).clamp_min(1)
    y = target.to(logits)
    r = (1 / counts) / (y @ (1 / counts)).clamp_min(1e-12)[:, None]
    weight = alpha + torch.sigmoid(beta * (r - mu))
    nu = kappa * torch.log((total / counts - 1).clamp_min(1e-6)) / scale
    z = (logits - nu) * torch.where(y > 0, 1.0, scale)
    ce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    focal = 2 * (1 - (-ce).exp()) ** gamma if gamma > 0 else 1.0
    return (focal * weight * ce * torch.where(y > 0, 1.0, 1 / scale)).mean()


def average_precision(scores, targets):
    """Average precision of each class, (K,) in 0..1, NaN where a class has no positive: the sum over thresholds of precision times the
    gain in recall, images of equal score counted together (scikit-learn's definition). scores: float N x K; targets: 0/1 N x K."""
    ordered, order = scores.T.contiguous().sort(1, descending=True)  # K x N
    hits = targets.T.gather(1, order).double()
    above = torch.searchsorted(-ordered, -ordered, right=True)  # images with at least this score
    return (hits.cumsum(1).gather(1, above - 1) / above * hits).sum(1) / hits.sum(1)


def f1_scores(scores, targets):
    """(OF1, CF1) in percent of the labels with a positive logit: F1 of all decisions together, and of the mean precision and recall of the
    classes that have a positive. scores: logits N x K; targets: 0/1 N x K."""
    chosen, truth = scores > 0, targets > 0
    hit, said, there = (v.double().sum(0) for v in (chosen & truth, chosen, truth))
    cp, cr = (hit / said.clamp_min(1))[there > 0].mean(), (hit / there)[there > 0].mean()
    return float(200 * hit.sum() / (said.sum() + there.sum())), float(200 * cp * cr / (cp + cr).clamp_min(1e-12))


SINGLE, MULTI = ("ce", "bsce", "ldam", "focal"), ("bce", "focal", "asl", "db")  # losses for one label an image, and for several
DB_COCO = dict(mu=0.2, scale=2.0)  # the values that Wu et al.'s code has for COCO-MLT


def base_loss(kind, logits, target, counts, deferred=None, total=None, db={}):
    """The loss MORE is put on: ce, bsce, ldam (deferred: class weights once the re-weighting has begun), focal; bce, asl or db (total:
    training images; db: other values than VOC-MLT's) for 0/1 targets n x K."""
    if kind == "bsce":
        return balanced_softmax(logits, target, counts)
    if kind == "ldam":
        return ldam_loss(logits, target, counts, weight=deferred)
    if kind == "focal":
        return focal_loss(logits, target)
    if kind == "asl":
        return asymmetric_loss(logits, target)
    if kind == "db":
        return distribution_balanced_loss(logits, target, counts, total, **db)
    return F.binary_cross_entropy_with_logits(logits, target.to(logits)) if kind == "bce" else F.cross_entropy(logits, target)


# ------------------------------------------------------------------------------------------------------------------- predictions

class TwoPasses(torch.nn.Module):
    """x -> (logits of W_g + B A, logits of W_g or None), as one forward: what DistributedDataParallel can wrap."""

    def __init__(self, model, detach_general=False):
        super().__init__()
        self.model, self.detach_general = model, detach_general
        drops = (torch.nn.modules.dropout._DropoutNd, torch.nn.MultiheadAttention, torchvision.ops.StochasticDepth)
        self.random = any(isinstance(m, drops) for m in model.modules())

    def forward(self, x, both):
        with torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=both and self.random):  # both passes drop the same units
            full = self.model(x)
        if not both:
            return full, None
        with general_only(self.model), torch.set_grad_enabled(not self.detach_general):
            return full, self.model(x)


@torch.no_grad()
def predict(model, images, env):
    """Logits N x K on the device. images: uint8 array N x H x W x 3, or ImageFiles. Processes share the work."""
    model.eval()
    out = torch.zeros(len(images), env.num_classes, device=env.device)
    for start, x in test_batches(images, env.device, env.rank, env.world, env.args.workers, env.crop):
        with torch.autocast(env.device.type, torch.bfloat16, enabled=env.bf16):
            out[start:start + len(x)] = model(normalize(x, env.mean, env.std)).float()
    return all_sum(out, env.world)


def evaluate(logits, split, env):
    """By group, per class and ECE: top-1 accuracy; with several labels an image average precision (their mean is mAP), OF1 and CF1."""
    labels = torch.from_numpy(split.labels).to(logits.device)
    if labels.dim() == 1:
        acc = group_accuracy(logits.argmax(1).cpu(), split.labels, env.counts)
        return acc | {"ece": expected_calibration_error(logits.softmax(1), labels)}
    ap = (100 * average_precision(logits, labels)).cpu().numpy()
    of1, cf1 = f1_scores(logits, labels)
    return group_means(ap, env.groups) | {"per_class": [None if math.isnan(v) else float(v) for v in ap], "ece": None, "of1": of1, "cf1": cf1}


@torch.no_grad()
def discrepancy_by_group(model, split, env):
    """Mean discrepancy of the two passes by class group on a split, {"many", "medium", "few", "all"}; to be asked in fp32, since bf16's
    rounding is larger than a small B A."""
    full = predict(model, split.images, env)
    with general_only(model):
        general = predict(model, split.images, env)
    apart = discrepancies(full, general, env.args.discrepancy, split.labels.ndim == 2).sum(1)
    labels = torch.from_numpy(split.labels).to(full.device)
    truth = F.one_hot(labels, env.num_classes).float() if labels.dim() == 1 else labels.float()
    return group_means((truth.T @ apart / truth.sum(0)).cpu().numpy(), env.groups)


# ------------------------------------------------------------------------------------------------------------------- training

def make_step(optimizer, env):
    """One step: full pass, general pass, base loss + a x discrepancy; step(x, y, (share, learning rate, a), deferred). It adds to step.sums
    (5, K): images drawn, correct (of several labels: found) and discrepancy by class; base loss and discrepancy loss times images, the same
    in the whole row. deferred: whether the deferred re-weighting of ldam has begun."""
    args, sums = env.args, torch.zeros(5, env.num_classes, device=env.device)
    both = not args.no_more and args.amplitude > 0

    def step(x, y, numbers, deferred):
        share, lr, weight = numbers
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        with torch.autocast(env.device.type, torch.bfloat16, enabled=env.bf16):
            full, general = env.network(x, both)
        full = full.float()
        loss = base = base_loss(args.loss, full, y, env.counts_t, env.deferred if deferred else None, env.num_images, env.db)
        extra, apart = torch.zeros_like(base), torch.zeros_like(full[:, 0])
        if both:
            general = general.float()
            extra = more_loss(full, general, env.prior, y, args.discrepancy, args.prior_weight)
            loss = base + weight * extra
            apart = discrepancies(full.detach(), general.detach(), args.discrepancy, y.dim() == 2).sum(1)
        optimizer.zero_grad()
        (loss * share).backward()
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            truth = F.one_hot(y, env.num_classes).float() if y.dim() == 1 else y.float()
            right = (full.argmax(1) == y).float()[:, None] if y.dim() == 1 else (full > 0).float()
            sums.add_(torch.stack([truth.sum(0), (truth * right).sum(0), (truth * apart[:, None]).sum(0),
                                   base.expand(env.num_classes) * len(y), extra.expand(env.num_classes) * len(y)]))
    possible = env.device.type == "cuda" and env.world == 1 and env.bf16 and args.optimizer == "sgd" and not env.network.random
    return Replay(step, possible, sums)


def schedule(args, num_classes, first, steps, total):
    """[(learning rate, weight of the discrepancy loss, whether ldam's re-weighting has begun)] of `steps` steps from step `first` of `total`."""
    peak = args.amplitude * num_classes * (not args.no_more)  # A = A' C
    return [(args.lr * (0.5 + 0.5 * math.cos(math.pi * s / total)), sinusoidal_weight(s, total, peak) if args.schedule == "sin" else peak,
             args.loss == "ldam" and s >= 0.8 * total) for s in range(first, first + steps)]  # LDAM-DRW: the last fifth


def train(model, step, plan, data, env):
    """Steps over `data`, batches of (x, y, share), by `plan` (see schedule). Returns (step.sums of these steps, steps done). Ends early when
    the run is told to stop."""
    model.train()
    step.sums.zero_()
    done = 0
    for (x, y, share), (lr, weight, deferred) in zip(data, plan):
        step(x, y, (share, lr, weight), deferred)
        done += 1
        if (env.world == 1 or done % 16 == 0) and should_stop(env.world, env.device):
            break
    return step.sums.clone(), done


def make_optimizer(model, args):
    """SGD with momentum 0.9, or AdamW; the low-rank factors have a rate scale and a weight decay of their own."""
    factors = [p for m in model.modules() if isinstance(m, LowRank) for p in (m.A, m.B)]
    known = {id(p) for p in factors}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": args.weight_decay, "scale": 1.0}]
    if factors:
        groups.append({"params": factors, "weight_decay": args.low_rank_decay, "scale": args.low_rank_lr})
    fused = next(model.parameters()).is_cuda  # the SGD that reads its rate on the device, so that a replayed graph sees each step's
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, fused=fused, foreach=not fused)


@torch.no_grad()
def low_rank_share(model):
    """|B A| / |W_g| (Frobenius) of each layer, {name: float}: a term that stays at zero does nothing."""
    share = {}
    for name, m in model.named_modules():
        for weight, terms in getattr(m, "parametrizations", {}).items():
            if isinstance(terms[0], LowRank):
                share[f"{name}.{weight}"] = float((terms[0].B @ terms[0].A).norm() / terms.original.norm())
    return share


def draw_figures(log, out):
    """Loss weight and discrepancy by class group over the training, when matplotlib is installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figure: pip install matplotlib to have it drawn")
        return
    epochs = [r["epoch"] for r in log]
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(epochs, [r["weight"] for r in log])
    left.set_title("weight of the discrepancy loss")
    for g in GROUPS:
        right.plot(epochs, [math.nan if r[f"discrepancy_{g}"] is None else r[f"discrepancy_{g}"] for r in log], label=g)
    right.set_title("discrepancy of full and general pass")
    right.legend()
    for axis in (left, right):
        axis.set_xlabel("epoch")
    plt.tight_layout()
    plt.savefig(out / "discrepancy_by_group.png", dpi=120)
    plt.close()


# ---------------------------------------------------------------------------------------------------------------- flags and main

def parse_args(argv=None):
    """Flags; what is not given comes from RECIPES. Raises InputError for values out of range."""
    parser = argument_parser("Model Rebalancing (MORE) for long-tailed recognition")
    add_data_arguments(parser)
    parser.add_argument("--aug", choices=["strong", "basic", "none"], help="basic: crop and flip; strong: + RandAugment, Cutout")
    model = parser.add_argument_group("model and optimiser; what shows no default has one by dataset, in RECIPES")
    model.add_argument("--arch", help="resnet32, resnet50, resnet152 or another torchvision classifier")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from torchvision's ImageNet weights (places_lt and the multi-label datasets do), clip: from OpenAI's (it does)")
    model.add_argument("--weights", metavar="FILE", help="start from the weights in this file (a last layer of another shape starts afresh)")
    model.add_argument("--loss", choices=sorted({*SINGLE, *MULTI}), help=f"base loss: {', '.join(SINGLE)}; several labels an image: {', '.join(MULTI)} (default ce, bce). ldam: margins on a plain head, much weaker than its paper's")
    model.add_argument("--sampling", choices=["natural", "class-aware"], help="class-aware: a class at random, then an image of it (default natural; db: class-aware)")
    model.add_argument("--head", choices=["linear", "text"], default="linear", help="clip: the head starts at random, or at the class names' text features")
    model.add_argument("--optimizer", choices=["sgd", "adamw"], help="(default sgd; clip: adamw)")
    model.add_argument("--epochs", type=int)
    model.add_argument("--lr", type=float, help="cosine to 0")
    model.add_argument("--batch-size", type=int)
    model.add_argument("--weight-decay", type=float, default=5e-4, help="(default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--no-more", action="store_true", help="the base loss alone, on plain weights: the paired baseline")
    method.add_argument("--amplitude", type=float, default=2.0, help="A', times the number of classes the peak weight; 0: decomposition alone (default %(default)s)")
    method.add_argument("--rank-ratio", type=float, default=0.1, help="rank over the smaller side of a weight (default %(default)s)")
    method.add_argument("--discrepancy", choices=["l2", "mse", "kl"], default="mse",
                        help="of the passes' logits: squared distance (the paper's), the same as a mean over the logits, or KL; all times A (default %(default)s)")
    method.add_argument("--prior-weight", choices=["sample", "class"], default="sample", help="several labels: an image's mean prior, or each logit's own (default %(default)s)")
    method.add_argument("--schedule", choices=["sin", "constant"], default="sin", help="of the loss weight (default %(default)s)")
    method.add_argument("--detach-general", action="store_true", help="no gradient through the general pass: cheaper")
    method.add_argument("--low-rank-init", choices=["zero", "svd", "random"], default="zero", help="start of B A (default %(default)s)")
    method.add_argument("--low-rank-only", default="", metavar="REGEX", help="only in layers whose name (clip: in the image tower) contains this (default: in all)")
    method.add_argument("--low-rank-decay", type=float, default=0.0, help="weight decay of A and B; 5e-4 keeps B A near zero (default %(default)s)")
    method.add_argument("--low-rank-lr", type=float, default=1.0, help="rate of A and B over that of the rest (default %(default)s)")
    add_system_arguments(parser, "write the merged network as a plain state dict, merged.pt")
    args = parser.parse_args(argv)

    known = known_name(args.dataset)
    recipe = {"pretrained": False, "optimizer": "sgd"} | RECIPES.get(known, RECIPES["cifar100" if known.endswith(".npz") else "folder"])
    if (args.arch or "").startswith("clip:"):
        recipe |= RECIPES["clip"] | {"optimizer": "adamw"}
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.imb is None:
        args.imb = DEFAULT_IMB.get(args.dataset)
    for flag, least in (("epochs", 1), ("lr", 1e-12), ("batch_size", 2), ("weight_decay", 0), ("amplitude", 0), ("low_rank_decay", 0),
                        ("low_rank_lr", 0), ("workers", 0)):
        value = getattr(args, flag)
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be at least {least:g}")
    if not 0 < args.rank_ratio <= 1:
        raise InputError(f"--rank-ratio {args.rank_ratio:g}: must lie between 0 and 1")
    return args


FREE_FLAGS = {"resume", "out", "export", "device", "data_root", "lists", "workers", "bench"}  # may differ between a checkpoint and the run that goes on from it


def check_same_run(state, args, counts, path):
    """Raise InputError when a checkpoint is not this run's."""
    if not isinstance(state, dict) or not {"args", "epoch", "counts", "report", "model", "optimizer", "rng", "begun"} <= set(state):
        raise InputError(f"{path} is no checkpoint of this script; give another --out")
    for key in sorted(set(vars(args)) - FREE_FLAGS):
        if state["args"].get(key) != getattr(args, key):
            raise InputError(f"{path} is of another run: --{key.replace('_', '-')} was {state['args'].get(key)}, now {getattr(args, key)}; "
                             "give the same flags or another --out")
    if state["counts"] != counts.tolist():
        raise InputError(f"{path} is of a run on other data: the training images per class differ; give another --out")


def bench(args):
    """Time, on made-up images, the plain step, MORE's two-pass step with and without --detach-general, and inference before and after
    merging; compare parameters and FLOPs; print and write the ratios."""
    if args.no_more or args.amplitude == 0:
        raise InputError("--bench: times MORE's step beside the plain one; leave out --no-more and --amplitude 0")
    if args.loss not in SINGLE or "WORLD_SIZE" in os.environ:
        raise InputError("--bench: times one process with a loss for one label an image")
    device = join_processes(args)[0]
    size, k, n = args.size or usual_side(args.arch), 100, args.batch_size
    steps = 8 if device.type == "cpu" or size > 64 else 128
    counts = torch.arange(k, 0, -1, device=device).float()
    env = argparse.Namespace(args=args, device=device, rank=0, world=1, crop=None, bf16=use_bf16(args.precision, device),
                             num_classes=k, counts_t=counts, prior=counts / counts.sum(), deferred=None, num_images=None, db={})
    plain, more = (build_model(args.arch, k).to(device, memory_format=torch.channels_last) for _ in range(2))
    merged = build_model(args.arch, k).to(device, memory_format=torch.channels_last)
    merged = merge_low_rank(add_low_rank(merged, args.rank_ratio))
    cost = [(sum(p.numel() for p in m.parameters()), flops(m.eval(), size)) for m in (plain, merged)]
    add_low_rank(more, args.rank_ratio, args.low_rank_init, args.low_rank_only)
    x, y = random_batch(n, size, k, device)

    def steps_of(model, **flags):
        env_of = argparse.Namespace(**vars(env) | {"args": argparse.Namespace(**vars(args) | flags)})
        env_of.network = TwoPasses(model, env_of.args.detach_general)
        step = make_step(make_optimizer(model, args), env_of)
        return lambda: train(model, step, [(0.01, 1.0, False)] * steps, [(x, y, 1.0)] * steps, env_of)[0].sum().item(), steps * n

    @torch.no_grad()
    def infer(model):
        model.eval()
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=env.bf16):
                model(x)
    measured = measure({
        "bare": steps_of(plain, no_more=True), "more": steps_of(more, detach_general=False), "more_detached": steps_of(more, detach_general=True),
        "infer_plain": (lambda: infer(plain), steps * n), "infer_merged": (lambda: infer(merged), steps * n)}, device)
    report_bench(measured, [
        ("a MORE step over the plain one, in time", "bare", "more", "at most 2.1"),
        ("the same with --detach-general", "bare", "more_detached", "at most 1.45"),
        ("inference merged over plain, in images/s", "infer_merged", "infer_plain", "1 but for noise")],
        args.arch, device, f"{'bf16' if env.bf16 else 'fp32'}, batch {n}, {size} px")
    print(f"  merged {cost[1][0]:,} parameters, {cost[1][1] / 1e6:,.1f} MFLOPs an image; plain {cost[0][0]:,}, {cost[0][1] / 1e6:,.1f}")


def main(argv=None):
    """Decompose, train with two passes, merge, evaluate."""
    args, commit = parse_args(argv), git_commit()
    if args.bench:
        args.loss = args.loss or "ce"
        return bench(args)
    device, rank, world = join_processes(args)

    # ---- data
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    counts, groups = data.counts, data.groups
    print(f"{data.name} from {data.source}: {data.num_classes} classes, {len(data.train):,} train ({counts.max()}..{counts.min()} a class), "
          f"{len(data.val):,} val, {len(data.test):,} test; " + ", ".join(f"{len(c)} {g}" for g, c in groups.items()))
    args.loss = args.loss or ("bce" if data.multi_label else "ce")
    if args.loss not in (MULTI if data.multi_label else SINGLE):
        raise InputError(f"--loss {args.loss}: {data.name} has {'several labels' if data.multi_label else 'one label'} an image; "
                         f"take {', '.join(MULTI if data.multi_label else SINGLE)}")
    args.sampling = args.sampling or ("class-aware" if args.loss == "db" else "natural")
    if args.sampling == "class-aware" and args.loss in ("bsce", "ldam"):
        raise InputError(f"--sampling class-aware: --loss {args.loss} corrects for the class counts itself; take ce or focal")
    if args.prior_weight == "class" and not data.multi_label:
        raise InputError("--prior-weight class: for several labels an image; leave it out")
    if args.out is None:
        name = Path(args.dataset).stem + (f"_imb{args.imb:g}" if isinstance(args.imb, float) else "")
        args.out = f"runs/{'base' if args.no_more else 'more'}_{args.loss}_{name}_{args.arch}_seed{args.seed}"
    clip = args.arch.startswith("clip:")
    if args.head == "text" and not (clip and (args.weights or args.pretrained) and data.class_names != [str(c) for c in range(data.num_classes)]):
        raise InputError("--head text: needs --arch clip:..., real weights (--pretrained or --weights) and a dataset that knows its class names")
    both = not args.no_more and args.amplitude > 0  # else one pass a step
    mean, std = (v.to(device) for v in (CLIP_STATS if clip else channel_stats(data.train.images)))
    steps = batches_in(len(data.train), args.batch_size)
    images, labels = on_device(data.train.images, device), torch.from_numpy(data.train.labels).to(device)
    env = argparse.Namespace(
        args=args, device=device, rank=rank, world=world, crop=data.crop, bf16=use_bf16(args.precision, device),
        counts=counts, groups=groups, num_classes=data.num_classes, num_images=len(data.train), db=DB_COCO if data.name == "coco_mlt" else {}, mean=mean, std=std,
        prior=torch.tensor(counts / counts.sum(), dtype=torch.float32, device=device), counts_t=torch.tensor(counts, dtype=torch.float32, device=device),
        deferred=torch.tensor(effective_weights(counts), dtype=torch.float32, device=device))

    if not both:
        print(f"{'--no-more' if args.no_more else '--amplitude 0'}: no discrepancy loss" + (", no low-rank term" if args.no_more else "")
              + "; flags that shape them have no effect")

    # ---- model: every weight W_g + B A, at the start exactly the plain network
    torch.manual_seed(args.seed)
    model = build_model(args.arch, data.num_classes, args.weights or args.pretrained, args.size)
    if args.head == "text":
        model.text_head(data.class_names)
    model = share_batchnorm(model, world, device).to(device, memory_format=torch.channels_last)
    check_size(model, args.arch, data.side)
    if not args.no_more:
        add_low_rank(model.visual if clip else model, args.rank_ratio, args.low_rank_init, args.low_rank_only)
    optimizer = make_optimizer(model, args)
    env.network = distribute(TwoPasses(model, args.detach_general), world, device)
    step = make_step(optimizer, env)
    out = Path(args.out)
    print(f"{args.arch}, {'plain' if args.no_more else 'W_g + B A'}, {sum(p.numel() for p in model.parameters()):,} parameters in training; "
          f"{args.loss}; {device}, {'bf16' if env.bf16 else 'fp32'}, batch {args.batch_size}{f' over {world} processes' if world > 1 else ''}, "
          f"rate {args.lr:g}, seed {args.seed}, split seed {args.split_seed}; writes {out}", flush=True)
    epoch, begun, report = 0, None, {"log": [], "shares": [], "train_seconds": 0.0, "images": 0}
    if args.resume and (state := load_checkpoint(out / "last.pt")) is not None:
        check_same_run(state, args, counts, out / "last.pt")
        epoch, report, begun = state["epoch"], state["report"], state["begun"]
        model.load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
        set_random_state(state["rng"], device)
    elif args.resume:
        print(f"nothing to resume in {out}: starting from the beginning")
    elif list(out.glob("last.pt*")):
        raise InputError(f"--out {out} holds a run: add --resume to go on with it, or give another folder, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made a folder ({error.strerror}); give another") from None

    def save(begun=None):
        """begun: (steps done, sums, seconds) of an epoch that was cut short."""
        if rank == 0:
            save_checkpoint(out / "last.pt", {"args": vars(args), "epoch": epoch, "counts": counts.tolist(), "report": report, "begun": begun,
                                              "model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": random_state(device)})
        if should_stop(world, device) or begun:  # the question first: it waits for the process that writes
            print(f"stopped at epoch {epoch}: go on with --resume", flush=True)
            sys.exit(EXIT_STOPPED)

    # ---- training
    classes = np.arange(len(data.train)) if args.sampling == "natural" else data.train.labels  # natural: every image is a class of its own, a shuffle
    each = len(data.train) if args.sampling == "natural" else data.num_classes
    sampler = ClassSampler(classes, np.full(each, 1 / each), len(data.train), args.seed)
    print(f"drawn: {'recall' if data.multi_label else 'accuracy'} on the training images of the epoch, %")
    print(f"{'epoch':>8}{'loss':>8}{'discrep.':>10}{'|BA|/|W|':>9}   drawn:{'many':>6}{'medium':>8}{'few':>8}{'all':>8}   val:{'all':>6}{'img/s':>8}{'left':>10}")
    while epoch < args.epochs:
        start = clock(device)
        sampler.set_epoch(epoch)
        first, before, earlier = begun or (0, torch.zeros(5, env.num_classes), 0.0)
        begun, plan = None, schedule(args, data.num_classes, epoch * steps, steps, args.epochs * steps)
        batches = training_batches(images, labels, sampler.indices(), args.batch_size, args.aug, [args.seed, epoch], mean, std, first, rank, world,
                                   args.workers, data.crop)
        sums, done = train(model, step, plan[first:], batches, env)
        sums = all_sum(sums, world) + before.to(device)
        if not torch.stack([sums.sum(), *(p.sum() for p in model.parameters())]).isfinite().all():
            if rank == 0:
                print(f"error: the loss became {sums[3:, 0].sum().item()} or a weight infinite in epoch {epoch + 1}; the last checkpoint is kept: lower --lr or --amplitude "
                      "and start again, or look at the data", file=sys.stderr)
            sys.exit(3)
        seconds = earlier + clock(device) - start
        if first + done < steps:  # told to stop
            save(begun=(first + done, sums, seconds))
        drawn, correct, apart, loss, extra = sums.cpu().double().numpy()
        n = np.where(drawn > 0, drawn, np.nan)
        learned, gaps = group_means(100 * correct / n, groups), group_means(apart / n if both else np.full(len(counts), np.nan), groups)
        epoch += 1
        report["train_seconds"] += seconds
        report["images"] += len(data.train)
        val = None
        if len(data.val) and (epoch % 10 == 0 or epoch == args.epochs):
            val = evaluate(predict(model, data.val.images, env), data.val, env)["all"]
        share = low_rank_share(model)
        left = (args.epochs - epoch) * report["train_seconds"] / epoch
        seen = min(steps * args.batch_size, len(data.train))  # a short last batch is left out
        row = {"epoch": epoch, "loss": float(loss[0] / seen), "discrepancy_loss": float(extra[0] / seen) if both else None,
               "weight": plan[0][1], "lr": plan[0][0],
               "low_rank_share": float(np.mean(list(share.values()) or [0.0])), **{f"drawn_{g}": v for g, v in learned.items()},
               **{f"discrepancy_{g}": gaps[g] for g in GROUPS}, "val_all": val, "images_per_second": len(data.train) / seconds}
        report["log"].append(row)
        report["shares"].append({"epoch": epoch} | share)
        print(f"{epoch:>4}/{args.epochs:<4}{row['loss']:7.3f}{float(extra[0] / seen):10.5f}{row['low_rank_share']:9.4f}{'':7}"
              + "".join(f"{show(learned[g]):>8}" for g in (*GROUPS, "all")) + f"{'':6}{show(val):>7}{row['images_per_second']:8.0f}{left / 60:6.1f} min", flush=True)
        if rank == 0:
            write_log(out / "log.csv", report["log"])
            if share:
                write_log(out / "low_rank_share.csv", report["shares"])  # |B A| / |W_g|, a column a layer
        save()

    # ---- evaluation: the general path alone, the whole, and the merged network, which must be the same; a stop is at once from here on
    stop_at_once()
    start, bf16 = clock(device), env.bf16
    full = predict(model, data.test.images, env)
    seconds = clock(device) - start
    results, merged_diff, share, ends = {"test": evaluate(full, data.test, env)}, None, low_rank_share(model), {}
    if len(data.val):
        results["val"] = evaluate(predict(model, data.val.images, env), data.val, env)
    if not args.no_more:
        with general_only(model):
            for name, split in (("test", data.test), ("val", data.val)):
                if len(split):
                    results[f"general path alone, {name}"] = evaluate(predict(model, split.images, env), split, env)
        torch.backends.cudnn.allow_tf32 = False
        env.bf16, sample, split = False, data.test.images[:256], data.val if len(data.val) else data.test
        ends = discrepancy_by_group(model, split, env)
        before = predict(model, sample, env)
        merge_low_rank(model)
        merged_diff = float((predict(model, sample, env) - before).abs().max())
    if rank:
        return None
    columns = (*GROUPS, "all", *(("of1", "cf1") if data.multi_label else ("ece",)))
    print(f"\n{'mAP, %' if data.multi_label else 'top-1, %':34}" + "".join(f"{g:>8}" for g in columns))
    for label, acc in results.items():
        print(f"{label:34}" + "".join(f"{show(acc[g]):>8}" for g in columns))
    if merged_diff is not None:
        print(f"merged and unmerged logits of {len(sample)} test images (fp32) differ by {merged_diff:.1e} at most"
              + ("" if merged_diff < 1e-5 else ": MORE THAN ROUNDING, look at the logits' size"))
    if share:
        print("\n|BA| / |W_g| by layer: " + "  ".join(f"{k} {v:.3f}" for k, v in share.items()))
        if ends["few"] is not None and ends["many"] is not None and args.amplitude > 0:
            print(f"discrepancy at the end (fp32, {'validation' if len(data.val) else 'test'} images), few {ends['few']:.4g} against many "
                  f"{ends['many']:.4g}: " + ("as claimed" if ends["few"] > ends["many"] else "NOT as the paper claims"))

    # ---- files
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    if args.export:
        write_atomic(out / "merged.pt", lambda tmp: torch.save(state, tmp))
    write_atomic(out / "model.pt", lambda tmp: torch.save({"arch": args.arch, "class_names": data.class_names, "mean": mean.cpu(), "std": std.cpu(),
                                                            "model": state}, tmp))
    acc = results["test"]
    result = {"method": "base" if args.no_more else "more", "dataset": args.dataset, "imb": args.imb, "arch": args.arch, "seed": args.seed,
              "split_seed": args.split_seed, "epochs": args.epochs, "args": vars(args), "acc": {g: acc[g] for g in (*GROUPS, "all")},
              "per_class": acc["per_class"], "ece": acc["ece"], "metric": "mAP" if data.multi_label else "top-1", "results": results, "merged_max_abs_diff": merged_diff, "low_rank_share": share, "discrepancy_by_group": ends,
              "images_per_second": report["images"] / report["train_seconds"], "train_seconds": report["train_seconds"], "eval_seconds": seconds,
              "precision": "bf16" if bf16 else "fp32", "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
              "torch": torch.__version__, "git": commit}
    write_json(out / "result.json", result)
    if not args.no_more:
        draw_figures(report["log"], out)
    print(f"\nresult: {out / 'result.json'}")
    return result


if __name__ == "__main__":
    run_script(main)
