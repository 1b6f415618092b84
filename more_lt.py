# SPDX-License-Identifier: MIT
"""MORE: Long-tailed Recognition with Model Rebalancing (Luo et al., NeurIPS 2025, arXiv
2510.08177), the whole method in one file.

Every weight is W_g + B A. A second forward pass with W_g alone must agree with the full one, the
more so the more frequent an image's class is, and by a weight that rises and falls as a sine over
the training: frequent classes move into W_g, the low-rank term is left to the rare ones. After
training B A is merged into W_g: the network and its cost are the plain ones. It is a plug-in on
any base loss; `--no-more` trains the base loss alone, the paired baseline. We could not read the
full paper; the equations follow secondary descriptions.

    python more_lt.py --dataset synth                                 a minute on two CPU cores
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce        on top of balanced softmax
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --no-more    expect 52.0 %
    python more_lt.py --dataset cifar100 --imb 100 --loss bsce --resume     go on
    python models.py runs/NAME/model.pt PHOTOS                        label new photographs
"""
import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch.nn.utils import parametrize

from data_lt import (GROUPS, RANK, WORLD, InputError, Loader, add_data_arguments,
                     add_system_arguments, all_sum, answers, argument_parser, find_checkpoint,
                     fingerprint, group_means, listed, load_from_flags, number, run_name,
                     run_script, seed_from, start, table, top_1, write_csv, write_file)
from models import (Classifier, LowRank, Network, add_low_rank, build_model, choose_precision,
                    classifier_content, clock, finish, general_only, memory_format, merge_low_rank,
                    network_stats, note_part, plain_state, say_share, stop_unless_finite,
                    synchronized)

# ------------------------------------------------------------------------------ recipes and flags

# Defaults by dataset. Every value is a flag.
PHOTOGRAPHS = dict(arch="resnet50", batch_size=256)
MULTI_LABEL = dict(
    arch="resnet50",
    pretrained=1,
    epochs=80,
    optimizer="adamw",
    lr=0.02,  # with --optimizer sgd
    low_rank_rate=0.1,
    batch_size=32,
    warmup=0,
)
RECIPES = {
    "cifar10": dict(mixup=0.4),
    "cifar100": dict(mixup=0.4),
    "synth": dict(
        arch="resnet20",
        epochs=14,
        lr=0.05,
        batch_size=32,
        aug="basic",
        warmup=1,
    ),
    "imagenet_lt": PHOTOGRAPHS,
    "places_lt": PHOTOGRAPHS | dict(arch="resnet152", pretrained=1),
    "inat18": PHOTOGRAPHS,
    # fine-tuning; the rate was chosen on validation images of Caltech-101
    "folder": PHOTOGRAPHS | dict(
        pretrained=1,
        epochs=14,
        lr=0.01,
        adamw_lr=1e-4,
        warmup=1,
        batch_size=64,
    ),
    "voc_mlt": MULTI_LABEL,
    "coco_mlt": MULTI_LABEL,
    "miml": MULTI_LABEL,
    "several labels": MULTI_LABEL,  # photographs of one's own
    "nuswide_scene": MULTI_LABEL | dict(epochs=40),
    "default": dict(
        arch="resnet32",
        pretrained=0,
        epochs=200,
        lr=0.1,         # peak rate
        warmup=5,       # epochs over which the rate rises at the start
        batch_size=128,
        aug="strong",
        mixup=0.0,
        optimizer="sgd",
        weight_decay=5e-4,
        adamw_lr=1e-3,
        adamw_weight_decay=0.01,
        low_rank_rate=1.0,   # rate of A and B over that of the other weights
        low_rank_decay=0.0,  # of A and B
        discrepancy="mse",
    ),
    # What is known of the paper's recipe, on top of the dataset's; its augmentation is not known.
    "paper": dict(
        epochs=200,
        lr=0.1,
        warmup=0,
        batch_size=256,
        aug="strong",
        mixup=0.0,
        optimizer="sgd",
        weight_decay=2e-4,
        low_rank_decay=2e-4,
        discrepancy="l2",
    ),
}

