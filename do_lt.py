# SPDX-License-Identifier: MIT
"""DO: Decoupled Optimisation for Long-Tailed Visual Recognition (Cong et al., AAAI 2024, 38(2), 1380-1388), in one file.

A network is trained in stages, for many-, medium- and few-shot classes, each with its own draws and margin (CPO). After a stage a
Taylor score decides which weights the stage keeps, frozen; the others start afresh in the next (TPD). The nested sub-models are
mixed with weights found for each test image.

    python do_lt.py --dataset synth                                            a minute on two CPU cores
    python do_lt.py --dataset cifar100 --imb 100 --data-root data              the paper's CIFAR-100-LT recipe
    python do_lt.py --dataset cifar100 --imb 100 --resume                      go on after an interruption
"""
import argparse
import math
import os
import sys
import tempfile
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_lt import (DEFAULT_IMB, GROUPS, ClassSampler, ImageFiles, InputError, add_data_arguments, add_system_arguments, argument_parser, batches_in, center_crop, channel_stats, class_groups,
                     crop_flip, decode_batches, expected_calibration_error, group_accuracy, group_means, known_name, load_dataset,
                     normalize, on_device, show, test_batches,
                     training_batches)
from models import (EXIT_STOPPED, OWNER, Replay, add_owner_masks, all_sum, build_model, check_size, clock, distribute, git_commit,
                    join_processes, keep_stage_norms, limits, load_checkpoint, load_optimizer, measure, random_batch, random_state, report_bench,
                    run_script, save_checkpoint, set_random_state, share_batchnorm, should_stop, stop_at_once, submodel_state, use_bf16, usual_side, weight_layers, write_atomic, write_json, write_log)

# The paper's values ("Implementation Details") but for the later stages' rate: a cosine from the first stage's, where the paper keeps a
# tenth of it (0.005, 0.002); half of the weights start afresh and learn too slowly at that. Every value is a flag; one number a stage.
RECIPES = {
    "cifar100": dict(arch="resnet32", epochs="100,50,50", lr="0.05,0.05,0.05", rho=0.7, gamma="0.5,0.8"),
    "cifar100 imb 50": dict(arch="resnet32", epochs="100,50,50", lr="0.05,0.05,0.05", rho=0.7, gamma="0.5,0.6"),
    "cifar10": dict(arch="resnet32", epochs="100,50,50", lr="0.05,0.05,0.05", rho=0.7, gamma="0.5,0.8"),
    "synth": dict(arch="resnet20", epochs="20,8,8", lr="0.1,0.05,0.05", rho=0.7, gamma="0.5,0.8", batch_size=32, aug="basic", tpd_iters=3),
    "imagenet_lt": dict(arch="resnet50", epochs="100,50,50", lr="0.02,0.02,0.02", rho=0.8, gamma="0.5,0.8"),
    "places_lt": dict(arch="resnet152", epochs="100,50,50", lr="0.02,0.02,0.02", rho=0.8, gamma="0.5,0.8", pretrained=True),
    "inat18": dict(arch="resnet50", epochs="100,50,50", lr="0.02,0.02,0.02", rho=0.8, gamma="0.5,0.6", importance_images=4),
    "folder": dict(arch="resnet50", epochs="100,50,50", lr="0.02,0.02,0.02", rho=0.8, gamma="0.5,0.8"),
}


# -------------------------------------------------------------------------------------- the paper's equations, one function each

def stage_classes(counts, stage):
    """Class indices of a stage's group: many > 100, medium 20..100, few < 20 training images; medium-top and medium-low split
    medium at 50 (Table 6). counts: (K,)."""
    counts = np.asarray(counts)
    groups = class_groups(counts)
    if stage in groups:
        return groups[stage]
    medium = groups["medium"]
    return {"medium-top": medium[counts[medium] >= 50], "medium-low": medium[counts[medium] < 50]}[stage]


def stage_class_probs(counts, stage, rho, few="balanced"):
    """P(class drawn) in a stage, float array (K,), sums to 1 (Eq. 1 and the text above it).

    many: ~ N_c. medium: ~ rho for medium classes, 1 - rho for the others. few: every class alike ("balanced": the paper's 1 / N_y as
    a weight of each image) or ~ 1 / N_c ("inverse").
    """
    counts = np.asarray(counts, dtype=np.float64)
    if stage == "many":
        probs = counts
    elif stage == "few":
        probs = np.ones_like(counts) if few == "balanced" else 1 / counts
    else:
        probs = np.full_like(counts, 1 - rho)
        probs[stage_classes(counts, stage)] = rho
    return probs / probs.sum()


def compensation_alpha(counts, stage, rho):
    """alpha_t by class, float array (K,) (Eq. 3). many: 1. medium: rho for medium classes, 1 - rho for the others (the paper's scalar
    rho cancels in the softmax). few: the label frequencies in reverse order, the rarest class gets the largest."""
    counts = np.asarray(counts, dtype=np.float64)
    if stage == "many":
        return np.ones_like(counts)
    if stage == "few":
        order = np.argsort(-counts, kind="stable")
        alpha = np.empty_like(counts)
        alpha[order] = np.sort(counts) / counts.sum()
        return alpha
    alpha = np.full_like(counts, 1 - rho)
    alpha[stage_classes(counts, stage)] = rho
    return alpha


def compensation_loss(logits, target, log_alpha):
    """CE(f(x) - log alpha_t, y), the mean over the batch (Eq. 2). logits: n x K; target: int (n,); log_alpha: (K,)."""
    return F.cross_entropy(logits.float() - log_alpha, target)


def taylor_importance(weights, class_losses, kind="taylor", generator=None):
    """Importance of each weight to a group of classes, a list of tensors shaped like `weights`.

    class_losses: iterable of scalars L_y, the loss averaged over images of one class y, each with its graph (a generator keeps one
    in memory at a time). "taylor": mean over classes of (w dL_y/dw)^2 ("Methodology"); "fisher": of (dL_y/dw)^2; "l1": |w|;
    "random": uniform (from `generator`). l1 and random look at no loss.
    """
    if kind == "l1":
        return [w.detach().abs() for w in weights]
    if kind == "random":
        return [torch.rand(w.shape, generator=generator).to(w.device) for w in weights]
    scores, n = [torch.zeros_like(w) for w in weights], 0
    for loss in class_losses:
        grads = torch.autograd.grad(loss, weights)
        for score, w, g in zip(scores, weights, grads):
            score += (g * w.detach() if kind == "taylor" else g) ** 2
        n += 1
    return [score / max(n, 1) for score in scores]


def gradual_ratio(step, dt, g0, g1):
    """Share pruned after `step` of `dt` steps from ratio g0 to g1, fast at first (Eq. 4; Zhu and Gupta 2017)."""
    return g1 + (g0 - g1) * (1 - step / dt) ** 3


def adjust_prior(probs, prior, tau):
    """p(y|x) / prior(y)^tau, normalised: logit adjustment after training (Menon et al., ICLR 2021). tau 0 changes nothing, tau 1 gives
    what a balanced prior would have given. probs: ... x K; prior: (K,)."""
    adjusted = probs / prior ** tau
    return adjusted / adjusted.sum(-1, keepdim=True)


def temper(probs, temperature):
    """softmax(log p / temperature): flatter than p above 1, sharper below. probs: ... x K."""
    return (probs.clamp_min(1e-30).log() / temperature).softmax(-1)


