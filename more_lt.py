# SPDX-License-Identifier: MIT
"""MORE: Long-tailed Recognition with Model Rebalancing (Luo et al., NeurIPS 2025, arXiv 2510.08177), in one file.

Every weight is W_g + B A. A second forward pass with W_g alone must agree with the full one, the more so the more
frequent an image's class is and by a weight that rises and falls as a sine over the training: frequent classes move
into W_g, the low-rank term is left to the rare ones. After training B A is merged into W_g: the network and its cost
are the plain ones. The equations are given here as known at second hand; the paper's text was not at hand.

    python more_lt.py --dataset synth                                             a minute on two CPU cores
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --data-root data   on top of balanced softmax
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --no-more          the paired baseline
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --resume           go on after an interruption
"""
import argparse
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import StochasticDepth, sigmoid_focal_loss

from data_lt import (GROUPS, RANK, InputError, crop_flip, describe, expected_calibration_error, group_accuracy,
                     group_means, load_dataset, mixup, normalize, number, reading, shifted)
from models import (all_sum, autocast, build_model, clock, distribute, fill_in, learning_rates, plain_state, ready,
                    run_script, script_parser, start, stop_unless_finite)
from models import LowRank, add_low_rank, general_only, merge_low_rank

CLIP_STATS = torch.tensor([122.7709, 116.7460, 104.0937]), torch.tensor([68.5005, 66.6322, 70.3232])  # open_clip's

# Defaults by dataset; every value is a flag.
LARGE = dict(arch="resnet50", batch_size=256)
SEVERAL = dict(arch="resnet50", epochs=80, lr=0.02, batch_size=32, pretrained=1, warmup=0)
RECIPES = {
    "cifar10": dict(mixup=0.4),
    "cifar100": dict(mixup=0.4),
    "synth": dict(arch="resnet20", epochs=24, lr=0.05, batch_size=32, aug="basic", warmup=1),
    "imagenet_lt": LARGE,
    "places_lt": LARGE | dict(arch="resnet152", pretrained=1),
    "inat18": LARGE,
    "folder": LARGE,
    "voc_mlt": SEVERAL,
    "coco_mlt": SEVERAL,
    "miml": SEVERAL,
    "nuswide_scene": SEVERAL | dict(epochs=40),
    "clip": dict(epochs=20, lr=1e-5, batch_size=64, aug="basic", pretrained=1, optimizer="adamw", warmup=0),
    "default": dict(arch="resnet32", epochs=200, lr=0.1, batch_size=128, aug="strong", warmup=5, mixup=0.0,
                    pretrained=0, optimizer="sgd"),
}

# ------------------------------------------------------------------------------------ base losses, which MORE is put on

def balanced_softmax(logits, target, counts):
    """CE(f + log N_c, y), the mean (Ren et al., NeurIPS 2020): logit adjustment with tau 1. counts: (K,) tensor or
    array."""
    return F.cross_entropy(logits + torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).log(), target)

def focal_loss(logits, target, gamma=2.0):
    """Mean of (1 - p_y)^gamma * CE (Lin et al., ICCV 2017). target: int (n,), or 0/1 n x K with a coin for each
    label."""
    if target.dim() == 2:
        return sigmoid_focal_loss(logits, target.to(logits), alpha=-1, gamma=gamma, reduction="mean")
    ce = F.cross_entropy(logits, target, reduction="none")
    return ((1 - (-ce).exp()) ** gamma * ce).mean()

def ldam_loss(logits, target, counts, max_margin=0.5, weight=None):
    """Label-distribution-aware margins, N_c^(-1/4) with the largest max_margin (Cao et al., NeurIPS 2019), on a plain
    linear head: the margin is taken off the true class's logit and nothing is scaled (the paper's cosine head times 30
    makes the margins far stronger). weight: (K,) class weights for the deferred re-weighting, of mean 1 over the
    training images."""
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    margins = counts.clamp_min(1) ** -0.25
    margins = margins * (max_margin / margins.max())
    ce = F.cross_entropy(logits - F.one_hot(target, len(counts)) * margins, target, reduction="none")
    return (ce if weight is None else torch.as_tensor(weight, dtype=ce.dtype, device=ce.device)[target] * ce).mean()