def parse_args(argv=None):
    """The flags, None where `settle` takes them from RECIPES. Raises InputError."""
    parser = argument_parser("Model Rebalancing (MORE) for long-tailed recognition")
    add_data_arguments(parser)

    add = parser.add_argument_group("training; flags without a default have one by dataset, "
                                    "see RECIPES").add_argument
    add("--loss", choices=["ce", "bsce", "ldam", "focal", "bce", "asl", "db"],
        help="base loss: ce, bsce (balanced softmax), ldam, focal; several labels per image: bce, "
             "focal, asl, db (default ce, bce)")
    add("--sampling", choices=["natural", "class-aware"],
        help="class-aware: a class at random, then one of its images (default natural; db: "
             "class-aware)")
    add("--arch", help="resnet32, resnet50, resnet152, another torchvision classifier, timm:NAME")
    add("--pretrained", type=int, choices=[0, 1], help="1: download ImageNet weights to start from")
    add("--weights", metavar="FILE",
        help="start from this state dict (a last layer of another shape starts afresh)")
    add("--recipe", choices=["default", "paper"], default="default",
        help="paper: the values that are known of the paper's CIFAR recipe")
    add("--optimizer", choices=["sgd", "adamw"],
        help="SGD with momentum (Nesterov's, but not in the paper), or AdamW")
    add("--epochs", type=number(int, 1), help="passes over the training images")
    add("--lr", type=number(above=0), help="peak rate; cosine to 0")
    add("--warmup", type=number(least=0), help="epochs at the start over which the rate rises")
    add("--batch-size", type=number(int, 2), help="of all processes together")
    add("--weight-decay", type=number(least=0), help="of all weights but A and B")
    add("--aug", choices=["strong", "basic", "none"], help="basic: crop, flip; strong: RandAugment")
    add("--mixup", type=number(least=0), help="alpha of mixup's Beta distribution; 0: none")
    add("--views", type=number(int, 2), default=2,
        help="random views of each test image beside the clean one")

    add = parser.add_argument_group("method").add_argument
    add("--no-more", action="store_true",
        help="the base loss alone, on plain weights: the paired baseline")
    add("--amplitude", type=number(least=0), default=2.0,
        help="A': times the classes it is the peak weight of the discrepancy loss; 0: no loss")
    add("--rank-ratio", type=number(above=0, most=1), default=0.1,
        help="rank of B A over the smaller side of a weight")
    add("--discrepancy", choices=["l2", "mse", "kl"],
        help="of the passes' logits: squared distance, the same as a mean over the logits, or KL")
    add("--schedule", choices=["sin", "constant"], default="sin", help="of the loss weight")
    add("--detach-general", action="store_true",
        help="no gradient through the general pass: cheaper")
    add("--low-rank-rate", type=number(above=0), help="rate of A and B over the other weights'")
    add("--low-rank-decay", type=number(least=0), help="weight decay of A and B")

    add_system_arguments(parser)
    return parser.parse_args(argv)

def has_two_passes(args):
    """Whether a step computes the discrepancy loss; without it one pass does."""
    return args.amplitude > 0 and not args.no_more

def recipe(args, name):
    """{flag: value} from RECIPES for a dataset's recipe, for what was not given."""
    chosen = RECIPES["default"] | RECIPES[name]
    if args.recipe == "paper":
        chosen |= RECIPES["paper"]
    adamw = (args.optimizer or chosen["optimizer"]) == "adamw"
    rates = {key: chosen.pop(f"adamw_{key}") for key in ("lr", "weight_decay")}
    return chosen | (rates if adamw else {})