def fit_temperature(probs, labels):
    """The temperature of 0.5, 0.6, .. 5 at which the predictions have the smallest log loss (Guo et al., ICML 2017).
    probs: N x K; labels: int tensor (N,)."""
    choices = [t / 10 for t in range(5, 51)]
    losses = [F.nll_loss(temper(probs, t).clamp_min(1e-30).log(), labels).item() for t in choices]
    return choices[int(np.argmin(losses))]


def simplex_grid(T, n):
    """All points of the simplex whose T coordinates are multiples of 1 / n: float tensor G x T."""
    bars = np.array(list(combinations(range(n + T - 1), T - 1)), dtype=np.int64).reshape(math.comb(n + T - 1, T - 1), T - 1)
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), n + T - 1)], 1)
    return torch.from_numpy(np.diff(edges, axis=1) - 1).float() / n


def view_grams(p1, p2):
    """Inner products of the T sub-models' predictions: (between the views, within view 1, within view 2), each U x T x T.
    All that Eq. 5 needs of the predictions. p1, p2: T x U x K."""
    grams = []
    for a, b in zip(p1.split(4096, 1), p2.split(4096, 1)):  # float64: confident predictions leave differences that float32 loses
        a, b = a.double(), b.double()
        grams.append([torch.einsum("tuk,suk->uts", *pair) for pair in ((a, b), (a, a), (b, b))])
    return tuple(torch.cat(parts) for parts in zip(*grams))


def view_cosine(grams, lam):
    """Cosine similarity of the two mixed predictions (Eq. 5 writes the inner product, the text cosine). lam: G x T, the same for all
    images, or U x G x T -> U x G. A trace is taken off for leaving equal weights, so that a tie goes to the mean."""
    form = "uts,gt,gs->ug" if lam.dim() == 2 else "uts,ugt,ugs->ug"
    between, first, second = (torch.einsum(form, g, lam, lam) for g in grams)
    return between / (first * second).sqrt().clamp_min(1e-12) - 1e-9 * (lam - 1 / lam.shape[-1]).square().sum(-1)


def best_weights(grams, one_for_all):
    """The lambda on the simplex with the best view_cosine: U x T, or 1 x T with the best mean over the images when one_for_all.

    The objective depends on T x T inner products alone, so the simplex itself is searched, where the paper climbs a softmax of T numbers:
    a lattice of 1/20 (T > 3: 1/10), then steps to neighbours on ever finer ones. No gradient, no step size, no pass of the network.
    """
    T = grams[0].shape[1]
    n = 20 if T <= 3 else 10
    grid, eye = simplex_grid(T, n).to(grams[0]), torch.eye(T).to(grams[0])
    moves = torch.cat([torch.zeros_like(eye[:1]), (eye[:, None] - eye[None]).view(-1, T)])
    value = view_cosine(grams, grid)
    lam = grid[value.mean(0, keepdim=True).argmax(1) if one_for_all else value.argmax(1)]
    for i in range(24):
        near = lam[:, None] + moves / n / 2 ** (i // 4 + 1)  # U x G x T, up to four moves of each size
        value = view_cosine(grams, near.expand(len(grams[0]), -1, -1))
        value = value.mean(0, keepdim=True) if one_for_all else value
        value = value.masked_fill((near < -1e-9).any(2), -math.inf)
        lam = near[torch.arange(len(lam), device=lam.device), value.argmax(1)].clamp_min(0)
    return (lam / lam.sum(1, keepdim=True)).float()


def instance_weights(p1, p2):
    """lambda of each test image: the point of the simplex where its two mixed predictions agree best (Eq. 5).
    p1, p2: predictions of T sub-models for two views, T x U x K probabilities -> lambda, U x T, rows summing to 1."""
    return best_weights(view_grams(p1, p2), one_for_all=False)


# ------------------------------------------------------------------------------------------------------------------- predictions

def logits_of(model, x, env):
    """Forward pass in the run's precision; float32 logits."""
    with torch.autocast(env.device.type, torch.bfloat16, enabled=env.bf16):
        return model(x).float()


@torch.no_grad()
def predict(model, images, env, views=0):
    """Softmax of the images and of `views` random crop-and-flip views of each, (1 + views) x N x K on the device. The views depend on
    the run's seed alone, so every model sees the same. images: uint8 array N x H x W x 3, or ImageFiles. Processes share the work."""
    model.eval()
    out = torch.zeros(1 + views, len(images), env.num_classes, device=env.device)
    for start, x in test_batches(images, env.device, env.rank, env.world, env.args.workers, env.crop):
        for v in range(1 + views):
            rng = np.random.default_rng([env.args.seed, 3, v, start])
            view = x if v == 0 else crop_flip(x, rng, x.shape[-1] // 8)
            out[v, start:start + len(x)] = logits_of(model, normalize(view, env.mean, env.std), env).softmax(1)
    return all_sum(out, env.world)


def accuracy(probs, split, env):
    """group_accuracy of N x K probabilities on a split."""
    return group_accuracy(probs.argmax(1).cpu(), split.labels, env.counts)


# ------------------------------------------------------------------------------------------------------------------- training

def trainable_masks(model, alive=None):
    """[(weight, mask)] for the layers with frozen weights: mask 1 where a weight is trained now. alive: {name: bool tensor}, False for
    weights that TPD has pruned. Empty in stage 1, where everything trains."""
    pairs = []
    for name, layer in weight_layers(model).items():
        mask = getattr(layer, OWNER) == 0
        if alive is not None:
            mask = mask & alive[name]
        if not mask.all():
            pairs.append((layer.weight, mask.to(layer.weight.dtype)))
    return pairs


def make_step(model, optimizer, weight_decay, log_alpha, masks, env, replay=False):
    """One step of SGD, step(x, y, (share, learning rate), _). It adds to step.sums (3, K): images drawn and correct by class, and a row that
    adds up to their loss. replay: as a CUDA graph where that is possible.

    Weight decay is added to the gradient here and not in the optimiser, and the gradient of frozen weights is zeroed after it: their
    momentum stays 0 and SGD leaves them bit for bit as they are.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    frozen, keep = [w for w, _ in masks], [m for _, m in masks]
    sums = torch.zeros(3, env.num_classes, device=env.device)

    def step(x, y, numbers, _):
        share, lr = numbers
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = logits_of(env.network, x, env)
        loss = compensation_loss(logits, y, log_alpha)
        optimizer.zero_grad()
        (loss * share).backward()
        with torch.no_grad():
            torch._foreach_add_([p.grad for p in params], params, alpha=weight_decay)
            if frozen:
                torch._foreach_mul_([w.grad for w in frozen], keep)
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            one = torch.ones_like(y, dtype=torch.float32)
            sums.index_add_(1, y, torch.stack([one, (logits.argmax(1) == y).float(), one * loss]))
    return Replay(step, replay and env.device.type == "cuda" and env.world == 1 and env.bf16, sums)


def train(model, step, rate, data, env):
    """Steps over `data`, batches of (x, y, share), at the learning rates `rate`; returns (step.sums of these steps, steps done). Ends early
    when the run is told to stop."""
    model.train()
    step.sums.zero_()
    done = 0
    for (x, y, share), lr in zip(data, rate):
        step(x, y, (share, lr))
        done += 1
        if (env.world == 1 or done % 16 == 0) and should_stop(env.world, env.device):
            break
    return step.sums.clone(), done


def stop_if_not_finite(loss, model, where):
    """Exit code 3, before anything is saved, when the loss or a weight is NaN or infinite."""
    if not torch.stack([loss, *(v.sum() for v in model.state_dict().values() if v.is_floating_point())]).isfinite().all():
        if os.environ.get("RANK", "0") == "0":
            print(f"error: the loss became {loss.item()} or a weight infinite in {where}; the last checkpoint is kept: lower --lr and start "
                  "again, or look at the data", file=sys.stderr)
        sys.exit(3)


def make_optimizer(model, lr):
    """SGD with momentum 0.9; weight decay is added in `make_step`, where frozen weights are spared."""
    fused = next(model.parameters()).is_cuda  # the SGD that reads its rate on the device, so that a replayed graph sees each step's
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused, foreach=not fused)


@torch.no_grad()
def reestimate_batchnorm(model, data, env):
    """Replace BatchNorm's running statistics by the mean over the batches of `data`."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative mean
    model.train()
    for x, _, _ in data:
        logits_of(model, x, env)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


def class_losses(model, classes, cap, log_alpha, env):
    """L_y, the loss averaged over at most `cap` training images of class y, not augmented, for each of
    `classes` (a generator, graphs attached)."""
    model.eval()
    rows = [env.by_class[env.starts[c]:env.starts[c] + min(cap, env.counts[c])] for c in classes]
    if isinstance(env.images, ImageFiles):
        flat = np.concatenate([np.arange(0), *rows])
        batches = (x.to(env.device) for x in decode_batches(env.images, flat, flat, [len(r) for r in rows], env.args.workers))
    else:
        batches = (center_crop(env.images[torch.from_numpy(r).to(env.images.device)].to(env.device).permute(0, 3, 1, 2), env.crop) for r in rows)
    for c, x in zip(classes, batches):
        y = torch.full((len(x),), int(c), device=env.device)
        yield compensation_loss(logits_of(model, normalize(x, env.mean, env.std), env), y, log_alpha)


def scores_for(model, classes, kind, log_alpha, env, generator=None):
    """taylor_importance of the conv and linear weights to `classes`, which the processes share; the same on all of them."""
    weights = [m.weight for m in weight_layers(model).values()]
    mine = classes[env.rank::env.world]
    scores = taylor_importance(weights, class_losses(model, mine, env.args.importance_images, log_alpha, env), kind, generator)
    if env.world > 1 and kind in ("taylor", "fisher"):
        flat = all_sum(torch.cat([s.flatten() for s in scores]) * len(mine), env.world) / len(classes)
        scores = [part.view_as(w) for part, w in zip(flat.split([w.numel() for w in weights]), weights)]
    return scores


def prune_to(model, alive, ratio, scores):
    """Zero the lowest-scored weights until `ratio` of the free ones (owner 0) is pruned; ranks all layers together. Updates `alive`."""
    layers = weight_layers(model)
    free = {n: getattr(m, OWNER) == 0 for n, m in layers.items()}
    flat = torch.cat([s.masked_fill(~alive[n], -1.0)[free[n]] for (n, s) in zip(layers, scores)])  # pruned ones stay lowest
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:round(ratio * len(flat))]] = False
    with torch.no_grad():
        for part, (name, layer) in zip(keep.split([int(f.sum()) for f in free.values()]), layers.items()):
            alive[name][free[name]] = part
            layer.weight.mul_(alive[name] | ~free[name])


