# SPDX-License-Identifier: MIT
"""DO: Decoupled Optimisation for Long-Tailed Visual Recognition (Cong et al., AAAI 2024, 38(2), 1380-1388), in one
file.

A network is trained in stages, for many-, medium- and few-shot classes, each with its own draws and margin (CPO). After
a stage a Taylor score decides which weights the stage keeps, frozen; the others start afresh in the next (TPD). The
nested sub-models answer together, mixed for each test image (test time).

    python do_lt.py --dataset synth                                   a minute on two CPU cores
    python do_lt.py --dataset cifar100 --imb 100 --data-root data     CIFAR-100-LT, two stages; README has the figures
    python do_lt.py --dataset cifar100 --imb 100 --recipe paper       every value as the paper has it
    python do_lt.py --dataset cifar100 --imb 100 --resume             go on after an interruption
"""
import math
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse
from torch.optim.swa_utils import update_bn

from data_lt import (GROUPS, RANK, WORLD, InputError, crop_flip, describe, expected_calibration_error, group_accuracy,
                     group_means, load_dataset, mixup, normalize, number, reading, shifted)
from models import (all_sum, autocast, build_model, clock, distribute, fill_in, learning_rates, plain_state, ready,
                    run_script, script_parser, start, stop_unless_finite)
from models import OWNER, add_owner_masks, keep_stage_rest, owned_layers, submodel_state, weight_layers

# Defaults by dataset; every value is a flag, one number a stage where there are several. "paper": what its
# "Implementation Details" say, on top of the dataset's (its rate there is a tenth in the later stages).
LARGE = dict(arch="resnet50", epochs=[100, 50, 50], lr=[0.1, 0.05, 0.05], rho=0.8, gamma=[0.5, 0.8], batch_size=256)
RECIPES = {
    "cifar10": dict(mixup=0.4),
    "cifar100": dict(mixup=0.4),
    "cifar100 imb 50": dict(gamma=[0.5, 0.6], mixup=0.4),
    "cifar100, two stages": dict(order="many,few", epochs=[150, 50], gamma=[0.5], mixup=0.4),  # validation's choice
    "synth": dict(arch="resnet20", epochs=[20, 8, 8], batch_size=32, aug="basic", tpd_iters=3, warmup=1),
    "imagenet_lt": LARGE,
    "places_lt": LARGE | dict(arch="resnet152", pretrained=1),
    "inat18": LARGE | dict(gamma=[0.5, 0.6], importance_images=4),
    "folder": LARGE,
    "default": dict(arch="resnet32", order="many,medium,few", epochs=[100, 50, 50], lr=[0.1, 0.05, 0.05], warmup=5,
                    schedule="cosine", mixup=0.0, batch_size=128, aug="strong", rho=0.7, gamma=[0.5, 0.8], reinit=0.25,
                    tpd_iters=20, pretrained=0, importance_images=20, prune_classifier=0, agg="product"),
    "paper": dict(batch_size=256, lr=[0.05, 0.005, 0.005], schedule="constant", warmup=0, mixup=0.0,
                  reinit=1.0, tpd_iters=1, prune_classifier=1, agg="instance", aug="strong"),
    "paper, photographs": dict(lr=[0.02, 0.002, 0.002]),
}

class Stage(NamedTuple):
    """What one stage trains with: its group's name and classes (indices), P(class drawn) (K,), log alpha (K,) on the
    device, epochs, peak rate, and gamma, the share of free weights pruned at its end (None: auto, or the last)."""
    name: str
    classes: np.ndarray
    probs: np.ndarray
    log_alpha: torch.Tensor
    epochs: int
    lr: float
    gamma: float

# ------------------------------------------------------------------ Collaborative Parameter Optimisation (CPO), Eq. 1-3

def stage_classes(counts, stage):
    """Class indices of a stage's group: many > 100, medium 20..100, few < 20 training images; medium-top and medium-low
    split medium at 50 (Table 6). counts: (K,)."""
    low, high = {"many": (101, np.inf), "medium": (20, 100), "medium-top": (50, 100), "medium-low": (20, 49),
                 "few": (0, 19)}[stage]
    return np.flatnonzero((np.asarray(counts) >= low) & (np.asarray(counts) <= high))