def settle(args, data):
    """Fill in what was not given from the recipe, and fit --loss and --sampling to the data; after
    this nothing changes the flags. Raises InputError for flags that do not go together."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    vars(args).update(recipe(args, data.recipe) | given)
    if "warmup" not in given:
        args.warmup = min(args.warmup, args.epochs / 10)
    fitting = ("bce", "focal", "asl", "db") if data.multi_label else ("ce", "bsce", "ldam", "focal")
    args.loss = args.loss or fitting[0]
    if args.loss not in fitting:
        labels = "several labels" if data.multi_label else "one label"
        raise InputError(
            f"--loss {args.loss}: {data.name} has {labels} per image; take {', '.join(fitting)}"
        )
    args.sampling = args.sampling or ("class-aware" if args.loss == "db" else "natural")
    if args.sampling == "class-aware" and args.loss in ("bsce", "ldam"):
        raise InputError(
            f"--sampling class-aware: --loss {args.loss} corrects for the counts "
            "itself; take ce or focal"
        )
    # The two passes differ by so little that bf16 rounds it away: L_MORE's gradient is noise then.
    if has_two_passes(args):
        if args.precision == "auto":
            args.precision = "fp32"
        if args.precision == "bf16":
            print("--precision bf16: its rounding is larger than the discrepancy of the two "
                  "passes, so MORE trains on noise; take fp32")
    method = "base" if args.no_more else "more"
    args.out = args.out or run_name(f"{method}_{args.loss}", args)

# --------------------------------------------------------- base losses, on which MORE is a plug-in

def balanced_softmax(logits, target, counts):
    """CE(f + log N_c, y), the mean (Ren et al., NeurIPS 2020): logit adjustment with tau 1.
    counts: (K,) tensor or array."""
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    return F.cross_entropy(logits + counts.log(), target)

def focal_loss(logits, target, gamma=2.0):
    """Mean of (1 - p_y)^gamma * CE (Lin et al., ICCV 2017). target: int (n,), or 0/1 n x K with
    an independent sigmoid per label. By logarithms, so that the gradient stays finite where an
    image is classified with certainty and gamma is below 1."""
    if target.dim() == 2:
        z = torch.where(target > 0, logits, -logits)
        return ((gamma * F.logsigmoid(-z)).exp() * -F.logsigmoid(z)).mean()
    log_p = logits.log_softmax(1)
    own = F.one_hot(target, logits.shape[1]).bool()
    log_rest = log_p.masked_fill(own, -math.inf).logsumexp(1)  # log(1 - p_y)
    return ((gamma * log_rest).exp() * F.nll_loss(log_p, target, reduction="none")).mean()

def ldam_loss(logits, target, counts, max_margin=0.5):
    """Label-distribution-aware margins, N_c^(-1/4) with the largest max_margin (Cao et al.,
    NeurIPS 2019), on a plain linear head.

    The margin is taken off the true class's logit and nothing is scaled (the paper's cosine head
    times 30 makes the margins far stronger). Without the deferred re-weighting of LDAM-DRW.
    """
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    margins = counts.clamp_min(1) ** -0.25
    margins = margins * (max_margin / margins.max())
    return F.cross_entropy(logits - F.one_hot(target, len(counts)) * margins, target)

def asymmetric_loss(logits, target, gamma_pos=0.0, gamma_neg=4.0, margin=0.05):
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7), the mean over n x K. target: 0/1 n x K.

    Positives: -(1 - p)^gamma_pos log p. Negatives: -q^gamma_neg log(1 - q), q = max(p - margin,
    0). (The published code sums where this takes the mean.)
    """
    q = (logits.sigmoid() - margin).clamp_min(1e-8)  # not 0, whose powers below 1 have no slope
    positive = (gamma_pos * F.logsigmoid(-logits)).exp() * F.logsigmoid(logits)
    negative = q**gamma_neg * torch.log1p(-q.clamp_max(1 - 1e-7))
    return -torch.where(target > 0, positive, negative).mean()