def effective_weights(counts, beta=0.9999):
    """Class weights (1 - beta) / (1 - beta^N_c), float array (K,) (Cui et al., CVPR 2019): LDAM-DRW's re-weighting.
    Their mean over the images, weighted by counts (K,), is 1."""
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 1)
    weights = (1 - beta) / (1 - beta ** counts)
    return weights * counts.sum() / (weights * counts).sum()

def asymmetric_loss(logits, target, gamma_pos=0.0, gamma_neg=4.0, margin=0.05):
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7), the mean over n x K: positives -(1 - p)^gamma_pos log p,
    negatives -q^gamma_neg log(1 - q) with q = max(p - margin, 0). target: 0/1 n x K. (Its code sums where this takes
    the mean.)"""
    p = logits.sigmoid()
    q = (p - margin).clamp_min(0)
    positive = (1 - p) ** gamma_pos * F.logsigmoid(logits)
    negative = q ** gamma_neg * torch.log1p(-q.clamp_max(1 - 1e-7))
    return -torch.where(target > 0, positive, negative).mean()

def distribution_balanced_loss(logits, target, counts, total, alpha=0.1, beta=10.0, mu=0.3, kappa=0.05, scale=5.0,
                               gamma=2.0):
    """Distribution-balanced loss (Wu et al., ECCV 2020), the mean over n x K; the values are its code's for VOC-MLT.

    Re-balanced weight: r = (1 / N_k) / sum over the image's labels of 1 / N_j, smoothed to alpha + sigmoid(beta (r -
    mu)). Negative-tolerant logits: z - nu_k, nu_k = kappa log(total / N_k - 1) / scale, for negatives times scale and
    their loss over it. gamma > 0 makes it its focal form, which the code doubles. The weights take class-aware draws
    for granted. target: 0/1 n x K; counts: (K,); total: training images.
    """
    counts, y = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).clamp_min(1), target.to(logits)
    r = (1 / counts) / (y @ (1 / counts)).clamp_min(1e-12)[:, None]
    weight = alpha + torch.sigmoid(beta * (r - mu))
    nu = kappa * torch.log((total / counts - 1).clamp_min(1e-6)) / scale
    z = (logits - nu) * torch.where(y > 0, 1.0, scale)
    ce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    focal = 2 * (1 - (-ce).exp()) ** gamma if gamma > 0 else 1.0
    return (focal * weight * ce * torch.where(y > 0, 1.0, 1 / scale)).mean()

def base_losses(data, deferred=False):
    """{name of --loss: loss(logits, target)} for a dataset: one label an image, or several. deferred: ldam's
    re-weighting is on."""
    if data.multi_label:
        coco = dict(mu=0.2, scale=2.0) if data.name == "coco_mlt" else {}  # Wu et al.'s values for it
        db = partial(distribution_balanced_loss, counts=data.counts_t, total=len(data.train), **coco)
        bce = lambda z, y: F.binary_cross_entropy_with_logits(z, y.to(z))
        return {"bce": bce, "focal": focal_loss, "asl": asymmetric_loss, "db": db}
    weight = torch.tensor(effective_weights(data.counts), dtype=torch.float32, device=data.device) if deferred else None
    return {"ce": F.cross_entropy, "bsce": partial(balanced_softmax, counts=data.counts_t), "focal": focal_loss,
            "ldam": partial(ldam_loss, counts=data.counts_t, weight=weight)}

class ClipClassifier(torch.nn.Module):
    """The image tower of a CLIP model of open_clip ("clip:ViT-B-16", "clip:RN50") and a linear head on its normalised
    features, times 1 / 0.07. Raises InputError without open_clip or such a model.

    pretrained: falsy, 1 (OpenAI's weights: downloads) or a file. size: pixels of a side. class_names: start the head at
    the text features of "a photo of a NAME." (Radford et al., ICML 2021). `visual` is open_clip's own module.
    """

    def __init__(self, arch, num_classes, pretrained=None, size=None, class_names=None):
        super().__init__()
        name, openai = arch.removeprefix("clip:"), pretrained in (1, True)
        with reading(f"--arch {arch}", "pip install open_clip_torch; take clip:ViT-B-16 or RN50, --weights by hand"):
            import open_clip
            clip = open_clip.create_model(name, pretrained="openai" if openai else pretrained or None,
                                          force_image_size=size, force_quick_gelu=openai).eval()  # as it was trained
            self.visual, tokens = clip.visual, open_clip.get_tokenizer(name)
        with torch.no_grad():
            width = self.visual(torch.zeros(1, 3, *np.broadcast_to(self.visual.image_size, 2))).shape[1]
            self.head = torch.nn.Linear(width, num_classes)
            if class_names:
                text = clip.encode_text(tokens([f"a photo of a {n.replace('_', ' ')}." for n in class_names]))
                self.head.weight.copy_(F.normalize(text, dim=1))
                self.head.bias.zero_()

    def forward(self, x):
        return self.head(F.normalize(self.visual(x), dim=1)) / 0.07

# -------------------------------------------------------------------------------- Model Rebalancing (MORE): W_g and B A

def sinusoidal_weight(step, total, amplitude):
    """a(t) = A sin(pi t / T): the weight of the discrepancy loss after `step` of `total` steps. The paper's A is A' x
    classes, A' = 2."""
    return amplitude * math.sin(math.pi * step / total)

def discrepancies(full, general, kind="l2", multi_label=False):
    """D by logit, n x K; an image's discrepancy is the sum over its row. full, general: n x K logits of W_g + B A and
    of W_g. "l2": squared difference; "mse": the same over K, a mean over the logits. "kl": p log(p / q) of the two
    softmaxes, or of the two coins of each label."""
    if kind in ("l2", "mse"):
        return (full - general).square() / (full.shape[1] if kind == "mse" else 1)
    if multi_label:
        p, q = full.sigmoid(), [F.logsigmoid(s * general) for s in (1, -1)]
        return p * (F.logsigmoid(full) - q[0]) + (1 - p) * (F.logsigmoid(-full) - q[1])
    return F.kl_div(general.log_softmax(1), full.log_softmax(1), log_target=True, reduction="none")

def more_loss(full, general, prior, target, discrepancy="l2", prior_weight="sample"):
    """L_MORE = mean over the batch of prior(y) x discrepancy of the two passes' logits, without the schedule; a scalar.

    full, general: n x K. prior: (K,) class frequencies, a tensor or array (several labels: shares of all labels).
    target: int (n,), or 0/1 n x K with several labels an image: an image's weight is then the mean prior of its labels
    ("sample"), or each logit's difference is weighted by its own class's prior ("class").
    """
    terms = discrepancies(full, general, discrepancy, target.dim() == 2)
    prior = torch.as_tensor(prior, dtype=terms.dtype, device=terms.device)
    if target.dim() == 2 and prior_weight == "class":
        return (terms @ prior).mean()
    weight = prior[target] if target.dim() == 1 else target.to(terms) @ prior / target.sum(1).clamp_min(1)
    return (weight * terms.sum(1)).mean()

class TwoPasses(torch.nn.Module):
    """x -> (logits of W_g + B A, logits of W_g or None), as one forward: what DistributedDataParallel can wrap."""

    def __init__(self, model, both, detach_general=False):
        super().__init__()
        self.model, self.both, self.detach_general = model, both, detach_general
        drops = (torch.nn.modules.dropout._DropoutNd, torch.nn.MultiheadAttention, StochasticDepth)
        self.random = both and any(isinstance(m, drops) for m in model.modules())

    def forward(self, x):
        with torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=self.random):  # the same units drop
            full = self.model(x)
        if not self.both:
            return full, None
        with general_only(self.model), torch.set_grad_enabled(not self.detach_general):
            return full, self.model(x)