def stage_class_probs(counts, stage, rho, few="balanced"):
    """Eq. 1: P(class drawn) in a stage, float array (K,), sums to 1.

    many: ~ N_c. medium: ~ rho for medium classes, 1 - rho for the others. few: every class alike ("balanced": the
    paper's 1 / N_y as a weight of each image) or ~ 1 / N_c ("inverse"). counts: (K,).
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
    """Eq. 3: alpha_t by class, float array (K,). many: 1. medium: rho for medium classes, 1 - rho for the others (the
    paper's scalar rho cancels in the softmax). few: the label frequencies in reverse order, the rarest class gets the
    largest. counts: (K,)."""
    counts = np.asarray(counts, dtype=np.float64)
    alpha = np.ones_like(counts)
    if stage == "few":
        alpha[np.argsort(-counts, kind="stable")] = np.sort(counts) / counts.sum()
    elif stage != "many":
        alpha *= 1 - rho
        alpha[stage_classes(counts, stage)] = rho
    return alpha

def compensation_loss(logits, target, log_alpha):
    """Eq. 2: CE(f(x) - log alpha_t, y), the mean over the batch. logits: n x K; target: int (n,); log_alpha: (K,)."""
    return F.cross_entropy(logits - log_alpha, target)

def train(network, optimizer, batches, rates, log_alpha, masks, data, args, rng):
    """SGD over `batches` at the learning rates `rates`. masks: {weight: 1 where it is trained, else 0}, without the
    weights that train whole. Returns (3, K): images drawn and correct by class (with mixup: against the first label);
    loss times images, the same in the whole row.

    Weight decay is added to the gradient here, not in the optimiser, and the gradient of frozen weights is zeroed after
    it: their momentum stays 0 and SGD leaves them bit for bit as they are.
    """
    network.train()
    sums = torch.zeros(3, data.num_classes, device=data.device)
    for (x, y), rate in zip(batches, rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, other, lam = mixup(x, y, args.mixup, rng)
        with autocast(data.device, args.precision):
            logits = network(x)
        logits = logits.float()
        loss = compensation_loss(logits, y, log_alpha)
        if lam < 1:
            loss = lam * loss + (1 - lam) * compensation_loss(logits, other, log_alpha)
        optimizer.zero_grad()
        loss.backward()
        for w in optimizer.param_groups[0]["params"]:
            w.grad.add_(w.detach(), alpha=args.weight_decay)
            if w in masks:
                w.grad.mul_(masks[w])
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            truth, right = F.one_hot(y, data.num_classes).float(), (logits.argmax(1) == y).float()[:, None]
            sums[:2] += torch.stack([truth.sum(0), (truth * right).sum(0)])
            sums[2:] += loss * len(x)
    return all_sum(sums)

def make_optimizer(model, lr, args):
    """SGD with momentum 0.9 (Nesterov's, but not in the paper); `train` adds weight decay, sparing frozen weights."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=args.recipe != "paper")

def trainable_masks(model, alive=None):
    """{weight: mask} of the layers with frozen weights, for `train`: 1 where no earlier stage owns it. alive: {layer:
    bool tensor}, False for weights that TPD has pruned. Empty in stage 1, where everything trains."""
    masks = {}
    for name, layer in owned_layers(model).items():
        mask = getattr(layer, OWNER) == 0 if alive is None else (getattr(layer, OWNER) == 0) & alive[name]
        masks[layer.weight] = mask.to(layer.weight.dtype)
    return masks if alive is not None or any(getattr(m, OWNER).any() for m in owned_layers(model).values()) else {}

def cpo(model, t, stage, data, args, run):
    """Train stage t: its draws and margin; the weights of earlier stages are active and frozen. Goes on from
    run.state."""
    here, epochs, total = run.state if run.state.get("stage") == t else {}, stage.epochs, sum(args.epochs)
    optimizer, masks, network = make_optimizer(model, stage.lr, args), trainable_masks(model), distribute(model)
    if here.get("optimizer"):
        optimizer.load_state_dict(here["optimizer"])
    sampler, steps = data.sampler(stage.probs, args.seed * 1000 + t), len(data.train) // data.batch_size
    schedule, warmup = ("cosine", args.warmup) if t == 1 else (args.schedule, 0)
    print(f"\nstage {t}, {stage.name}: {epochs} epochs, rate {stage.lr:g} {schedule}; accuracy as drawn, and val")
    for epoch in range(here.get("epoch", 0), epochs):
        began, key = clock(data.device), [args.seed, t, 1, epoch]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        rates = learning_rates(stage.lr, epoch, epochs, steps, schedule, warmup)
        batches, rng = data.batches(sampler.set_epoch(epoch).indices(), key), np.random.default_rng([*key, RANK])
        sums = train(network, optimizer, batches, rates, stage.log_alpha, masks, data, args, rng)
        stop_unless_finite(sums[2, 0], model, f"stage {t}, epoch {epoch + 1}")
        drawn, correct, loss = sums.cpu().double().numpy()
        acc = group_means(100 * correct / np.where(drawn > 0, drawn, np.nan), data.groups)
        seconds, n, val = clock(data.device) - began, steps * data.batch_size, None
        if epoch % 10 == 9 or epoch + 1 == epochs:
            val = scored(predict(model, data.val.images, data, args)[0], data.val, data, args)["all"]
        run.log({"stage": t, "epoch": epoch + 1, "loss": loss[0] / n, "rate": rates[0], **acc, "val": val},
                n, seconds, n * total)
        run.save(model, optimizer, stage=t, epoch=epoch + 1, rest=model.stage_rest)
    if t == 1:
        run.write("stage1.pt", lambda tmp: torch.save(plain_state(model), tmp))
    record(model, f"stage {t} ({stage.name}) after CPO", data, args, run)

# ---------------------------------------------------------------------- Taylor-guided Parameter Decoupling (TPD), Eq. 4

def taylor_importance(weights, class_losses, kind="taylor", generator=None):
    """E = (w dL_y/dw)^2, the mean over classes y: importance of each weight to a group of classes, tensors shaped like
    `weights`.

    class_losses: iterable of scalars L_y, the loss averaged over images of one class y, each with its graph (a
    generator keeps one in memory at a time). "fisher": (dL_y/dw)^2 instead; "l1": |w|; "random": uniform (from
    `generator`); these two look at no loss.
    """
    if kind == "l1":
        return [w.detach().abs() for w in weights]
    if kind == "random":
        return [torch.rand(w.shape, generator=generator).to(w.device) for w in weights]
    scores, n = [torch.zeros_like(w) for w in weights], 0
    for loss in class_losses:
        for score, w, g in zip(scores, weights, torch.autograd.grad(loss, weights)):
            score += (g * w.detach() if kind == "taylor" else g) ** 2
        n += 1
    return [score / max(n, 1) for score in scores]

def gradual_ratio(step, dt, g0, g1):
    """Eq. 4: the share pruned after `step` of `dt` steps from ratio g0 to g1, fast at first (Zhu and Gupta 2017)."""
    return g1 + (g0 - g1) * (1 - step / dt) ** 3

def last_ratio_before_largest_drop(ratios, accuracies):
    """gamma_best ("Taylor-guided Parameter Decoupling"): the ratio after which accuracy falls most."""
    drops = np.array(accuracies[1:-1]) - np.array(accuracies[2:])  # not from 0: the next stage needs free weights
    return ratios[1 + int(drops.argmax())]

def importance(model, layers, classes, log_alpha, data, args, kind="taylor", generator=None):
    """taylor_importance of the weights of `layers` to `classes`, by at most --importance-images training images of
    each, not augmented; processes share the classes and all get the same scores."""
    model.eval()
    weights, mine = [m.weight for m in layers.values()], classes[RANK::WORLD]
    by_class = np.split(np.argsort(data.train.labels, kind="stable"), np.cumsum(data.counts)[:-1])

    def losses():
        """The classes' losses, one graph at a time."""
        for c, x in zip(mine, data.rows([by_class[c][:args.importance_images] for c in mine])):
            with autocast(data.device, args.precision):
                logits = model(x).float()
            yield compensation_loss(logits, torch.full((len(x),), int(c), device=data.device), log_alpha)
    scores = taylor_importance(weights, losses(), kind, generator)
    shared = WORLD > 1 and kind in ("taylor", "fisher")
    return [all_sum(s * len(mine)) / len(classes) for s in scores] if shared else scores

def prune_to(model, alive, ratio, scores):
    """Zero the lowest-scored weights until `ratio` of the free ones (owner 0) is pruned; ranks all layers together.
    Updates `alive`."""
    layers = owned_layers(model)
    free = {n: getattr(m, OWNER) == 0 for n, m in layers.items()}
    flat = torch.cat([s.masked_fill(~alive[n], -1.0)[free[n]] for n, s in zip(layers, scores)])  # pruned: lowest
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:round(ratio * len(flat))]] = False
    with torch.no_grad():
        for part, (name, layer) in zip(keep.split([int(f.sum()) for f in free.values()]), layers.items()):
            alive[name][free[name]] = part
            layer.weight.mul_(alive[name] | ~free[name])