def distribution_balanced_loss(
    logits, target, counts, total, alpha=0.1, beta=10.0, mu=0.3, kappa=0.05, scale=5.0, gamma=2.0
):
    """Distribution-balanced loss (Wu et al., ECCV 2020), the mean over n x K; the values are its
    code's for VOC-MLT. target: 0/1 n x K; counts: (K,); total: training images.

    Re-balanced weight: r = (1 / N_k) / sum over the image's labels of 1 / N_j, smoothed to alpha
    + sigmoid(beta (r - mu)). Negative-tolerant logits: z - nu_k, nu_k = kappa log(total / N_k -
    1) / scale, for negatives times scale and their loss over it. gamma > 0 makes it its focal
    form, which the code doubles. The weights take class-aware draws for granted.
    """
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).clamp_min(1)
    y = target.to(logits)
    r = (1 / counts) / (y @ (1 / counts)).clamp_min(1e-12)[:, None]
    weight = alpha + torch.sigmoid(beta * (r - mu))
    nu = kappa * torch.log((total / counts - 1).clamp_min(1e-6)) / scale
    z = (logits - nu) * torch.where(y > 0, 1.0, scale)
    ce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    log_wrong = F.logsigmoid(torch.where(y > 0, -z, z))  # log(1 - p) of what is true
    focal = 2 * (gamma * log_wrong).exp() if gamma > 0 else 1.0
    return (focal * weight * ce * torch.where(y > 0, 1.0, 1 / scale)).mean()

def base_loss(name, data, device):
    """The function loss(logits, target) of --loss."""
    counts = torch.tensor(data.counts, dtype=torch.float32, device=device)
    published = dict(mu=0.2, scale=2.0) if data.name == "coco_mlt" else {}  # Wu et al.'s for COCO
    balanced = partial(distribution_balanced_loss, counts=counts, total=len(data.train))
    return {
        "ce": F.cross_entropy,
        "bsce": partial(balanced_softmax, counts=counts),
        "ldam": partial(ldam_loss, counts=counts),
        "focal": focal_loss,
        "bce": lambda logits, y: F.binary_cross_entropy_with_logits(logits, y.to(logits)),
        "asl": asymmetric_loss,
        "db": partial(balanced, **published),
    }[name]

# ---------------------------------------------------------- Model Rebalancing (MORE): W_g and B A

def sinusoidal_weight(step, total, amplitude):
    """a(t) = A sin(pi t / T): the weight of the discrepancy loss after `step` of `total` steps.
    The paper's A is A' x classes, A' = 2."""
    return amplitude * math.sin(math.pi * step / total)

def discrepancies(full, general, kind="mse", multi_label=False):
    """How far the two passes' logits are apart, per image: (n,). full, general: n x K.

    "l2": squared distance. "mse": the same as a mean over the logits. "kl": KL(full || general)
    of the softmax, or of the sigmoids of all labels.
    """
    if kind == "l2":
        return (full - general).square().sum(1)
    if kind == "mse":
        return (full - general).square().mean(1)
    if kind != "kl":
        raise ValueError(f"{kind}: unknown; take l2, mse or kl")
    if multi_label:  # a sigmoid is a softmax over the logit and 0
        full, general = (torch.stack([z, torch.zeros_like(z)], 1) for z in (full, general))
    p = full.log_softmax(1)
    q = general.log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="none").flatten(1).sum(1)

def more_loss(full, general, prior, target, discrepancy="mse"):
    """L_MORE = mean over the batch of prior(y) x discrepancy(full, general), without the schedule;
    a scalar.

    full, general: n x K logits of W_g + B A and of W_g. prior: (K,) class frequencies, a tensor
    or array. target: int (n,), or 0/1 n x K with several labels per image: their mean prior.
    """
    distance = discrepancies(full, general, discrepancy, target.dim() == 2)
    prior = torch.as_tensor(prior, dtype=distance.dtype, device=distance.device)
    if target.dim() == 1:
        weight = prior[target]
    else:
        weight = target.to(distance) @ prior / target.sum(1).clamp_min(1)
    return (weight * distance).mean()

class TwoPasses(nn.Module):
    """x -> (logits of W_g + B A, logits of W_g or None), as one forward: what
    DistributedDataParallel can wrap. Both passes use the same dropout mask."""

    def __init__(self, network, both, detach_general=False):
        super().__init__()
        self.network = network
        self.both = both
        self.detach_general = detach_general

    def forward(self, x):
        if not self.both:
            return self.network(x), None
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            full = self.network(x)
        with general_only(self.network), torch.set_grad_enabled(not self.detach_general):
            return full, self.network(x)