def train(network, optimizer, batches, plan, losses, data, args, rng):
    """A step a batch of (x, y) by `plan`, (learning rate, weight of the discrepancy loss a(t), whether ldam's
    re-weighting has begun). losses: the base loss before and after. Returns (5, K): images drawn, correct (of several
    labels: found) and discrepancy by class; base loss and discrepancy loss times images, the same in the whole row."""
    network.train()
    sums = torch.zeros(5, data.num_classes, device=data.device)
    for (x, y), (rate, weight, deferred) in zip(batches, plan):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, other, lam = mixup(x, y, args.mixup, rng)
        with autocast(data.device, args.precision):
            full, general = network(x)
        logits = full.float()
        loss, extra, apart = losses[deferred](logits, y), logits.new_zeros(()), logits.new_zeros(len(x))
        if lam < 1:
            loss = lam * loss + (1 - lam) * losses[deferred](logits, other)
        if general is not None:
            general = general.float()
            extra = more_loss(logits, general, data.prior, y, args.discrepancy, args.prior_weight)
            apart = discrepancies(logits.detach(), general.detach(), args.discrepancy, data.multi_label).sum(1)
        optimizer.zero_grad()
        (loss + weight * extra).backward()
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            truth = y.float() if data.multi_label else F.one_hot(y, data.num_classes).float()
            right = (logits > 0).float() if data.multi_label else (logits.argmax(1) == y).float()[:, None]
            sums[:3] += torch.stack([truth.sum(0), (truth * right).sum(0), (truth * apart[:, None]).sum(0)])
            sums[3:] += torch.stack([loss, extra])[:, None] * len(x)
    return all_sum(sums)