def prune_gradually(model, alive, before, ratio, t, stage, picks, data, args):
    """From `before` to `ratio` in --tpd-steps steps (Eq. 4), retraining --tpd-iters iterations on `picks` after each;
    BatchNorm's statistics are then those of the pruned network. Updates the model and `alive`."""
    dt, key, network = args.tpd_steps, [args.seed, t, 2, round(100 * ratio)], distribute(model)
    all_rates = learning_rates(args.tpd_lr, 0, 1, dt * args.tpd_iters)
    optimizer = make_optimizer(model, args.tpd_lr, args)
    for step in range(1, dt + 1):
        random = torch.Generator().manual_seed(args.seed * 10 ** 6 + t * 10 ** 4 + round(1000 * ratio) + step)
        layers = owned_layers(model)
        scores = importance(model, layers, stage.classes, stage.log_alpha, data, args, args.importance, random)
        prune_to(model, alive, gradual_ratio(step, dt, before, ratio), scores)
        masks = trainable_masks(model, alive)
        for weight, mask in masks.items():  # a weight just pruned must not drift on from zero
            if "momentum_buffer" in optimizer.state[weight]:
                optimizer.state[weight]["momentum_buffer"].mul_(mask)
        batches = data.batches(picks.reshape(dt, -1)[step - 1], [*key, step])
        rates, rng = all_rates[(step - 1) * args.tpd_iters:], np.random.default_rng([*key, step, RANK])
        sums = train(network, optimizer, batches, rates, stage.log_alpha, masks, data, args, rng)
        stop_unless_finite(sums[2, 0], model, f"pruning after stage {t}")
    with autocast(data.device, args.precision), torch.no_grad():
        update_bn(data.batches(picks[:40 * data.batch_size // WORLD], [*key, 0]), model)

def tpd(model, t, stage, data, args, run):
    """Prune what the stage can do without, keep the rest for good (owner t, frozen), and start the pruned weights
    afresh for the next stage. With --gamma auto the ratio is the last before the largest drop in validation accuracy.
    The last stage keeps all."""
    began, gamma = clock(data.device), stage.gamma
    alive = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in owned_layers(model).items()}
    if t < len(args.order):
        ratios = [g / 10 for g in range(10)] if args.gamma == "auto" else [gamma]
        steps = args.tpd_steps * args.tpd_iters * len(ratios)
        draws = data.sampler(stage.probs, args.seed * 1000 + t, steps).set_epoch(10 ** 6).indices()
        curve, reached = [], []
        for before, ratio, picks in zip([0.0, *ratios], ratios, draws.reshape(len(ratios), -1)):
            if ratio > 0:
                prune_gradually(model, alive, before, ratio, t, stage, picks, data, args)
            if args.gamma == "auto":
                per_class = scored(predict(model, data.val.images, data, args)[0], data.val, data, args)["per_class"]
                curve.append((ratio, float(np.mean([per_class[c] for c in stage.classes if per_class[c] is not None]))))
                reached.append([{k: v.clone() for k, v in state.items()} for state in (model.state_dict(), alive)])
        if args.gamma == "auto":
            gamma, run.report["pruning_curve"][stage.name] = last_ratio_before_largest_drop(*zip(*curve)), curve
            state, alive = reached[ratios.index(gamma)]
            model.load_state_dict(state)
        run.report["gammas"].append(gamma)
        print(f"TPD: {100 * gamma:.0f} % of the free weights pruned by {args.importance} importance")
        record(model, f"stage {t} ({stage.name}) after TPD", data, args, run)
    keep_stage_rest(model, t)
    generator = torch.Generator().manual_seed(args.seed * 1000 + t)
    with torch.no_grad():
        for name, layer in owned_layers(model).items():
            owner = getattr(layer, OWNER)
            owner[(owner == 0) & alive[name]] = t
            fresh = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
            fresh *= args.reinit * math.sqrt(2 / layer.weight[0].numel())  # Kaiming normal, times --reinit
            layer.weight.copy_(torch.where(owner == 0, fresh, layer.weight))
    run.report["tpd_seconds"] += clock(data.device) - began
    run.save(model, stage=t + 1, epoch=0, rest=model.stage_rest)

# ----------------------------------------------------------------------------------- test time: sub-models mixed, Eq. 5

def simplex_lattice(T, n):
    """All points of the simplex whose T coordinates are multiples of 1 / n: float64 tensor G x T."""
    bars = np.array(list(combinations(range(n + T - 1), T - 1))).reshape(-1, T - 1)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, n + T - 1)))
    return torch.from_numpy(np.diff(edges, axis=1) - 1).double() / n