def make_optimizer(model, args):
    """SGD with momentum 0.9 (Nesterov's, but not in the paper), or AdamW; A and B have a weight
    decay and a rate of their own.

    Where images have several labels the recipe gives them a tenth of the rate, which is not in the
    paper: the discrepancy loss is steep along B (its curvature is 2 a(t) pi |dlogits/dB|^2), and at
    the full rate B oscillates and shakes W_g with it."""
    terms = nn.ModuleList(m for m in model.modules() if isinstance(m, LowRank))
    factors = list(terms.parameters())
    known = set(factors)
    others = [p for p in model.parameters() if p not in known]
    groups = [
        {"params": others, "weight_decay": args.weight_decay, "scale": 1.0},
        {"params": factors, "weight_decay": args.low_rank_decay, "scale": args.low_rank_rate},
    ]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    nesterov = args.recipe != "paper"
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=nesterov)

def train(network, optimizer, batches, plan, base, prior, discrepancy):
    """One step per batch of (x, [(share, labels), ..]). plan: per batch (learning rate, weight
    a(t) of the discrepancy loss). base: the base loss. prior: (K,) class frequencies.

    Returns images drawn and correct (of several labels: found) by class, (K,) each, and the sums
    of base loss and discrepancy loss over images.
    """
    network.train()
    drawn = torch.zeros_like(prior)
    correct = torch.zeros_like(prior)
    loss_sum = torch.zeros_like(prior[0])
    more_sum = torch.zeros_like(prior[0])
    for (x, targets), (rate, weight) in zip(batches, plan):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        full, general = network(x)
        loss = sum(share * base(full, labels) for share, labels in targets)
        rebalancing = torch.zeros_like(loss)
        if general is not None:
            rebalancing = sum(share * more_loss(full, general, prior, labels, discrepancy)
                              for share, labels in targets)
        optimizer.zero_grad()
        (loss + weight * rebalancing).backward()
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device; of mixed images by the first
            y = targets[0][1]
            said = full > 0
            if y.dim() == 1:
                y = F.one_hot(y, len(prior))
                said = F.one_hot(full.argmax(1), len(prior))
            drawn += y.sum(0)
            correct += (y * said).sum(0)
            loss_sum += loss * len(x)
            more_sum += rebalancing * len(x)
    return [all_sum(value) for value in (drawn, correct, loss_sum, more_sum)]

@torch.no_grad()
def low_rank_share(model):
    """|B A| / |W_g| (Frobenius) of each layer, {name: float}: a term that stays at zero does
    nothing."""
    share = {}
    for name, terms in model.named_modules():
        if isinstance(terms, parametrize.ParametrizationList) and isinstance(terms[0], LowRank):
            W_g = terms.original
            found = terms[0].product(W_g).norm() / W_g.norm()
            share[name.replace("parametrizations.", "")] = float(found)
    return share

def loss_weights(epoch, epochs, steps, peak, schedule):
    """a(t) of an epoch's steps, a list."""
    if schedule == "constant":
        return [peak] * steps
    first = epoch * steps
    return [sinusoidal_weight(first + i, epochs * steps, peak) for i in range(steps)]