def make_optimizer(model, args):
    """SGD with Nesterov momentum 0.9, or AdamW; the low-rank factors have a weight decay of their own."""
    factors = {p for m in model.modules() if isinstance(m, LowRank) for p in (m.A, m.B)}
    groups = [{"params": [p for p in model.parameters() if p not in factors], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p in factors], "weight_decay": args.low_rank_decay}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)

@torch.no_grad()
def low_rank_share(model):
    """|B A| / |W_g| (Frobenius) of each layer, {name: float}: a term that stays at zero does nothing."""
    terms = {f"{name}.{weight}": parts for name, m in model.named_modules()
             for weight, parts in getattr(m, "parametrizations", {}).items() if isinstance(parts[0], LowRank)}
    return {name: float((t[0].B @ t[0].A).norm() / t.original.norm()) for name, t in terms.items()}

def fit(model, data, args, run):
    """Train W_g and B A together; goes on from run.state."""
    both, epochs = not args.no_more and args.amplitude > 0, args.epochs  # without the loss one pass a step
    optimizer, network = make_optimizer(model, args), distribute(TwoPasses(model, both, args.detach_general))
    if run.state:
        optimizer.load_state_dict(run.state["optimizer"])
    losses = [base_losses(data, deferred)[args.loss] for deferred in (False, True)]
    alike = None if args.sampling == "natural" else np.full(data.num_classes, 1 / data.num_classes)
    sampler, steps = data.sampler(alike, args.seed), len(data.train) // data.batch_size
    peak, total = args.amplitude * data.num_classes * both, epochs * steps  # A = A' C
    print(f"\n{args.loss}: {epochs} epochs, rate {args.lr:g} cosine; accuracy (several labels: recall) on the images "
          "drawn, and val")
    for epoch in range(run.state.get("epoch", 0), epochs):
        began, key = clock(data.device), [args.seed, 1, 1, epoch]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        rates = learning_rates(args.lr, epoch, epochs, steps, "cosine", args.warmup)
        batches, rng = data.batches(sampler.set_epoch(epoch).indices(), key), np.random.default_rng([*key, RANK])
        at = range(epoch * steps, (epoch + 1) * steps)
        weights = [sinusoidal_weight(s, total, peak) if args.schedule == "sin" else peak for s in at]
        plan = zip(rates, weights, [s >= 0.8 * total for s in at])  # LDAM-DRW: re-weighting in the last fifth
        sums = train(network, optimizer, batches, plan, losses, data, args, rng)
        stop_unless_finite(sums[3:, 0].sum(), model, f"epoch {epoch + 1}", "--lr or --amplitude")
        drawn, correct, apart, loss, extra = sums.cpu().double().numpy()
        acc = group_means(100 * correct / np.where(drawn > 0, drawn, np.nan), data.groups)
        gaps, share = group_means(apart / np.where(drawn > 0, drawn, np.nan), data.groups), low_rank_share(model)
        seconds, n, val = clock(data.device) - began, steps * data.batch_size, None
        if epoch % 10 == 9 or epoch + 1 == epochs:
            val = scored(predict(model, data.val.images, data, args)[0], data.val, data, args)["all"]
        run.log({"epoch": epoch + 1, "loss": loss[0] / n, "rate": rates[0], **acc, "val": val, "a(t)": weights[0],
                 "L_MORE": extra[0] / n, "|BA|/|W|": float(np.mean([*share.values()] or [0.0])),
                 **{f"D {g}": gaps[g] for g in GROUPS}}, n, seconds, n * epochs)
        run.save(model, optimizer, epoch=epoch + 1)