def decouple(model, t, stage, gammas, env, measure=None, progress=None, save=lambda progress: None):
    """Taylor-guided Parameter Decoupling: prune the free weights to each ratio of `gammas` in turn, gradually, retraining in between.

    Returns its progress: "alive", {layer: bool tensor} of the weights kept; when `measure` is given, "curve", [(ratio, measure())], and
    "best", the model and alive at the last ratio before the largest drop. The model is left at the last ratio. save(progress) is called
    after each step; a progress that it was given goes on from there.
    """
    args, dt, layers = env.args, env.args.tpd_steps, weight_layers(model)
    classes, log_alpha, probs = env.stages[stage]
    p = progress or {"ratio": 0, "step": 0, "optimizer": None, "curve": [], "last": None, "best": None,
                     "alive": {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in layers.items()}}
    p["alive"] = alive = {n: a.to(env.device) for n, a in p["alive"].items()}
    sampler = ClassSampler(env.labels_np, probs, dt * args.tpd_iters * len(gammas) * args.batch_size, env.args.seed * 1000 + t)
    sampler.set_epoch(10 ** 6)  # draws of their own
    draws = sampler.indices().reshape(len(gammas), dt, -1)
    rate = [args.tpd_lr * 0.5 * (1 + math.cos(math.pi * i / (dt * args.tpd_iters))) for i in range(dt * args.tpd_iters)]
    while (i := p["ratio"]) < len(gammas):
        gamma, before = gammas[i], gammas[i - 1] if i else 0.0
        optimizer = make_optimizer(model, args.tpd_lr)
        if p["optimizer"]:
            load_optimizer(optimizer, p["optimizer"])
        for step in range(p["step"] + 1, dt + 1 if gamma > 0 else 1):
            random = torch.Generator().manual_seed(args.seed * 10 ** 6 + t * 10 ** 4 + i * 100 + step)
            scores = scores_for(model, classes, args.importance, log_alpha, env, random)
            prune_to(model, alive, gradual_ratio(step, dt, before, gamma), scores)
            masks = trainable_masks(model, alive)
            for weight, mask in masks:  # a weight just pruned must not drift on from zero
                if "momentum_buffer" in optimizer.state[weight]:
                    optimizer.state[weight]["momentum_buffer"].mul_(mask)
            data = env.batches(draws[i, step - 1], key=[args.seed, t, 2, i, step])
            retrain = make_step(model, optimizer, args.weight_decay, log_alpha, masks, env)
            sums, done = train(model, retrain, rate[(step - 1) * args.tpd_iters:step * args.tpd_iters], data, env)
            if done < args.tpd_iters:  # told to stop: the step is done again after --resume
                print("stopped: go on with --resume", flush=True)
                sys.exit(EXIT_STOPPED)
            stop_if_not_finite(all_sum(sums, env.world)[2].sum(), model, f"pruning after stage {t}")
            p |= {"step": step, "optimizer": optimizer.state_dict()}
            save(p)
        if gamma > 0:
            reestimate_batchnorm(model, env.batches(draws[i].ravel()[:40 * args.batch_size], key=[args.seed, t, 3, i]), env)
        if measure:
            p["curve"].append((gamma, measure()))
            if i >= 2 and last_ratio_before_largest_drop(*zip(*p["curve"])) == gammas[i - 1]:
                p["best"] = p["last"]
            p["last"] = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "alive": {n: a.clone() for n, a in alive.items()}}
        p |= {"ratio": i + 1, "step": 0, "optimizer": None}
        save(p)
    return p


def last_ratio_before_largest_drop(ratios, accuracies):
    """gamma_best ("Taylor-guided Parameter Decoupling"): the ratio after which accuracy falls most."""
    drops = np.array(accuracies[1:-1]) - np.array(accuracies[2:])  # not the drop from 0: the next stage needs free weights
    return ratios[1 + int(drops.argmax())]


def keep_and_restart(model, t, alive, generator, scale):
    """What TPD kept becomes stage t's (owner t, frozen); the pruned weights are drawn afresh (Kaiming normal, times `scale`)."""
    with torch.no_grad():
        for name, layer in weight_layers(model).items():
            owner = getattr(layer, OWNER)
            free = owner == 0
            owner[free & alive[name]] = t
            fresh = torch.randn(layer.weight.shape, generator=generator).to(layer.weight) * scale * math.sqrt(2 / layer.weight[0].numel())
            layer.weight.copy_(torch.where(owner == 0, fresh, layer.weight))