def instance_weights(p1, p2, shared=False):
    """Eq. 5: lambda of each test image, the mixture whose predictions for two views of the image agree best (cosine
    similarity).

    p1, p2: predictions of T sub-models for the views, T x U x K probabilities -> lambda, U x T, rows summing to 1;
    shared: 1 x T, the one lambda with the best mean. The similarity depends on T x T inner products alone, so a lattice
    on the simplex (1/50; T > 3: 1/20) is searched whole, where the paper climbs a softmax of T numbers: no gradient, no
    step size, no pass of the network.
    """
    T = len(p1)
    lattice = simplex_lattice(T, 50 if T <= 3 else 20).to(p1.device)
    pairs = (lattice[:, :, None] * lattice[:, None]).flatten(1).T  # T^2 x G
    tie = 1e-9 * (lattice - 1 / T).square().sum(1)  # nothing to choose by: equal weights
    values = []
    for a, b in zip(p1.double().split(4096, 1), p2.double().split(4096, 1)):
        grams = (torch.einsum("tuk,suk->uts", *two).flatten(1) for two in ((a, b), (a, a), (b, b)))
        between, first, second = (gram @ pairs for gram in grams)
        values.append(between / (first * second).sqrt().clamp_min(1e-12) - tie)
        values[-1] = values[-1].sum(0, keepdim=True) if shared else lattice[values[-1].argmax(1)]
    return (lattice[sum(values).argmax(1)] if shared else torch.cat(values)).float()