def fit(network, loader, run):
    """Train W_g and B A together; goes on from the checkpoint of a resumed run."""
    args = run.args
    model = network.model
    data = loader.data
    epochs = args.epochs
    both = has_two_passes(args)
    optimizer = make_optimizer(model, args)
    if run.resumed:
        optimizer.load_state_dict(run.resumed["optimizer"])
    trained = distribute(TwoPasses(network, both, args.detach_general))
    base = base_loss(args.loss, data, loader.device)
    counts = torch.tensor(data.counts, dtype=torch.float32, device=loader.device)
    prior = counts / counts.sum()
    probs = None
    if args.sampling == "class-aware":
        probs = np.full(data.num_classes, 1 / data.num_classes)
    steps = loader.steps
    peak = args.amplitude * data.num_classes * both  # A = A' x classes
    print(
        f"\n{args.loss}: {epochs} epochs, rate {args.lr:g} cosine; accuracy (several labels: "
        "recall) on the images drawn, and on validation images"
    )
    for epoch in range(run.resumed.get("epoch", 0), epochs):
        began = clock(loader.device)
        key = [args.seed, 1, 1, epoch]
        torch.manual_seed(seed_from(*key) + RANK)  # of dropout
        rates = learning_rates(args.lr, epoch, epochs, steps, "cosine", args.warmup)
        weights = loss_weights(epoch, epochs, steps, peak, args.schedule)
        picks = loader.draw(probs, args.seed, epoch)
        batches = loader.batches(picks, key, args.mixup)
        drawn, correct, loss, more = train(
            trained, optimizer, batches, zip(rates, weights), base, prior, args.discrepancy
        )
        stop_unless_finite(loss + more, model, f"epoch {epoch + 1}", "--lr or --amplitude")
        seconds = clock(loader.device) - began
        images = steps * loader.batch_size
        row = {
            "epoch": epoch + 1,
            "loss": loss.item() / images,
            "rate": rates[0],
        }
        row |= group_means((100 * correct / drawn).cpu(), data.groups)  # NaN: nothing drawn
        due = epoch % 10 == 9 or epoch + 1 == epochs
        row["val"] = tested(network, "val", loader)["val"]["all"] if due else None
        if both:
            row |= {"a(t)": weights[0], "L_MORE": more.item() / images,
                    "|BA|/|W|": float(np.mean(list(low_rank_share(model).values())))}
        run.log(row, images, seconds)
        run.save(model, optimizer, epoch=epoch + 1)

# ---------------------------------------------------------- test time: merged into a plain network

def average_precision(scores, targets):
    """Average precision of each class, (K,) in 0..1, NaN where a class has no positive.

    The sum over thresholds of precision times the gain in recall, images of equal score counted
    together (scikit-learn's definition). scores: float N x K; targets: 0/1 N x K.
    """
    ordered, order = scores.T.contiguous().sort(1, descending=True)  # K x N
    hits = targets.T.gather(1, order).double()
    above = torch.searchsorted(-ordered, -ordered, right=True)  # images with at least this score
    precision = hits.cumsum(1).gather(1, above - 1) / above
    return (precision * hits).sum(1) / hits.sum(1)

def f1_scores(scores, targets):
    """(OF1, CF1) in percent of the labels with a positive logit: F1 of all decisions together,
    and of the mean precision and recall of the classes that have a positive. scores: logits
    N x K; targets: 0/1 N x K."""
    chosen = scores > 0
    truth = targets > 0
    hit = (chosen & truth).sum(0)
    said = chosen.sum(0)
    there = truth.sum(0)
    precision = (hit / said.clamp_min(1))[there > 0].mean()
    recall = (hit / there).nanmean()
    of1 = 2 * hit.sum() / (said + there).sum()
    cf1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return float(100 * of1), float(100 * cf1)

def scored(logits, split, data):
    """Average precision by group and per class (their mean is mAP), OF1 and CF1, from logits N x K,
    of images with several labels."""
    labels = torch.from_numpy(split.labels).to(logits.device)
    ap = (100 * average_precision(logits, labels)).cpu().numpy()
    of1, cf1 = f1_scores(logits, labels)
    found = {"per_class": listed(ap), "of1": of1, "cf1": cf1, "ece": None}
    return group_means(ap, data.groups) | found

def tested(network, part, loader, views=0, seed=0, adjustments=None):
    """{kind: figures} of a network on a split's clean images, of the mean over random views of them
    too, and of both once more with each of `adjustments` {kind: (K,)} added to the logits. The
    figures are top_1's, with several labels per image those of `scored`; None where the split is
    empty."""
    data = loader.data
    split = getattr(data, part)
    kinds = {part: 0.0} | (adjustments or {})

    def take(logits, rows):
        """The answers; with several labels all logits, which average precision ranks."""
        found = {}
        for kind, added in kinds.items():
            z = logits[0] + added
            found[kind] = z[0]
            if views:
                found[f"{kind}, mean of {1 + views} views"] = z.mean(0)
        return found if data.multi_label else {kind: answers(z) for kind, z in found.items()}
    found = loader.sweep([network], part, take, views, seed) or {part: None}
    score = scored if data.multi_label and len(split) else top_1
    return {kind: score(z, split, data) for kind, z in found.items()}