# ----------------------------------------------------------------------------------------------------------------- test time

def mix(probs, lam):
    """Weighted sum of the sub-models' predictions. probs: T x U x K; lam: U x T or 1 x T -> U x K."""
    return torch.einsum("tuk,ut->uk", probs, lam.expand(probs.shape[1], -1))


def aggregate(probs, split, env, temperatures):
    """The three mixtures of the sub-models, each alone, and two diagnoses that use labels. probs: T x (1 + V) x N x K, view 0 clean.

    Every prediction is the mean over the clean image and its views. The mixtures take each sub-model at its temperature; lambda is found
    from the first two random views and drawn towards equal weights (--trust), as a search that stops early would leave it. probs is changed.
    """
    T, trust = len(probs), env.args.trust
    raw = probs.mean(1)
    for t in range(T):
        if temperatures[t] != 1:
            probs[t] = temper(probs[t], temperatures[t])
    mean_views = probs.mean(1)
    start = clock(env.device)
    grams = view_grams(probs[:, 1], probs[:, 2])
    lam = {"instance": best_weights(grams, one_for_all=False)}
    seconds = clock(env.device) - start
    lam |= {"group": best_weights(grams, one_for_all=True), "mean": torch.full((1, T), 1 / T, device=probs.device)}
    lam = {name: trust * weights + (1 - trust) / T for name, weights in lam.items()}
    result = {"weights_seconds": seconds, "temperatures": temperatures, "aggregations": {}, "lambda_by_group": {}}
    for name, weights in lam.items():
        mixed = mix(mean_views, weights)
        acc = accuracy(mixed, split, env)
        ece = expected_calibration_error(mixed, torch.from_numpy(split.labels).to(mixed.device))
        result["aggregations"][name] = acc | {"ece": ece}
    groups = class_groups(env.counts)
    for name, classes in groups.items():
        chosen = lam["instance"].cpu().numpy()[np.isin(split.labels, classes)]
        result["lambda_by_group"][name] = [float(v) for v in chosen.mean(0)] if len(chosen) else None
    result["group_lambda"] = [float(v) for v in lam["group"][0]]
    result["alone"] = [accuracy(p, split, env) for p in raw]
    hits = (raw.argmax(2).cpu().numpy() == split.labels)  # T x N
    expert = np.zeros(len(env.counts), dtype=np.int64)  # the sub-model whose stage covers the class
    for t, (classes, _, _) in enumerate(env.stages.values()):
        expert[classes] = t
    oracle = raw[torch.from_numpy(expert[split.labels]).to(probs.device), torch.arange(len(split), device=probs.device)]
    result["oracle_by_true_group"] = accuracy(oracle, split, env)
    result["at_least_one_right"] = float(100 * hits.any(0).mean())
    return result


def importance_by_group(model, env):
    """Mean Taylor importance of a weight to each class group (Fig. 1b): {"many", "medium", "few"}, None for an empty group."""
    result, log_alpha = {}, torch.zeros(env.num_classes, device=env.device)
    for name, classes in class_groups(env.counts).items():
        scores = scores_for(model, classes, "taylor", log_alpha, env)
        result[name] = float(sum(s.double().sum() for s in scores)) / sum(s.numel() for s in scores) if len(classes) else None
    return result


# --------------------------------------------------------------------------------------------------------------------- reports

def row(label, acc):
    """One aligned line of a table by group."""
    return f"{label:34}" + "".join(f"{show(acc[g]):>8}" for g in (*GROUPS, "all"))


def print_report(report, views):
    """The tables of the paper, from the figures of this run."""
    head = f"{'':34}" + "".join(f"{g:>8}" for g in (*GROUPS, "all"))
    print(f"\nSub-models on the clean test images (the paper's Table 7)\n{head}")
    for entry in report["submodels"]:
        print(row(f"stage {entry['stage']} ({entry['group']}) after {entry['after'].upper()}", entry["acc"]))
    test = report["test"]
    print("\nMean lambda of the instance weights by class group (Table 9), one column a sub-model")
    for name, lam in test["lambda_by_group"].items():
        print(f"{name:10}" + ("".join(f"{v:8.2f}" for v in lam) if lam else "       -"))
    print("\nMean Taylor importance of a weight by class group (Fig. 1b)")
    for label, values in report["importance_by_group"].items():
        print(f"{label:34}" + "".join(f"{values[g]:10.2e}" if values[g] is not None else f"{'-':>10}" for g in GROUPS))
    for stage, curve in report["pruning_curve"].items():
        print(f"\nPruning curve of stage {stage} on the validation split (Fig. 4): ratio pruned, accuracy of the stage's classes")
        print("  ".join(f"{g:.1f}: {a:.1f}" for g, a in curve))
    print(f"\nMean over the clean image and {views} crop-and-flip views\n{head}")
    if report["bar"]:
        print(row("stage 1: plain cross-entropy", report["bar"]["test"]["ce"]))
        print(row("  + logit adjustment (the bar)", report["bar"]["test"]["ce_la"]))
    for t, acc in enumerate(test["alone"], 1):
        print(row(f"sub-model {t} alone", acc))
    for name in ("instance", "group", "mean"):
        print(row(f"DO, {name} weights", test["aggregations"][name]))
    print(row("(diagnosis) oracle by true group", test["oracle_by_true_group"]))
    print(f"{'(diagnosis) a sub-model is right':34}{'':24}{test['at_least_one_right']:8.1f}")
    print(f"temperatures {test['temperatures']}, fitted on the validation split" if any(t != 1 for t in test["temperatures"]) else "no temperatures")
    print(f"the instance weights took {test['weights_seconds']:.2f} s, the forward passes they rest on {test['forward_seconds']:.1f} s")