def product(logp, w, counts):
    """log of prod_t p_t^a_t * N_c^b * e^(d if c is medium), not normalised: N x K. logp: T x N x K; w: (a_1 .. a_T, b,
    d); counts: (K,). With b and d that take off the stages' priors it is the balanced product of experts of BalPoE
    (Aimar et al., CVPR 2023)."""
    counts = torch.as_tensor(counts, dtype=logp.dtype, device=logp.device)
    medium = ((counts >= 20) & (counts <= 100)).to(logp)
    return torch.tensordot(w[:-2], logp, 1) + w[-2] * counts.log() + w[-1] * medium

def fit_product(logp, labels, counts):
    """The weights w of `product` with the least log loss on held-out images, classes weighing alike, float (T + 2,):
    they calibrate the sub-models (Guo et al., ICML 2017) and take off their priors (Menon et al., ICLR 2021). Not in
    the paper. labels: int (N,)."""
    rare = 1 / torch.bincount(labels, minlength=len(counts)).clamp_min(1)[labels].float()
    w = torch.tensor([1 / len(logp)] * len(logp) + [0.0, 0.0], device=logp.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        """The loss with its gradient, as LBFGS asks for it."""
        optimizer.zero_grad()
        loss = (rare * F.cross_entropy(product(logp, w, counts), labels, reduction="none")).sum() / rare.sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return w.detach()

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
    """Top-1 accuracy by group, per class and as --test-shift asks, and ECE, from logits N x K (or log-probabilities).
    Nothing but None where the split is empty."""
    if not len(split):
        return dict.fromkeys((*GROUPS, "all", "per_class"))
    ece = expected_calibration_error(logits.softmax(1), torch.from_numpy(split.labels).to(logits.device))
    acc = group_accuracy(logits.argmax(1).cpu(), split.labels, data.counts)
    return acc | shifted(acc["per_class"], data.counts, args.test_shift) | {"ece": ece}

def aggregate(probs, logp, w, split, stages, data, args):
    """The four mixtures of the sub-models, each alone, and two diagnoses that use labels. probs: T x (1 + V) x N x K,
    view 0 clean; logp: T x N x K, their mean logarithms; w: of `product`. Every prediction is the mean over the clean
    image and its views; lambda is found from the first two random views."""
    T, mean, began = len(probs), probs.mean(1), clock(data.device)
    lam = {"instance": instance_weights(probs[:, 1], probs[:, 2])}
    seconds = clock(data.device) - began
    lam["group"] = instance_weights(probs[:, 1], probs[:, 2], shared=True)
    lam["mean"] = torch.full((1, T), 1 / T, device=data.device)
    mixed = {name: torch.einsum("tuk,ut->uk", mean, v.expand(len(split), -1)).log() for name, v in lam.items()}
    mixed["product"] = product(logp, w, data.counts)
    labels = torch.from_numpy(split.labels).to(data.device)
    expert = torch.full((data.num_classes, T), 1 / T, device=data.device)  # of a class that no stage covers: all alike
    for t, stage in enumerate(stages):
        expert[stage.classes] = torch.eye(T, device=data.device)[t]
    told = torch.einsum("tuk,ut->uk", mean, expert[labels])
    chosen = {g: lam["instance"].cpu().numpy()[np.isin(split.labels, c)] for g, c in data.groups.items()}
    return {"weights_seconds": seconds, "product": w.tolist(), "group_lambda": lam["group"][0].tolist(),
            "lambda_by_group": {g: v.mean(0).tolist() if len(v) else None for g, v in chosen.items()},
            "aggregations": {name: scored(m, split, data, args) for name, m in mixed.items()},
            "alone": [scored(p.log(), split, data, args) for p in mean],
            "oracle_by_true_group": scored(told.log(), split, data, args),
            "at_least_one_right": 100 * (mean.argmax(2) == labels).any(0).float().mean().item()}

def test_time(model, stages, data, args, run):
    """Stage 1's network before TPD and the sub-models on the validation and the test images, then mixed. The weights of
    the products are fitted on the validation split (without one: a plain mean of logits). report["bar"], what DO has to
    beat, if stage 1 is the many: cross-entropy, its prior taken off (Menon et al., ICLR 2021: tau 1), and a product of
    this one expert. Adds to run.report; returns the sub-models' plain state dicts."""
    T, report, seconds = len(stages), run.report, 0.0
    with reading(run.path / "stage1.pt", "copy it from where the run was begun"):
        first = torch.load(run.path / "stage1.pt", map_location="cpu", weights_only=True)
    probs = {part: torch.empty(T + 1, 1 + args.views, len(split), data.num_classes, device=data.device)
             for part, split in (("val", data.val), ("test", data.test))}
    states, single = [submodel_state(model, t) for t in range(1, T + 1)], {"ce": [1, 0, 0], "ce_la": [1, -1, 0]}
    for t, state in enumerate([first, *states]):
        network = build_model(args.arch, data.num_classes).to(data.device, memory_format=torch.channels_last)
        network.load_state_dict(state)
        name = f"sub-model {t}" if t else "stage 1 before TPD"
        report["importance_by_group"][name] = importance_by_group(network, data, args)
        with suppress(torch.fx.proxy.TraceError):  # BatchNorm goes into the convolutions: the same outputs, sooner
            network = fuse(network.eval())
        for part in probs:
            began = clock(data.device)
            probs[part][t] = predict(network, getattr(data, part).images, data, args, args.views).softmax(2)
            seconds += (clock(data.device) - began) * (t > 0 and part == "test")
    w = torch.tensor([1 / T] * T + [0.0, 0.0], device=data.device)
    for part, split in (("val", data.val), ("test", data.test)):
        logp = torch.stack([p.clamp_min(1e-12).log().mean(0) for p in probs[part]])
        if part == "val" and len(split):
            labels = torch.from_numpy(split.labels).to(data.device)
            w, single["ce_fitted"] = (fit_product(some, labels, data.counts) for some in (logp[1:], logp[:1]))
        if len(split):
            report[part] = aggregate(probs[part][1:], logp[1:], w, split, stages, data, args)
        bar = {name: product(logp[:1], torch.as_tensor(v).to(logp), data.counts) for name, v in single.items()}
    report["bar"] = {name: scored(v, split, data, args) for name, v in bar.items() if stages[0].name == "many"}
    report["test"]["forward_seconds"] = seconds
    return states

# --------------------------------------------------------------------------------------------------------------- report

def importance_by_group(model, data, args):
    """Mean Taylor importance of a weight to each class group (Fig. 1b): {"many", "medium", "few"}, None for an empty
    group."""
    result, log_alpha = {}, torch.zeros(data.num_classes, device=data.device)
    for name, classes in data.groups.items():
        scores = importance(model, weight_layers(model), classes, log_alpha, data, args) if len(classes) else []
        result[name] = float(sum(s.double().sum() for s in scores)) / sum(s.numel() for s in scores) if scores else None
    return result

def record(model, label, data, args, run):
    """Accuracy on clean images as the stages pass, for the paper's Table 7."""
    entry = {name: scored(predict(model, split.images, data, args)[0], split, data, args)
             for name, split in (("acc", data.test), ("val", data.val))}
    run.report["submodels"][label] = entry
    print(f"{label}, test: " + ", ".join(f"{g} {entry['acc'][g]:.1f}" for g in (*GROUPS, "all")
                                         if entry["acc"][g] is not None), flush=True)

def show_report(report, args, run):
    """The tables and figures of the paper, from this run."""
    test, curves = report["test"], report["pruning_curve"]
    run.show("stages", "Clean test images (Table 7)", {k: entry["acc"] for k, entry in report["submodels"].items()})
    lam = {f"sub-model {t + 1}": {g: v and v[t] for g, v in test["lambda_by_group"].items()}
           for t in range(len(test["alone"]))}
    run.show("lambda_by_group", "Mean lambda of the instance weights (Table 9)", lam, GROUPS, ".2f")
    importances = report["importance_by_group"]
    run.show("importance_by_group", "Mean Taylor importance of a weight (Fig. 1b)", importances, GROUPS, ".1e")
    if curves:
        rows = {f"{name} classes": {f"{g:.0%}": acc for g, acc in curve} for name, curve in curves.items()}
        ratios = [f"{10 * g}%" for g in range(10)]
        run.show("pruning_curve", "Validation accuracy by ratio pruned (Fig. 4)", rows, ratios)
    names = {"ce": "cross-entropy (stage 1)", "ce_la": "  + logit adjustment", "ce_fitted": "  + fitted"}
    rows = {names[key]: acc for key, acc in report["bar"].items()}
    rows |= {f"sub-model {t} alone": acc for t, acc in enumerate(test["alone"], 1)}
    rows |= {f"DO, {name}": acc for name, acc in test["aggregations"].items()}
    rows |= {"(diagnosis) oracle by true group": test["oracle_by_true_group"]}
    run.show("accuracy_by_group", "Mean over the clean image and its views", rows, (*GROUPS, "all", *args.test_shift))
    print(f"(diagnosis) a sub-model is right: {test['at_least_one_right']:.1f} %; instance weights: "
          f"{test['weights_seconds']:.2f} s beside {test['forward_seconds']:.1f} s of forward passes; weights of the "
          f"product: {', '.join(f'{v:.2f}' for v in test['product'])}")

# ------------------------------------------------------------------------------------------------------- flags and main

def parse_args(argv=None):
    """Flags; what is not given comes from RECIPES. Raises InputError for values out of range."""
    parser = script_parser("Decoupled Optimisation (DO) for long-tailed recognition", "write the sub-models")
    share, shares = number(above=0, below=1), number(above=0, below=1, several=True)
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=["default", "paper"], default="default", help="paper: every value as published")
    add("--epochs", type=number(int, 0, several=True), help="one a stage: 100,50,50; 0: --weights names its stage1.pt")
    add("--lr", type=number(above=0, several=True), help="peak rate, one a stage, as 0.1,0.05,0.05")
    add("--schedule", choices=["cosine", "constant"], help="of the rate after stage 1, whose is a cosine to 0")
    add = parser.add_argument_group("method").add_argument
    add("--order", help="stages: many,few or many,medium,few or many,medium-top,medium-low,few")
    add("--rho", type=share, help="how strongly medium classes are drawn in their stage")
    add("--gamma", type=lambda text: text if text == "auto" else shares(text), help="share pruned after each stage "
        "but the last, as 0.5,0.8; or auto")
    add("--few-sampling", choices=["balanced", "inverse"], default="balanced", help="draws of the few stage")
    add("--loss", choices=["compensation", "ce"], default="compensation", help="ce: no margin in any stage (Table 8)")
    add("--importance", choices=["taylor", "l1", "fisher", "random"], default="taylor", help="what ranks the weights")
    add("--importance-images", type=number(int, 1), help="training images a class for the score, at most")
    add("--prune-classifier", type=int, choices=[0, 1], help="1: TPD ranks the last layer too; 0: each stage's own")
    add("--tpd-steps", type=number(int, 1), default=10, help="steps of gradual pruning (the paper's dt)")
    add("--tpd-iters", type=number(int, 1), help="retraining iterations after each of them")
    add("--tpd-lr", type=number(above=0), default=0.02, help="rate of that retraining, cosine to 0")
    add("--reinit", type=number(least=0), help="scale of the fresh weights over Kaiming's; 0 starts them at zero")
    add("--agg", choices=["product", "instance", "group", "mean"], help="the mixture reported; the paper's: instance")
    args = parser.parse_args(argv)
    kind, imb = None, args.imb or 100
    if args.dataset == "cifar100" and imb in (50, 100):  # --order, or three values of --epochs or --lr, ask for three
        two = args.order in (None, "many,few") and all(len(v or []) < 3 for v in (args.epochs, args.lr))
        kind = "cifar100, two stages" if two and args.recipe == "default" else "cifar100 imb 50" if imb == 50 else None
    given = fill_in(args, RECIPES, kind)
    args.order = args.order.split(",")
    known = ("many", "medium", "medium-top", "medium-low", "few")
    both = "medium" in args.order and set(args.order) & {"medium-top", "medium-low"}
    if set(args.order) - set(known) or len(set(args.order)) != len(args.order) or both:
        raise InputError(f"--order {','.join(args.order)}: name each stage once, of {', '.join(known)}")
    T = len(args.order)
    for flag, n in {"epochs": T, "lr": T, "gamma": T - 1}.items():
        values = getattr(args, flag)
        if values == "auto":
            continue
        if len(values) not in (1, n) and flag in given:
            raise InputError(f"--{flag}: {len(values)} values for --order {','.join(args.order)}; give {n}, or one for "
                             "all")
        setattr(args, flag, (values + values[-1:] * n)[:n])
    return args