# ----------------------------------------------------------------------------------- test time: merged, a plain network

def average_precision(scores, targets):
    """Average precision of each class, (K,) in 0..1, NaN where a class has no positive: the sum over thresholds of
    precision times the gain in recall, images of equal score counted together (scikit-learn's definition). scores:
    float N x K; targets: 0/1 N x K."""
    ordered, order = scores.T.contiguous().sort(1, descending=True)  # K x N
    hits = targets.T.gather(1, order).double()
    above = torch.searchsorted(-ordered, -ordered, right=True)  # images with at least this score
    return (hits.cumsum(1).gather(1, above - 1) / above * hits).sum(1) / hits.sum(1)

def f1_scores(scores, targets):
    """(OF1, CF1) in percent of the labels with a positive logit: F1 of all decisions together, and of the mean
    precision and recall of the classes that have a positive. scores: logits N x K; targets: 0/1 N x K."""
    chosen, truth = scores > 0, targets > 0
    hit, said, there = (v.double().sum(0) for v in (chosen & truth, chosen, truth))
    cp, cr = (hit / said.clamp_min(1))[there > 0].mean(), (hit / there)[there > 0].mean()
    return float(200 * hit.sum() / (said.sum() + there.sum())), float(200 * cp * cr / (cp + cr).clamp_min(1e-12))