def draw_figures(report, out):
    """The same as pictures, when matplotlib is installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figures: pip install matplotlib to have them drawn")
        return
    x, width = np.arange(len(GROUPS)), 0.8

    def bars(name, title, series):
        plt.figure(figsize=(7, 3.2))
        for i, (label, values) in enumerate(series.items()):
            plt.bar(x + width * (i + 0.5) / len(series) - width / 2, [v or 0 for v in values], width / len(series), label=label)
        plt.xticks(x, GROUPS)
        plt.title(title)
        plt.legend(fontsize=7)
        plt.tight_layout()
        plt.savefig(out / name, dpi=120)
        plt.close()
    test = report["test"]
    bars("accuracy_by_group.png", "test accuracy by class group, %",
         ({"cross-entropy + logit adjustment": [report["bar"]["test"]["ce_la"][g] for g in GROUPS]} if report["bar"] else {})
         | {f"sub-model {t}": [acc[g] for g in GROUPS] for t, acc in enumerate(test["alone"], 1)}
         | {f"DO, {name}": [acc[g] for g in GROUPS] for name, acc in test["aggregations"].items()})
    bars("lambda_by_group.png", "mean instance weight by class group",
         {f"sub-model {t + 1}": [lam[t] if lam else 0 for lam in test["lambda_by_group"].values()] for t in range(len(test["alone"]))})
    bars("importance_by_group.png", "mean Taylor importance of a weight by class group",
         {label: [values[g] for g in GROUPS] for label, values in report["importance_by_group"].items()})
    if report["pruning_curve"]:
        plt.figure(figsize=(6, 3))
        for stage, curve in report["pruning_curve"].items():
            plt.plot([100 * g for g, _ in curve], [a for _, a in curve], marker="o", label=f"stage {stage}")
        plt.xlabel("% pruned")
        plt.ylabel("validation accuracy of the stage's classes, %")
        plt.legend()
        plt.tight_layout()
        plt.savefig(out / "pruning_curve.png", dpi=120)
        plt.close()


# ---------------------------------------------------------------------------------------------------------------- flags and main

def parse_args(argv=None):
    """Flags; what is not given comes from RECIPES. Raises InputError for values out of range."""
    parser = argument_parser("Decoupled Optimisation for long-tailed recognition")
    add_data_arguments(parser)
    parser.add_argument("--aug", choices=["strong", "basic", "none"], help="basic: crop and flip; strong: + RandAugment, Cutout")
    model = parser.add_argument_group("model and optimiser; what shows no default has one by dataset, in RECIPES")
    model.add_argument("--arch", help="resnet32, resnet50, resnet152 or another torchvision classifier")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from torchvision's ImageNet weights (places_lt does)")
    model.add_argument("--weights", metavar="FILE", help="start from the weights in this file (a last layer of another shape starts afresh)")
    model.add_argument("--epochs", help="one number a stage, as 100,50,50")
    model.add_argument("--lr", help="one number a stage, as 0.05,0.005,0.005")
    model.add_argument("--schedule", help="one word a stage: cosine (to 0) or constant (default %(default)s)", default="cosine")
    model.add_argument("--batch-size", type=int)
    model.add_argument("--weight-decay", type=float, default=5e-4, help="(default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--order", default="many,medium,few", help="the stages: also many,few or many,medium-top,medium-low,few (default %(default)s)")
    method.add_argument("--rho", type=float, help="how strongly medium classes are drawn in their stage")
    method.add_argument("--gamma", help="share pruned after each stage but the last, as 0.5,0.8; or auto")
    method.add_argument("--few-sampling", choices=["balanced", "inverse"], default="balanced", help="draws of the few stage (default %(default)s)")
    method.add_argument("--loss", choices=["compensation", "ce"], default="compensation", help="ce: no margin in any stage (Table 8) (default %(default)s)")
    method.add_argument("--importance", choices=["taylor", "l1", "fisher", "random"], default="taylor", help="score that ranks weights (default %(default)s)")
    method.add_argument("--importance-images", type=int, help="training images a class for the score, at most (20; inat18: 4)")
    method.add_argument("--tpd-steps", type=int, default=10, help="steps of gradual pruning (the paper's dt) (default %(default)s)")
    method.add_argument("--tpd-iters", type=int, help="retraining iterations after each of them (the paper: 1; by dataset, mostly 20)")
    method.add_argument("--tpd-lr", type=float, default=0.02, help="rate of that retraining, cosine to 0 (default %(default)s)")
    method.add_argument("--reinit", type=float, default=1.0, help="scale of the fresh weights; 0 starts them at zero (default %(default)s)")
    method.add_argument("--agg", choices=["instance", "group", "mean"], default="instance", help="the mixture that is reported as the result (default %(default)s)")
    method.add_argument("--calibrate", choices=["val", "none"], default="val",
                        help="val: sub-models are mixed at temperatures fitted on the validation split (default %(default)s; the paper: none)")
    method.add_argument("--trust", type=float, default=0.25,
                        help="how far the mixture goes from equal weights (0) to the best-agreeing ones (1) (default %(default)s)")
    method.add_argument("--views", type=int, default=2, help="random views of a test image, averaged with the clean one (default %(default)s)")
    method.add_argument("--stage1", metavar="FILE", help="begin behind stage 1 with another run's stage1.pt (same data, seed, stage 1)")
    add_system_arguments(parser, "write each sub-model as a plain state dict")
    args = parser.parse_args(argv)

    kind = "cifar100 imb 50" if args.dataset == "cifar100" and args.imb == 50 else known_name(args.dataset)
    recipe = RECIPES.get(kind, RECIPES["cifar100" if kind.endswith(".npz") else "folder"])
    defaults = {key: value for key, value in ({"batch_size": 256, "aug": "strong", "tpd_iters": 20, "importance_images": 20, "pretrained": False} | recipe).items() if getattr(args, key) is None}
    for key, value in defaults.items():
        setattr(args, key, value)
    if args.imb is None:
        args.imb = DEFAULT_IMB.get(args.dataset)
    known = ("many", "medium", "medium-top", "medium-low", "few")
    args.order = args.order.split(",")
    if set(args.order) - set(known) or len(set(args.order)) != len(args.order) or ("medium" in args.order and set(args.order) & {"medium-top", "medium-low"}):
        raise InputError(f"--order {','.join(args.order)}: name each stage once, of {', '.join(known)}")
    T = len(args.order)

    def per_stage(flag, kind, n=T):
        values = getattr(args, flag).split(",")
        try:
            values = [kind(v) for v in values]
        except ValueError:
            raise InputError(f"--{flag} {getattr(args, flag)}: give numbers with commas between") from None
        if len(values) not in (1, n) and flag not in defaults:
            raise InputError(f"--{flag} {getattr(args, flag)}: {len(values)} values for {n}; give one, or one a stage")
        setattr(args, flag, (values + values[-1:] * n)[:n])
    per_stage("epochs", int)
    per_stage("lr", float)
    per_stage("schedule", str)
    if args.gamma != "auto":
        per_stage("gamma", float, max(T - 1, 1))
        if not all(0 < g < 1 for g in args.gamma):
            raise InputError(f"--gamma {args.gamma}: shares pruned lie between 0 and 1, exclusive; or auto")
    if not 0 < args.rho < 1:
        raise InputError(f"--rho {args.rho:g}: must lie between 0 and 1, exclusive")
    for flag, least in (("batch_size", 2), ("views", 2), ("tpd_steps", 1), ("tpd_iters", 1), ("importance_images", 1),
                        ("weight_decay", 0), ("reinit", 0), ("workers", 0), ("epochs", 1), ("lr", 1e-12), ("tpd_lr", 1e-12)):
        value = getattr(args, flag)
        if not all(v >= least and math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be at least {least:g}" + " (two random views are compared)" * (flag == "views"))
    if not 0 <= args.trust <= 1:
        raise InputError(f"--trust {args.trust:g}: must lie between 0 and 1")
    if set(args.schedule) - {"cosine", "constant"}:
        raise InputError(f"--schedule {','.join(args.schedule)}: cosine or constant")
    if args.out is None:
        name = Path(args.dataset).stem + (f"_imb{args.imb:g}" if isinstance(args.imb, float) else "")
        args.out = f"runs/do_{name}_{args.arch}_seed{args.seed}"
    return args


# flags that may differ between a checkpoint and the run that goes on from it
FREE_FLAGS = {"resume", "out", "export", "stage1", "agg", "calibrate", "trust", "device", "data_root", "lists", "workers", "bench"}
STAGE1_FLAGS = {"dataset", "imb", "imb_type", "split_seed", "size", "aug", "arch", "pretrained", "weights", "batch_size", "weight_decay", "seed",
                "precision"}  # those that shape a stage of natural draws without a margin


def check_same_run(state, args, counts, path, stage1_only):
    """Raise InputError when a checkpoint is not this run's (for --stage1: when its stage 1 is not this run's)."""
    if not isinstance(state, dict) or not {"args", "stage", "epoch", "counts", "report", "model", "norms", "optimizer", "rng", "begun", "pruning"} <= set(state):
        raise InputError(f"{path} is no checkpoint of this script; give a run's {'stage1.pt' if stage1_only else 'last.pt'}")
    saved, now = state["args"], vars(args)
    for key in sorted(STAGE1_FLAGS if stage1_only else set(now) - FREE_FLAGS):
        if saved.get(key) != now[key]:
            raise InputError(f"{path} is of another run: --{key.replace('_', '-')} was {saved.get(key)}, now {now[key]}; "
                             "give the same flags or another --out")
    if state["counts"] != counts.tolist():
        raise InputError(f"{path} is of a run on other data: the training images per class differ; give another --out")
    if stage1_only and (now["order"][0] != "many" or (state["stage"], state["epoch"]) != (1, args.epochs[0])
                        or any(saved[k][0] != now[k][0] for k in ("order", "epochs", "lr", "schedule"))):
        raise InputError(f"--stage1 {path}: not the end of a stage 1 with this run's --order, --epochs, --lr and --schedule")


def usual_loop(arch, num_classes, photos, labels, device):
    """What most published code for CIFAR does, to compare with: float32, images transformed one by one (crop and flip) by up to four worker
    processes, the loss asked for in each step. photos: uint8 array N x H x W x 3. Returns a call that trains on all images once."""
    from torchvision import transforms as T
    side = photos.shape[1]
    transform = T.Compose([T.ToPILImage(), T.RandomCrop(side, padding=side // 8), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * 3, [0.2] * 3)])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(photos)

        def __getitem__(self, i):
            return transform(photos[i]), int(labels[i])
    loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, num_workers=min(4, os.cpu_count() or 1), persistent_workers=True, pin_memory=device.type == "cuda")
    model = build_model(arch, num_classes).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def run():
        model.train()
        total = 0.0
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = F.cross_entropy(model(x), y)
            total += loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return total
    return run


def made_up_photographs(folder, size, n):
    """n ImageFiles over 64 JPEGs of 500 x 375 pixels in `folder`, smooth with a little noise, to be decoded to size x size."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(64):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(smooth).astype(np.int16) + rng.integers(-8, 9, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i}.jpg", quality=90)
    return ImageFiles([f"{folder}/{i % 64}.jpg" for i in range(n)], size)