def make_stages(args, data):
    """The list of Stage; a stage without classes is left out with a warning, but for a first "many", which then serves
    all."""
    stages, counts = [], data.counts
    gammas = [None] * len(args.order) if args.gamma == "auto" else [*args.gamma, None]
    for name, epochs, lr, gamma in zip(list(args.order), args.epochs, args.lr, gammas):
        classes = stage_classes(counts, name)
        if not len(classes) and (name != "many" or stages):
            print(f"warning: no class is {name}; its stage is left out")
            args.order.remove(name)
            continue
        classes = classes if len(classes) else np.arange(len(counts))
        alpha = compensation_alpha(counts, name, args.rho) if args.loss == "compensation" else np.ones(len(counts))
        probs = stage_class_probs(counts, name, args.rho, args.few_sampling)
        log_alpha = torch.tensor(np.log(alpha), dtype=torch.float32, device=data.device)
        stages.append(Stage(name, classes, probs, log_alpha, epochs, lr, gamma))
    args.epochs = [stage.epochs for stage in stages]
    if not stages:
        raise InputError("--order: none of its stages has a class in this dataset; begin with many")
    if args.gamma == "auto" and not all(np.isin(data.val.labels, s.classes).any() for s in stages[:-1]):
        raise InputError("--gamma auto measures on validation images of each stage's classes; some have none")
    return stages