def test_time(network, loader, run):
    """The network on the test images, W_g alone beside it, and B A merged into W_g, which must
    change nothing. Adds to run.report."""
    args = run.args
    data = loader.data
    report = run.report
    model = network.model
    began = clock(loader.device)
    adjustments = {}
    if args.loss == "ce":  # post-hoc logit adjustment (tau 1), the baseline to beat
        counts = torch.tensor(data.counts, device=loader.device)
        adjustments["test, logit-adjusted"] = -counts.log()
    rows = tested(network, "test", loader, args.views, args.seed, adjustments)
    report["eval_seconds"] = clock(loader.device) - began
    report["merged_max_abs_diff"] = None
    report["low_rank_share"] = low_rank_share(model)
    rows |= tested(network, "val", loader)
    report["results"] = rows
    if args.no_more:
        return
    with general_only(model):
        rows["test, W_g alone"] = tested(network, "test", loader)["test"]
    torch.backends.cudnn.allow_tf32 = False  # bf16's and TF32's rounding is larger than a small BA
    exact = Network(model, "fp32")
    merged = merge_low_rank(copy.deepcopy(exact))

    def take(logits, rows):
        """How far the merged network is from the whole."""
        return {"difference": (logits[0, 0] - logits[1, 0]).abs().amax(1)}
    found = loader.sweep([exact, merged], "test", take)
    report["merged_max_abs_diff"] = float(found["difference"].max())
    merge_low_rank(model)

# ----------------------------------------------------------------------------------------- report

def show_report(report):
    """The tables of this run."""
    rows = {label: found for label, found in report["results"].items() if found["all"] is not None}
    rows["model.pt: clean images"] = report["clean"]
    title = "Top-1, %"
    columns = (*GROUPS, "all", "ece")
    if "of1" in report["clean"]:
        title = "mAP, %"
        columns = (*GROUPS, "all", "of1", "cf1")
    print("\n" + table(title, rows, columns))
    difference = report["merged_max_abs_diff"]
    if difference is not None:
        print(f"merged and unmerged logits (fp32) differ by {difference:.1e} at most; 1e-4 is fine")

def main(argv=None):
    """Decompose, train with two passes, merge, evaluate."""
    args = parse_args(argv)
    device = start(args)
    data = load_from_flags(args)
    settle(args, data)
    resumed = find_checkpoint(args, data)
    stats = network_stats(args.arch)
    loader = Loader(data, device, args.batch_size, args.aug, args.workers, stats)
    torch.manual_seed(args.seed)
    start_from = not resumed and (args.weights or args.pretrained)
    model = build_model(args.arch, data.num_classes, start_from, data.size)
    if not args.no_more:  # every weight W_g + B A, at the start exactly the plain network
        try:
            add_low_rank(model, args.rank_ratio)
        except ValueError as error:
            raise InputError(f"--arch {args.arch}: {error}; take another") from None
        layers = [m for m in model.modules() if parametrize.is_parametrized(m)]
        say_share(model, layers, "are W_g + B A")
        if not layers:
            raise InputError(f"--rank-ratio {args.rank_ratio:g}: A and B would be as large as the "
                             "weights, so none is split; take less")

    run = Run(args, data, resumed)
    network = prepare(model, loader, run)
    fit(network, loader, run)
    test_time(network, loader, run)

    report = run.report
    no_bias = torch.zeros(data.num_classes)
    saved = classifier_content(args.arch, loader, [plain_state(model)], torch.ones(1), no_bias)
    classifier = Classifier(saved).to(device)
    report["clean"] = tested(classifier.experts.networks[0], "test", loader)["test"]
    show_report(report)
    method = "base" if args.no_more else "more"
    return finish(run, method, report["results"]["test"], saved, loader)