def bench(args):
    """Time, on made-up images, the bare step, the loop, a stage 2 step with frozen weights, and evaluation; print and write the ratios."""
    if "WORLD_SIZE" in os.environ:
        raise InputError("--bench: times one process")
    device = join_processes(args)[0]
    size, k, n = args.size or usual_side(args.arch), 100, args.batch_size
    steps = 8 if device.type == "cpu" or size > 64 else 128
    model = add_owner_masks(build_model(args.arch, k)).to(device, memory_format=torch.channels_last)
    crop, side = (None, size) if size <= 64 else (size, size * 256 // 224)  # large ones as --pack leaves them
    photos = torch.randint(256, (steps * n, side, side, 3), dtype=torch.uint8)
    labels, (mean, std) = torch.randint(k, (steps * n,)), torch.full((2, 3), 128.0, device=device)
    env = argparse.Namespace(args=args, device=device, rank=0, world=1, crop=crop, bf16=use_bf16(args.precision, device),
                             network=model, num_classes=k, mean=mean, std=std)
    x, y = random_batch(n, size, k, device)
    log_alpha, resident = torch.zeros(k, device=device), (photos.to(device), labels.to(device))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=args.weight_decay, fused=device.type == "cuda")
    sampler = ClassSampler(labels.numpy(), np.bincount(labels, minlength=k) / len(labels), len(labels), 0)
    masks = [(m.weight, (torch.rand_like(m.weight) < 0.5).float()) for m in weight_layers(model).values()]

    def bare_step(x, y, numbers, _):
        for group in optimizer.param_groups:
            group["lr"] = numbers[0]
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model, x, env), y).backward()
        optimizer.step()
    bare_replay = Replay(bare_step, device.type == "cuda" and env.bf16)

    def bare():
        model.train()
        for _ in range(steps):
            bare_replay(x, y, (0.01,))
    free = make_step(model, make_optimizer(model, 0.01), args.weight_decay, log_alpha, [], env, replay=True)
    masked = make_step(model, make_optimizer(model, 0.01), args.weight_decay, log_alpha, masks, env, replay=True)

    def loop(step, batches):
        train(model, step, [0.01] * steps, batches, env)[0].sum().item()
    photos_np = photos.numpy()
    subs, split = [model] * 3, photos_np[:2 * n]
    cached = torch.stack([predict(sub, split, env, args.views) for sub in subs])

    def evaluate_all(weights):
        probs = torch.stack([predict(sub, split, env, args.views) for sub in subs])
        mix(probs.mean(1), weights(probs[:, 1], probs[:, 2])).sum().item()
    folder = tempfile.TemporaryDirectory()
    if size <= 64:
        other = {"usual": (usual_loop(args.arch, k, photos_np, labels.numpy(), device), steps * n)}
    else:
        files = made_up_photographs(folder.name, size, steps * n)
        other = {"loop_jpeg": (lambda: loop(free, training_batches(files, resident[1], sampler.indices(), n, args.aug, [0], mean, std, workers=args.workers)), steps * n)}
    measured = measure(other | {
        "bare": (bare, steps * n), "do_stage2": (lambda: loop(masked, [(x, y, 1.0)] * steps), steps * n),
        "loop": (lambda: loop(free, training_batches(*resident, sampler.indices(), n, args.aug, [0], mean, std, crop=crop)), steps * n),
        "eval_plain": (lambda: predict(model, split, env).sum().item(), 2 * n),
        "eval_mean": (lambda: evaluate_all(lambda p, q: torch.full((1, 3), 1 / 3, device=device)), 2 * n),
        "eval_instance": (lambda: evaluate_all(instance_weights), 2 * n),
        "lambda": (lambda: instance_weights(cached[:, 1], cached[:, 2]).sum().item(), 2 * n)}, device)
    report_bench(measured, ([("the loop, strong augmentation, over the usual loop, basic augmentation", "loop", "usual", "at least 2")] if size <= 64 else
                            [(f"the loop from JPEG files, {args.workers} decoding processes, over the bare step", "loop_jpeg", "bare", "no limit")]) + [
        ("the loop (draws, augmentation, log) over the bare step", "loop", "bare", "at least 0.90"),
        ("stage 2 with frozen weights over the bare step", "do_stage2", "bare", "at least 0.95"),
        ("instance weights over equal weights, 3 networks x 3 views", "eval_instance", "eval_mean", "at least 1 / 1.1")],
        args.arch, device, f"{'bf16' if env.bf16 else 'fp32'}, batch {n}, {size} px, {args.aug} augmentation",
        limits(lambda: bare_step(x, y, (0.01,), None), device, env.bf16), n)