def main(argv=None):
    """Train, decouple, mix, evaluate: the whole method in the paper's order."""
    args = parse_args(argv)
    device = start(args)
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size, args.lists)
    describe(data, args.split_seed)
    if data.multi_label:
        raise InputError(f"--dataset {args.dataset} has several labels an image, which DO is not for; take more_lt.py")
    data.to(device, args.batch_size, args.aug, args.workers)
    stages = make_stages(args, data)
    torch.manual_seed(args.seed)
    model = build_model(args.arch, data.num_classes, args.weights or args.pretrained)
    model, run = ready(add_owner_masks(model, args.prune_classifier), data, args, "do")
    run.report = {"submodels": {}, "bar": {}, "importance_by_group": {}, "pruning_curve": {}, "gammas": [],
                  "tpd_seconds": 0.0} | run.report
    model.stage_rest = run.state.get("rest", {})

    for t, stage in enumerate(stages, 1):
        if t >= run.state.get("stage", 1):
            cpo(model, t, stage, data, args, run)  # Eq. 1-3
            tpd(model, t, stage, data, args, run)  # Eq. 4; the last stage keeps all
    states = test_time(model, stages, data, args, run)  # Eq. 5

    show_report(run.report, args, run)
    report, test = run.report, run.report["test"]
    saved = {"model.pt": {"stages": args.order, "model": model.state_dict(), "rest": model.stage_rest}}
    exports = {f"submodel{t}.pt": state for t, state in enumerate(states, 1) if args.export}
    kept = ("submodels", "bar", "gammas", "importance_by_group", "pruning_curve", "test", "val")
    result = {"method": "do", "eval_seconds": test["forward_seconds"] + test["weights_seconds"],
              "aggregations": test["aggregations"], "lambda_by_group": test["lambda_by_group"]}
    return run.finish(result | {k: report.get(k) for k in kept}, test["aggregations"][args.agg], data, saved, exports)

if __name__ == "__main__":
    run_script(main)