@torch.no_grad()
def predict(model, images, data, args, views=0):
    """Logits of the images and of `views` random crop-and-flip views of each, (1 + views) x N x K on the device. The
    views depend on --seed alone, so every model sees the same. images: uint8 array N x H x W x 3, or ImageFiles.
    Processes share the work."""
    model.eval()
    out = torch.zeros(1 + views, len(images), data.num_classes, device=data.device)
    for begin, x in data.test_batches(images):
        rngs = [np.random.default_rng([args.seed, 3, v, begin]) for v in range(1, 1 + views)]
        stacked = torch.cat([x] + [crop_flip(x, rng, x.shape[-1] // 8) for rng in rngs])
        with autocast(data.device, args.precision):
            logits = model(normalize(stacked, data.mean, data.std)).float()
        out[:, begin:begin + len(x)] = logits.view(1 + views, len(x), -1)
    return all_sum(out)

def scored(logits, split, data, args):
    """Top-1 accuracy by group, per class and as --test-shift asks, and ECE, from logits N x K; with several labels an
    image average precision (their mean is mAP), OF1 and CF1. Nothing but None where the split is empty."""
    if not len(split):
        return dict.fromkeys((*GROUPS, "all", "per_class"))
    if data.multi_label:
        labels = torch.from_numpy(split.labels).to(logits.device)
        ap, (of1, cf1) = (100 * average_precision(logits, labels)).cpu().numpy(), f1_scores(logits, labels)
        listed = [None if math.isnan(v) else float(v) for v in ap]
        acc, ece = group_means(ap, data.groups) | {"per_class": listed, "of1": of1, "cf1": cf1}, None
    else:
        ece = expected_calibration_error(logits.softmax(1), torch.from_numpy(split.labels).to(logits.device))
        acc = group_accuracy(logits.argmax(1).cpu(), split.labels, data.counts)
    return acc | shifted(acc["per_class"], data.counts, args.test_shift) | {"ece": ece}

def discrepancy_by_group(full, general, split, data, kind):
    """Mean discrepancy of two passes' logits N x K by class group, {"many", "medium", "few", "all"}."""
    apart = discrepancies(full, general, kind, data.multi_label).sum(1)
    labels = torch.from_numpy(split.labels).to(full.device)
    truth = labels.float() if data.multi_label else F.one_hot(labels, data.num_classes).float()
    return group_means((truth.T @ apart / truth.sum(0)).cpu().numpy(), data.groups)

def test_time(model, data, args, run):
    """The network on the test images, W_g alone beside it, and B A merged into W_g, which must change nothing. Adds to
    run.report."""
    began, report, several = clock(data.device), run.report, f", mean of {1 + args.views} views"
    views = predict(model, data.test.images, data, args, args.views)
    report["eval_seconds"], report["merged_max_abs_diff"] = clock(data.device) - began, None
    report["low_rank_share"], report["discrepancy_by_group"] = low_rank_share(model), {}
    rows = report["results"] = {"test": scored(views[0], data.test, data, args),
                                "test" + several: scored(views.mean(0), data.test, data, args)}
    if args.loss == "ce":  # its prior taken off after training: the bar for whatever else is done about it
        adjusted = views.log_softmax(2) - data.prior.log()
        rows["test, logit-adjusted"] = scored(adjusted[0], data.test, data, args)
        rows["test, logit-adjusted" + several] = scored(adjusted.mean(0), data.test, data, args)
    rows["val"] = scored(predict(model, data.val.images, data, args)[0], data.val, data, args)
    if args.no_more:
        return
    exact, split = argparse.Namespace(**vars(args) | {"precision": "fp32"}), data.val if len(data.val) else data.test
    torch.backends.cudnn.allow_tf32 = False  # bf16's and TF32's rounding is larger than a small B A
    full = predict(model, split.images, data, exact)[0]
    with general_only(model):
        general = predict(model, split.images, data, exact)[0]
        rows["test, W_g alone"] = scored(predict(model, data.test.images, data, args)[0], data.test, data, args)
        rows["val, W_g alone"] = scored(predict(model, data.val.images, data, args)[0], data.val, data, args)
    report["discrepancy_by_group"] = discrepancy_by_group(full, general, split, data, args.discrepancy)
    merge_low_rank(model)
    report["merged_max_abs_diff"] = float((predict(model, split.images, data, exact)[0] - full).abs().max())

# --------------------------------------------------------------------------------------------------------------- report

def show_report(report, args, run):
    """The tables and figures of this run."""
    rows = {label: acc for label, acc in report["results"].items() if acc["all"] is not None}
    columns = (*GROUPS, "all", *(("of1", "cf1") if "of1" in rows["test"] else ("ece",)), *args.test_shift)
    run.show("accuracy_by_group", "mAP, %" if "of1" in rows["test"] else "Top-1, %", rows, columns)
    if report["merged_max_abs_diff"] is not None:
        ends = {f"epoch {row['epoch']}": {g: row[f"D {g}"] for g in GROUPS}
                for row in report["log"][::max(1, len(report["log"]) // 6)]}
        ends["at the end, fp32"] = report["discrepancy_by_group"]
        run.show("discrepancy_by_group", "Discrepancy of the full and the general pass", ends, GROUPS, ".3g")
        print("|BA| / |W_g| by layer: " + "  ".join(f"{k} {v:.3f}" for k, v in report["low_rank_share"].items()))
        diff = report["merged_max_abs_diff"]
        print(f"merged and unmerged logits (fp32) differ by {diff:.1e} at most" + ": TOO MUCH" * (diff > 1e-4))

# ------------------------------------------------------------------------------------------------------- flags and main

def parse_args(argv=None):
    """Flags; what is not given comes from RECIPES. Raises InputError for values out of range."""
    parser = script_parser("Model Rebalancing (MORE) for long-tailed recognition", "write the merged network")
    add = parser.add_argument_group("training").add_argument
    add("--loss", choices=["ce", "bsce", "ldam", "focal", "bce", "asl", "db"], help="base loss: ce, bsce, ldam, focal; "
        "several labels an image: bce, focal, asl, db (default ce, bce). ldam: on a plain head, weaker than published")
    add("--sampling", choices=["natural", "class-aware"], help="class-aware: a class at random, then an image of it "
        "(default natural; db: class-aware)")
    add("--head", choices=["linear", "text"], default="linear", help="clip: start at random or at the classes' names")
    add("--optimizer", choices=["sgd", "adamw"], help="SGD with Nesterov momentum, or AdamW")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--lr", type=number(above=0), help="peak rate; cosine to 0")
    add = parser.add_argument_group("method").add_argument
    add("--no-more", action="store_true", help="the base loss alone, on plain weights: the paired baseline")
    add("--amplitude", type=number(least=0), default=2.0, help="A', times classes the peak weight; 0: no loss")
    add("--rank-ratio", type=number(above=0, most=1), default=0.1, help="rank over the smaller side of a weight")
    add("--discrepancy", choices=["l2", "mse", "kl"], default="mse", help="of the passes' logits: squared distance "
        "(the paper's), the same as a mean over the logits, or KL")
    add("--prior-weight", choices=["sample", "class"], default="sample", help="several labels: mean or each logit's")
    add("--schedule", choices=["sin", "constant"], default="sin", help="of the loss weight")
    add("--detach-general", action="store_true", help="no gradient through the general pass: cheaper")
    add("--low-rank-init", choices=["zero", "svd"], default="zero", help="start of B A")
    add("--low-rank-decay", type=number(least=0), default=0.0, help="weight decay of A and B; 5e-4 keeps B A near zero")
    args = parser.parse_args(argv)
    fill_in(args, RECIPES, "clip" if (args.arch or "").startswith("clip:") else None)
    return args

def check(args, data):
    """Settle --loss and --sampling for the data. Raises InputError for flags that do not go together."""
    args.loss = args.loss or ("bce" if data.multi_label else "ce")
    if args.loss not in base_losses(data):
        raise InputError(f"--loss {args.loss}: {data.name} has {'several labels' if data.multi_label else 'one label'} "
                         f"an image; take {', '.join(base_losses(data))}")
    args.sampling = args.sampling or ("class-aware" if args.loss == "db" else "natural")
    if args.sampling == "class-aware" and args.loss in ("bsce", "ldam"):
        raise InputError(f"--sampling class-aware: --loss {args.loss} corrects for the counts itself; take ce or focal")
    if args.prior_weight == "class" and not data.multi_label:
        raise InputError("--prior-weight class: for several labels an image; leave it out")
    named, real = data.class_names != [str(c) for c in range(data.num_classes)], args.weights or args.pretrained
    if args.head == "text" and not (args.arch.startswith("clip:") and real and named):
        raise InputError("--head text: needs --arch clip:.., real weights (--pretrained 1, --weights) and class names")

def main(argv=None):
    """Decompose, train with two passes, merge, evaluate."""
    args = parse_args(argv)
    device, clip = start(args), args.arch.startswith("clip:")
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    describe(data, args.split_seed)
    data.to(device, args.batch_size, args.aug, args.workers, CLIP_STATS if clip else None)
    check(args, data)
    torch.manual_seed(args.seed)
    named = {"size": args.size, "class_names": args.head == "text" and data.class_names} if clip else {}
    build = ClipClassifier if clip else build_model
    model = build(args.arch, data.num_classes, args.weights or args.pretrained, **named)
    if not args.no_more:  # every weight W_g + B A, at the start exactly the plain network
        add_low_rank(model.visual if clip else model, args.rank_ratio, args.low_rank_init)
    model, run = ready(model, data, args, f"{'base' if args.no_more else 'more'}_{args.loss}")

    fit(model, data, args, run)
    test_time(model, data, args, run)

    show_report(run.report, args, run)
    report, state = run.report, plain_state(model)
    exports = {"merged.pt": state} if args.export else {}
    kept = ("results", "merged_max_abs_diff", "low_rank_share", "discrepancy_by_group", "eval_seconds")
    result = {"method": "base" if args.no_more else "more", "metric": "mAP" if data.multi_label else "top-1"}
    saved = {"model.pt": {"model": state}}
    return run.finish(result | {k: report[k] for k in kept}, report["results"]["test"], data, saved, exports)

if __name__ == "__main__":
    run_script(main)