def main(argv=None):
    """Train, decouple, aggregate, evaluate: the whole method in the paper's order."""
    args, commit = parse_args(argv), git_commit()
    if args.bench:
        return bench(args)
    device, rank, world = join_processes(args)

    # ---- data
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    counts, groups = data.counts, class_groups(data.counts)
    print(f"{data.name} from {data.source}: {data.num_classes} classes, {len(data.train):,} train ({counts.max()}..{counts.min()} a class), "
          f"{len(data.val):,} val, {len(data.test):,} test; " + ", ".join(f"{len(c)} {g}" for g, c in groups.items()))
    if data.multi_label:
        raise InputError(f"--dataset {args.dataset} has several labels an image, which DO is not made for; take more_lt.py")
    for stage in list(args.order):
        at = args.order.index(stage)
        if not len(stage_classes(counts, stage)) and not (stage == "many" and at == 0):
            print(f"warning: no class is {stage}; its stage is left out")
            for values in (args.order, args.epochs, args.lr, args.schedule, *([] if args.gamma == "auto" else [args.gamma])):
                del values[at:at + 1]  # the last stage has no gamma
    if not args.order:
        raise InputError("--order: none of its stages has a class in this dataset; begin with many")
    served = {s: c if len(c := stage_classes(counts, s)) else np.arange(len(counts)) for s in args.order}  # a first "many" without classes serves all
    if args.gamma == "auto" and not all(np.isin(data.val.labels, served[s]).any() for s in args.order[:-1]):
        raise InputError("--gamma auto measures on validation images of each stage's classes and some have none; give numbers, as 0.5,0.8")
    if args.gamma != "auto":
        args.gamma = args.gamma[:max(len(args.order) - 1, 0)]
    T = len(args.order)
    mean, std = (v.to(device) for v in channel_stats(data.train.images))
    images, labels = on_device(data.train.images, device), torch.from_numpy(data.train.labels).to(device)
    env = argparse.Namespace(
        args=args, device=device, rank=rank, world=world, crop=data.crop, bf16=use_bf16(args.precision, device),
        batches=partial(training_batches, images, labels, batch_size=args.batch_size, kind=args.aug, mean=mean, std=std, rank=rank, world=world,
                        workers=args.workers, crop=data.crop),
        images=images, labels_np=data.train.labels, by_class=np.argsort(data.train.labels, kind="stable"), starts=np.cumsum(counts) - counts,
        counts=counts, num_classes=data.num_classes, mean=mean, std=std, stages={})
    for stage in args.order:
        probs, alpha = stage_class_probs(counts, stage, args.rho, args.few_sampling), compensation_alpha(counts, stage, args.rho)
        alpha = alpha if args.loss == "compensation" else np.ones_like(alpha)
        env.stages[stage] = served[stage], torch.from_numpy(np.log(alpha)).float().to(device), probs

    # ---- model, and where an interrupted run stood
    torch.manual_seed(args.seed)
    model = add_owner_masks(build_model(args.arch, data.num_classes, args.weights or args.pretrained))
    model = share_batchnorm(model, world, device).to(device, memory_format=torch.channels_last)
    check_size(model, args.arch, data.side)
    env.network = distribute(model, world, device)
    out = Path(args.out)
    print(f"{args.arch}: {sum(p.numel() for p in model.parameters()):,} parameters; {device}, {'bf16' if env.bf16 else 'fp32'}, "
          f"batch {args.batch_size}{f' over {world} processes' if world > 1 else ''}, seed {args.seed}, split seed {args.split_seed}; "
          f"writes {out}", flush=True)
    t, epoch, optimizer_state, begun, pruning = 1, 0, None, None, None
    report = {"submodels": [], "bar": {}, "importance_by_group": {}, "pruning_curve": {}, "gammas": [], "log": [], "train_seconds": 0.0,
              "tpd_seconds": 0.0, "images": 0}  # tpd_seconds: of the last start alone, when it was interrupted
    state = None
    if args.resume:
        state = load_checkpoint(out / "last.pt")
        if state is None:
            print(f"nothing to resume in {out}: starting from the beginning")
        else:
            check_same_run(state, args, counts, out / "last.pt", stage1_only=False)
    elif list(out.glob("last.pt*")):
        raise InputError(f"--out {out} holds a run: add --resume to go on with it, or give another folder, or delete it")
    if state is None and args.stage1:
        state = load_checkpoint(args.stage1)
        if state is None:
            raise InputError(f"--stage1 {args.stage1}: no such file")
        check_same_run(state, args, counts, args.stage1, stage1_only=True)
    if state is not None:
        t, epoch, report, optimizer_state = state["stage"], state["epoch"], state["report"], state["optimizer"]
        begun, pruning = state["begun"], state["pruning"]
        model.load_state_dict(state["model"])
        model.stage_norms = {s: {k: v.to(device) for k, v in norms.items()} for s, norms in state["norms"].items()}
        set_random_state(state["rng"], device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made a folder ({error.strerror}); give another") from None

    def save(path, stage, epoch, optimizer=None, begun=None, pruning=None):
        """begun: (steps done, sums, seconds) of an epoch that was cut short; pruning: progress of `decouple`."""
        if rank == 0:
            save_checkpoint(path, {"args": vars(args), "stage": stage, "epoch": epoch, "counts": counts.tolist(), "report": report,
                                   "model": model.state_dict(), "norms": model.stage_norms, "optimizer": optimizer and optimizer.state_dict(),
                                   "rng": random_state(device), "begun": begun, "pruning": pruning})
        if should_stop(world, device) or begun:  # the question first: it waits for the process that writes
            print(f"stopped at stage {stage}, epoch {epoch}: go on with --resume", flush=True)
            sys.exit(EXIT_STOPPED)

    def record(stage, after):
        """Sub-model accuracy on clean images, for the paper's Table 7."""
        entry = {"stage": stage, "group": args.order[stage - 1], "after": after}
        entry["acc"] = accuracy(predict(model, data.test.images, env)[0], data.test, env)
        if len(data.val):
            entry["val"] = accuracy(predict(model, data.val.images, env)[0], data.val, env)
        report["submodels"].append(entry)
        print(row(f"stage {stage} after {after.upper()}, test", entry["acc"]), flush=True)

    total_images = len(data.train) * sum(args.epochs)
    while t <= T:
        stage = args.order[t - 1]
        classes, log_alpha, probs = env.stages[stage]

        # ---- CPO: this stage's draws and margin; weights of earlier stages are active and frozen
        sampler = ClassSampler(data.train.labels, probs, len(data.train), args.seed * 1000 + t)
        steps = batches_in(len(data.train), args.batch_size)
        optimizer = make_optimizer(model, args.lr[t - 1])
        if optimizer_state:
            load_optimizer(optimizer, optimizer_state)
            optimizer_state = None
        step = make_step(model, optimizer, args.weight_decay, log_alpha, trainable_masks(model), env, replay=True)
        if epoch < args.epochs[t - 1]:
            print(f"\nstage {t} of {T}, {stage}: {args.epochs[t - 1]} epochs of {len(data.train):,} draws, rate {args.lr[t - 1]:g} "
                  f"{args.schedule[t - 1]}\n{'epoch':>9}{'loss':>9}{'rate':>9}   drawn:{'many':>6}{'medium':>8}{'few':>8}{'all':>8}   val:{'all':>6}"
                  f"{'img/s':>9}{'left':>9}")
        while epoch < args.epochs[t - 1]:
            start = clock(device)
            sampler.set_epoch(epoch)
            fraction = (epoch + np.arange(steps) / steps) / args.epochs[t - 1]
            rate = args.lr[t - 1] * (0.5 + 0.5 * np.cos(math.pi * fraction) if args.schedule[t - 1] == "cosine" else np.ones(steps))
            first, before, earlier = begun or (0, torch.zeros(3, env.num_classes), 0.0)
            begun = None
            sums, done = train(model, step, rate[first:].tolist(), env.batches(sampler.indices(), key=[args.seed, t, 1, epoch], first=first), env)
            sums = all_sum(sums, world) + before.to(device)
            stop_if_not_finite(sums[2].sum(), model, f"stage {t}, epoch {epoch + 1}")
            if first + done < steps:  # told to stop
                save(out / "last.pt", t, epoch, optimizer, begun=(first + done, sums, earlier + clock(device) - start))
            drawn, correct, loss = sums.cpu().double().numpy()
            loss = float(loss.sum() / drawn.sum())
            seconds = earlier + clock(device) - start
            epoch += 1
            report["train_seconds"] += seconds
            report["images"] += len(data.train)
            acc = group_means(100 * correct / np.where(drawn > 0, drawn, np.nan), groups)
            val = None
            if len(data.val) and (epoch % 10 == 0 or epoch == args.epochs[t - 1]):
                val = accuracy(predict(model, data.val.images, env)[0], data.val, env)["all"]
            left = (total_images - report["images"]) * report["train_seconds"] / report["images"]
            report["log"].append({"stage": t, "epoch": epoch, "loss": loss, "lr": float(rate[0]), **{f"drawn_{g}": v for g, v in acc.items()},
                                  "val_all": val, "images_per_second": len(data.train) / seconds})
            print(f"{t}:{epoch:>4}/{args.epochs[t - 1]:<4}{loss:8.3f}{rate[0]:9.4f}{'':9}" + "".join(f"{show(acc[g]):>8}" for g in (*GROUPS, "all"))[2:]
                  + f"{'':7}{show(val):>6}{len(data.train) / seconds:9.0f}{left / 60:6.1f} min", flush=True)
            if rank == 0:
                write_log(out / "log.csv", report["log"])
            save(out / "last.pt", t, epoch, optimizer)
        del step  # and the memory of its graph
        if t == 1 and not pruning:
            save(out / "stage1.pt", t, epoch, optimizer)
        if not pruning:
            record(t, "cpo")

        if t == 1 and stage == "many" and not pruning:  # stage 1 is plain cross-entropy: the bar, and the importance before
            prior = torch.from_numpy(counts / counts.sum()).to(device, torch.float32)
            for name, split in (("val", data.val), ("test", data.test)):
                if len(split):
                    p = predict(model, split.images, env, args.views)
                    adjusted = adjust_prior(p, prior, 1.0)
                    report["bar"][name] = {"ce": accuracy(p.mean(0), split, env), "ce_la": accuracy(adjusted.mean(0), split, env),
                                           "ce_clean": accuracy(p[0], split, env), "ce_la_clean": accuracy(adjusted[0], split, env)}
            report["importance_by_group"]["cross-entropy"] = importance_by_group(model, env)

        # ---- TPD: what the stage keeps is frozen, the rest starts afresh; the last stage keeps all that is left
        start = clock(device)
        if t < T:
            def validation_accuracy():
                per_class = accuracy(predict(model, data.val.images, env)[0], data.val, env)["per_class"]
                return float(np.mean([per_class[c] for c in classes if per_class[c] is not None]))
            ratios = [g / 10 for g in range(10)] if args.gamma == "auto" else [args.gamma[t - 1]]
            pruned = decouple(model, t, stage, ratios, env, validation_accuracy if args.gamma == "auto" else None, pruning,
                              lambda progress: save(out / "last.pt", t, epoch, pruning=progress))
            pruning, gamma, alive = None, ratios[0], pruned["alive"]
            if args.gamma == "auto":
                report["pruning_curve"][stage] = pruned["curve"]
                gamma = last_ratio_before_largest_drop(*zip(*pruned["curve"]))
                alive = {n: a.to(device) for n, a in pruned["best"]["alive"].items()}
                model.load_state_dict(pruned["best"]["model"])
            report["gammas"].append(gamma)
            report["tpd_seconds"] += clock(device) - start
            print(f"TPD: {100 * gamma:.0f} % of the free weights pruned by {args.importance} importance")
            record(t, "tpd")
        else:
            alive = {name: torch.ones_like(m.weight, dtype=torch.bool) for name, m in weight_layers(model).items()}
        keep_stage_norms(model, t)
        keep_and_restart(model, t, alive, torch.Generator().manual_seed(args.seed * 1000 + t), args.reinit)
        t, epoch = t + 1, 0
        save(out / "last.pt", t, epoch)

    # ---- test time: mix the nested sub-models; a stop from here on is at once, all is in last.pt
    stop_at_once()
    submodels = []
    for s in range(1, T + 1):
        sub = build_model(args.arch, data.num_classes).to(device, memory_format=torch.channels_last)
        sub.load_state_dict(submodel_state(model, s))
        submodels.append(sub)
        report["importance_by_group"][f"sub-model {s}"] = importance_by_group(sub, env)
    temperatures = [1.0] * T
    for name, split in (("val", data.val), ("test", data.test)):
        if len(split):
            start = clock(device)
            probs = torch.empty(T, 1 + args.views, len(split), data.num_classes, device=device)  # iNaturalist: 7 GB, so only once
            for sub, out_of in zip(submodels, probs):
                out_of.copy_(predict(sub, split.images, env, args.views))
            seconds = clock(device) - start
            if name == "val" and args.calibrate == "val":
                temperatures = [fit_temperature(p[0], torch.from_numpy(split.labels).to(device)) for p in probs]
            report[name] = aggregate(probs, split, env, temperatures) | {"forward_seconds": seconds}
    print_report(report, args.views)

    # ---- files
    if rank:
        return None
    chosen = report["test"]["aggregations"][args.agg]
    if args.export:
        for s, sub in enumerate(submodels, 1):
            write_atomic(out / f"submodel{s}.pt", lambda tmp, sub=sub: torch.save({k: v.cpu() for k, v in sub.state_dict().items()}, tmp))
    write_atomic(out / "model.pt", lambda tmp: torch.save(
        {"arch": args.arch, "class_names": data.class_names, "mean": mean.cpu(), "std": std.cpu(), "stages": args.order,
         "model": {k: v.cpu() for k, v in model.state_dict().items()}, "norms": {s: {k: v.cpu() for k, v in n.items()} for s, n in model.stage_norms.items()}}, tmp))
    result = {"method": "do", "dataset": args.dataset, "imb": args.imb, "arch": args.arch, "seed": args.seed, "split_seed": args.split_seed,
              "epochs": args.epochs, "args": vars(args), "acc": {g: chosen[g] for g in (*GROUPS, "all")}, "per_class": chosen["per_class"],
              "ece": chosen["ece"], "submodels": report["submodels"], "aggregations": report["test"]["aggregations"],
              "lambda_by_group": report["test"]["lambda_by_group"], "gammas": report["gammas"], "importance_by_group": report["importance_by_group"],
              "bar": report["bar"], "pruning_curve": report["pruning_curve"], "test": report["test"], "val": report.get("val"),
              "images_per_second": report["images"] / report["train_seconds"], "train_seconds": report["train_seconds"] + report["tpd_seconds"],
              "eval_seconds": report["test"]["forward_seconds"] + report["test"]["weights_seconds"],
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__, "precision": "bf16" if env.bf16 else "fp32", "git": commit}
    write_log(out / "log.csv", report["log"])
    write_json(out / "result.json", result)
    draw_figures(report, out)
    print(f"\nresult: {out / 'result.json'}")
    return result


if __name__ == "__main__":
    run_script(main)