# -------------------------------- Running: the same in both scripts, skip this on a first reading

def learning_rates(peak, epoch, epochs, steps, schedule="cosine", warmup=0):
    """The rates of an epoch's steps, a list: a cosine from `peak` to 0, or constant, after
    `warmup` epochs of rise."""
    done = epoch + np.arange(steps) / steps
    shape = np.ones(steps)
    if schedule == "cosine":
        shape = 0.5 + 0.5 * np.cos(math.pi * done / epochs)
    rise = np.minimum(1, (done + 1 / steps) / warmup) if warmup else 1
    return (peak * shape * rise).tolist()

def prepare(model, loader, run):
    """The Network, on the device and ready to train, with the checkpoint's weights if the run is
    resumed. On CUDA BatchNorm sees the batch of all processes (on the CPU each its share)."""
    args = run.args
    device = loader.device
    report = run.report
    note_part(report, device)
    if WORLD > 1 and device.type == "cuda":
        model = synchronized(model, args.arch)
    model.to(device, memory_format=memory_format(model, device))
    found = choose_precision(args.precision, device)
    precision = report.setdefault("precision", found)  # a resumed run keeps its own
    if run.resumed:
        model.load_state_dict(run.resumed["model"])
    if args.compile == 1 or (args.compile is None and device.type == "cuda"):
        model.compile(mode="reduce-overhead")
    print(
        f"{args.arch}; {device}, {precision}; batch {loader.batch_size}, processes: {WORLD}; "
        f"seed {args.seed}; writes {args.out}",
        flush=True,
    )
    return Network(model, precision)

def distribute(network):
    """The network, in DistributedDataParallel when there are several processes (gradients are
    averaged over them)."""
    if WORLD == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

class Run:
    """The folder --out of a run, locked until the process ends: last.pt to go on from, and log.csv.

    resumed: the checkpoint that the run goes on from, {} if there is none and once it has gone on.
    report: what the run found so far, kept with the checkpoint. Raises InputError for a folder
    that cannot be made or that another run writes into.
    """

    def __init__(self, args, data, resumed):
        self.args = args
        self.folder = Path(args.out)
        self.resumed = resumed
        self.data = fingerprint(data)
        nothing = {"log": [], "train_seconds": 0.0, "images": 0, "parts": []}
        self.report = resumed.get("report", nothing)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # a singleton: a second run of this process may go on where the first was interrupted
            self.lock = FileLock(self.folder / "lock", timeout=0, is_singleton=True)
            if RANK == 0:
                self.lock.acquire()
        except (OSError, Timeout) as error:
            raise InputError(f"--out {self.folder}: cannot be made a folder or written, or another "
                             f"run writes into it ({type(error).__name__}); give another") from None

    def save(self, model, optimizer=None, **where):
        """Checkpoint: the model, its optimiser, the report and `where` the run stands. The one
        before stays as *.prev."""
        state = {"args": vars(self.args), "data": self.data, "report": self.report,
                 "model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict()}
        write_file(self.folder / "last.pt", lambda tmp: torch.save(state | where, tmp),
                   keep_previous=True)
        self.resumed = {}

    def log(self, row, images, seconds):
        """An epoch's row {column: value}: into log.csv and printed, with images/s and the minutes
        that the epochs left will take."""
        report = self.report
        report["train_seconds"] += seconds
        report["images"] += images
        report["log"].append(row)
        left = int(np.sum(self.args.epochs)) - len(report["log"])
        row |= {"img/s": images / seconds, "min left": left * seconds / 60}

        write_csv(self.folder / "log.csv", list(row), [r.values() for r in report["log"]])
        if row["epoch"] == 1 or self.resumed:
            print(*(f"{name:>9}" for name in row))
        cells = ["-" if value is None else f"{value:.4g}" for value in row.values()]
        print(*(f"{cell:>9}" for cell in cells), flush=True)

if __name__ == "__main__":
    run_script(main)
