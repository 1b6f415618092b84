# SPDX-License-Identifier: MIT
"""DO: Decoupled Optimisation for Long-Tailed Visual Recognition (Cong et al., AAAI 2024, 38(2),
1380-1388), the whole method in one file.

One network is trained in stages, for many-, medium- and few-shot classes, each with its own draws
and margin (CPO). After a stage a Taylor score decides which weights the stage keeps, frozen; the
others are pruned and start afresh in the next stage (TPD). The weights of stages 1..t are sub-model
t; the predictions of the sub-models are mixed for each test image (test time).

Each weight has an owner (models.add_owner_masks): 0 is free and trained now, PRUNED is zero until
the stage ends, t >= 1 is frozen for stage t. BatchNorm, biases and the last layer have no owner:
they train on in every stage, and each stage keeps a copy for its sub-model.

    python do_lt.py --dataset synth                                  a minute on two CPU cores
    python do_lt.py --dataset cifar100 --imb 100 --data-root data    CIFAR-100-LT: expect 52.5 %
    python do_lt.py --dataset cifar100 --imb 100 --recipe paper      every value as published
    python do_lt.py --dataset cifar100 --imb 100 --resume            go on after an interruption
    python do_lt.py --dataset PHOTOS                                 fine-tune on PHOTOS/train/CLASS
    python models.py runs/NAME/model.pt PHOTOS                       label new photographs
"""
import copy
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from scipy.optimize import minimize
from torch.optim.swa_utils import update_bn

from data_lt import (RANK, WORLD, InputError, Loader, add_data_arguments, add_system_arguments,
                     all_sum, answers, argument_parser, class_groups, either, find_checkpoint,
                     fingerprint, group_accuracy, group_means, likeliest, load_from_flags, number,
                     run_name, run_script, seed_from, several, show_progress, start, table, top_1,
                     write_csv, write_file)
from models import (PRUNED, Classifier, Network, add_owner_masks, build_model, choose_precision,
                    classifier_content, clock, finish, keep_stage_rest, memory_format,
                    network_stats, note_part, owned_layers, plain_state, say_share,
                    stop_unless_finite, submodel_state, synchronized)

# ------------------------------------------------------------------------------ recipes and flags

# Defaults by dataset. Every value is a flag; lists have one value per stage.
PHOTOGRAPHS = dict(arch="resnet50", batch_size=256, rho=0.8)
RECIPES = {
    "cifar10": dict(mixup=0.4),
    # chosen on validation images
    "cifar100": dict(order=["many", "few"], epochs=[150, 50], mixup=0.4),
    "synth": dict(
        arch="resnet20",
        epochs=[12, 5, 5],
        lr=[0.05, 0.05, 0.05],
        batch_size=32,
        aug="basic",
        tpd_iters=3,
        warmup=1,
    ),
    "imagenet_lt": PHOTOGRAPHS,
    "places_lt": PHOTOGRAPHS | dict(arch="resnet152", pretrained=1),
    "inat18": PHOTOGRAPHS | dict(gamma=[0.5, 0.6], importance_images=4),
    # Fine-tuning: a first stage that knows how frequent the classes are, and pruned weights that
    # keep what they know. Chosen on Caltech-101's validation images, where fresh weights tie.
    "folder": PHOTOGRAPHS | dict(
        pretrained=1,
        order=["many", "few"],
        epochs=[10, 4, 4, 4],
        lr=[0.02, 0.01, 0.01, 0.01],
        warmup=1,
        batch_size=64,
        loss="balanced",
        gamma=[0.2, 0.2, 0.2],
        tpd_lr=0.01,
        reinit="keep",
    ),
    "default": dict(
        arch="resnet32",
        pretrained=0,
        order=["many", "medium", "few"],
        epochs=[100, 50, 50],
        lr=[0.1, 0.05, 0.05],   # peak rate of each stage
        schedule="cosine",      # of the rate after stage 1
        warmup=5,               # epochs over which the rate rises at the start of stage 1
        batch_size=128,
        aug="strong",
        mixup=0.0,
        loss="compensation",
        rho=0.7,                # medium stage: draws and margin of medium classes, 1 - rho others
        gamma=[0.5, 0.8],       # share of the free weights that is pruned after each stage
        tpd_iters=20,           # retraining iterations after each of the pruning steps
        tpd_lr=0.02,            # their rate
        reinit=0.25,            # scale of the fresh weights over Kaiming's
        importance_images=20,
        prune_classifier=0,     # the last layer is kept per stage
        agg="product",
    ),
    # The published values ("Implementation Details"), on top of the dataset's.
    "paper": dict(
        order=["many", "medium", "few"],
        lr=[0.05, 0.005, 0.005],
        schedule="constant",
        warmup=0,
        batch_size=256,
        aug="strong",
        mixup=0.0,
        loss="compensation",
        tpd_iters=1,
        reinit=1.0,
        prune_classifier=1,
        agg="instance",
    ),
    "paper, photographs": dict(lr=[0.02, 0.002, 0.002]),
    "paper, cifar100 at ratio 50": dict(gamma=[0.5, 0.6]),
}
STAGES = ("many", "medium", "medium-top", "medium-low", "few")

def parse_args(argv=None):
    """The flags, None where `settle` takes them from RECIPES. Raises InputError."""
    parser = argument_parser("Decoupled Optimisation (DO) for long-tailed recognition")
    add_data_arguments(parser)
    share = number(above=0, below=1)

    add = parser.add_argument_group("training; flags without a default have one by dataset, "
                                    "see RECIPES").add_argument
    add("--recipe", choices=["default", "paper"], default="default",
        help="paper: every value as published")
    add("--arch", help="resnet32, resnet50, resnet152, another torchvision classifier, timm:NAME")
    add("--pretrained", type=int, choices=[0, 1], help="1: download ImageNet weights to start from")
    add("--weights", metavar="FILE",
        help="start from this state dict (a last layer of another shape starts afresh)")
    add("--epochs", type=several(number(int, 0)),
        help="one per stage, as 100,50,50; 0 first: stage 1 was trained elsewhere, --weights names "
             "that run's stage1.pt")
    add("--lr", type=several(number(above=0)), help="peak rate, one per stage")
    add("--schedule", choices=["cosine", "constant"], help="of the rate after stage 1")
    add("--warmup", type=number(least=0), help="epochs at the start over which the rate rises")
    add("--batch-size", type=number(int, 2), help="of all processes together")
    add("--weight-decay", type=number(least=0), default=5e-4, help="of all parameters")
    add("--aug", choices=["strong", "basic", "none"], help="basic: crop, flip; strong: RandAugment")
    add("--mixup", type=number(least=0), help="alpha of mixup's Beta distribution; 0: none")
    add("--views", type=number(int, 2), default=2,
        help="random views of each test image beside the clean one")

    add = parser.add_argument_group("method").add_argument
    add("--order", type=several(str),
        help="stages: many,few or many,medium,few or many,medium-top,medium-low,few")
    add("--rho", type=share, help="draws and margin of medium classes in their stage")
    add("--gamma", type=several(either("auto", share)),
        help="share pruned after each stage but the last, as 0.5,0.8; auto: measured")
    add("--few-sampling", choices=["balanced", "inverse"], default="balanced",
        help="draws of the few stage")
    add("--loss", choices=["compensation", "balanced", "ce"],
        help="balanced: as compensation, but stage many is balanced softmax; ce: no margin in any "
             "stage (Table 8)")
    add("--importance", choices=["taylor", "l1", "fisher", "random"], default="taylor",
        help="what ranks the weights (Fig. 4)")
    add("--importance-images", type=number(int, 1), help="training images per class for the score")
    add("--prune-classifier", type=int, choices=[0, 1],
        help="1: TPD ranks the last layer too; 0: each stage has its own")
    add("--tpd-steps", type=number(int, 1), default=10, help="steps of gradual pruning, Eq. 4's dt")
    add("--tpd-iters", type=number(int, 1), help="retraining iterations after each pruning step")
    add("--tpd-lr", type=number(above=0), help="peak rate of the retraining")
    add("--reinit", type=either("keep", number(least=0)),
        help="scale of the fresh weights over Kaiming's; keep: pruned weights keep their values")
    add("--agg", choices=["product", "instance", "group", "mean"],
        help="the mixture that is reported, the paper's: instance (model.pt has the product)")

    add_system_arguments(parser)
    return parser.parse_args(argv)

def recipe(args, name):
    """{flag: value} from RECIPES for a dataset's recipe, for what was not given.

    Where --order asks for more stages than the recipe has values for, the lists of values per
    stage come from "default".
    """
    default = RECIPES["default"]
    chosen = default | RECIPES[name]
    published = {}
    if args.recipe == "paper":
        published = dict(RECIPES["paper"])
        if chosen["arch"] in ("resnet50", "resnet152"):
            published |= RECIPES["paper, photographs"]
        if name == "cifar100" and args.imb == 50:
            published |= RECIPES["paper, cifar100 at ratio 50"]
    order = args.order or (chosen | published)["order"]
    if len(order) > len(chosen["epochs"]):
        chosen |= {key: default[key] for key in ("epochs", "lr", "gamma")}
    return chosen | published

def settle(args, data):
    """Fill in what was not given from the recipe, and fit the flags to the data; after this
    nothing changes them.

    A stage without classes is left out, with its epochs, rate and gamma. Raises InputError for
    values out of range.
    """
    if data.multi_label:
        raise InputError(f"--dataset {args.dataset} has several labels per image, which DO is not "
                         "for; take more_lt.py")
    given = {key: value for key, value in vars(args).items() if value is not None}
    vars(args).update(recipe(args, data.recipe) | given)
    check_stages(args, given)
    if "warmup" not in given:
        args.warmup = min(args.warmup, sum(args.epochs) / 10)
    args.out = args.out or run_name("do", args)
    kept = []
    for name, *values in zip(args.order, args.epochs, args.lr, [*args.gamma, None]):
        if len(stage_classes(data.counts, name)):
            kept.append((name, *values))
        else:
            print(f"warning: no class is {name}; its stage is left out")
    if not kept:
        raise InputError("--order: none of its stages has a class in this dataset; begin with many")
    args.order, args.epochs, args.lr, gammas = map(list, zip(*kept))
    args.gamma = gammas[:-1]
    for name, gamma in zip(args.order, args.gamma):
        known = np.isin(data.val.labels, stage_classes(data.counts, name))
        if gamma == "auto" and not known.any():
            raise InputError("--gamma auto measures on validation images of each stage's classes; "
                             f"{name} has none; give a share")

def check_stages(args, given):
    """Raise InputError for an --order that is none, and bring the lists of values per stage to its
    length. given: the flags that the user gave."""
    T = len(args.order)
    order = ",".join(args.order)
    if len(set(args.order) & set(STAGES)) < T:
        raise InputError(f"--order {order}: name each stage once, of {', '.join(STAGES)}")
    for key, n in (("epochs", T), ("lr", T), ("gamma", T - 1)):
        values = getattr(args, key)
        if key in given and len(values) not in (1, n):
            raise InputError(f"--{key}: {len(values)} values for --order {order}; "
                             f"give {max(n, 1)}, or one for all")
        setattr(args, key, (values + values[-1:] * n)[:n])

# -------------------------------------------- Collaborative Parameter Optimisation (CPO), Eq. 1-3

def stage_classes(counts, stage):
    """Class indices of a stage's group, as data_lt.class_groups has them; medium-top and
    medium-low split medium at 50 images (Table 6). Where no class is many, the stage of that name
    serves all classes. counts: (K,)."""
    counts = np.asarray(counts)
    classes = class_groups(counts)[stage.split("-")[0]]
    if stage == "medium-top":
        return classes[counts[classes] >= 50]
    if stage == "medium-low":
        return classes[counts[classes] < 50]
    if stage == "many" and not len(classes):
        return np.arange(len(counts))
    return classes

def stage_class_probs(counts, stage, rho, few="balanced"):
    """Eq. 1: P(class drawn) in a stage, float array (K,), sums to 1.

    many: ~ N_c. medium: ~ rho for medium classes, 1 - rho for the others. few: every class alike
    ("balanced": the paper's 1 / N_y as a weight of each image) or ~ 1 / N_c ("inverse").
    counts: (K,).
    """
    counts = np.asarray(counts, dtype=np.float64)
    if stage == "many":
        probs = counts
    elif stage == "few":
        if few not in ("balanced", "inverse"):
            raise ValueError(f"{few}: unknown; take balanced or inverse")
        probs = np.ones_like(counts) if few == "balanced" else 1 / counts
    else:
        probs = np.full_like(counts, 1 - rho)
        probs[stage_classes(counts, stage)] = rho
    return probs / probs.sum()

def compensation_loss(logits, target, log_alpha):
    """Eq. 2: CE(f(x) - log alpha_t, y), the mean over the batch. logits: n x K; target: int (n,);
    log_alpha: (K,)."""
    return F.cross_entropy(logits - log_alpha, target)

def compensation_alpha(counts, stage, rho):
    """Eq. 3: alpha_t by class, float array (K,).

    many: 1. medium: rho for medium classes, 1 - rho for the others (the paper's scalar rho
    cancels in the softmax). few: the label frequencies in reverse order, the rarest class gets
    the largest; classes of equal count are ranked by index. counts: (K,).
    """
    counts = np.asarray(counts, dtype=np.float64)
    alpha = np.ones_like(counts)
    if stage == "few":
        descending = np.argsort(-counts, kind="stable")
        alpha[descending] = np.sort(counts) / counts.sum()
    elif stage != "many":
        alpha *= 1 - rho
        alpha[stage_classes(counts, stage)] = rho
    return alpha

class Stage(NamedTuple):
    """What one stage trains with."""
    name: str
    classes: np.ndarray      # class indices of its group
    probs: np.ndarray        # P(class drawn), (K,)
    log_alpha: torch.Tensor  # margins, (K,), on the device
    epochs: int
    lr: float                # peak rate

def make_stages(args, data, device):
    """The list of Stage."""
    stages = []
    for name, epochs, lr in zip(args.order, args.epochs, args.lr):
        classes = stage_classes(data.counts, name)
        probs = stage_class_probs(data.counts, name, args.rho, args.few_sampling)
        margin = "many" if args.loss == "ce" else name  # stage many has none
        alpha = compensation_alpha(data.counts, margin, args.rho)
        if args.loss == "balanced" and name == "many":
            alpha = data.counts.sum() / data.counts  # balanced softmax: CE(f + log N_c, y)
        log_alpha = torch.tensor(np.log(alpha), dtype=torch.float32, device=device)
        stages.append(Stage(name, classes, probs, log_alpha, epochs, lr))
    return stages

def make_optimizer(model, lr, args):
    """SGD with momentum 0.9 (Nesterov's, but not in the paper); `train` adds weight decay."""
    nesterov = args.recipe != "paper"
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=nesterov)

def trainable_masks(network):
    """{weight: mask} of the weights with owners: 1 where free, 0 where frozen or pruned."""
    layers = owned_layers(network).values()
    return {m.weight: (m.weight_owner == 0).to(m.weight.dtype) for m in layers}

def train(network, optimizer, batches, rates, log_alpha, weight_decay):
    """SGD over `batches` of (x, [(share, labels), ..]) at the learning rates `rates`.

    Returns images drawn and correct by class, (K,) each (with mixup: against the first label),
    and the sum of the loss over images. Weight decay is added to the gradient here, not in the
    optimiser, and the gradient of frozen and pruned weights is zeroed after it: their momentum
    stays 0 and SGD leaves them bit for bit as they are.
    """
    network.train()
    masks = trainable_masks(network)
    [group] = optimizer.param_groups
    weights = group["params"]
    drawn = torch.zeros_like(log_alpha)
    correct = torch.zeros_like(log_alpha)
    loss_sum = torch.zeros_like(log_alpha[0])
    for (x, targets), rate in zip(batches, rates):
        group["lr"] = rate
        logits = network(x)
        loss = sum(share * compensation_loss(logits, y, log_alpha) for share, y in targets)
        optimizer.zero_grad()
        loss.backward()
        used = [w for w in weights if w.grad is not None]
        owned = [w for w in used if w in masks]  # what has no owner trains whole
        with torch.no_grad():  # all weights at once: a GPU waits for each launch
            torch._foreach_add_([w.grad for w in used], used, alpha=weight_decay)
            torch._foreach_mul_([w.grad for w in owned], [masks[w] for w in owned])
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            y = targets[0][1]
            right = (logits.argmax(1) == y).float()
            drawn.index_add_(0, y, torch.ones_like(right))
            correct.index_add_(0, y, right)
            loss_sum += loss * len(x)
    return all_sum(drawn), all_sum(correct), all_sum(loss_sum)

def cpo(network, t, stage, loader, run):
    """Train stage t: its draws and margin. The weights of earlier stages are active and frozen.
    Goes on from the checkpoint of a resumed run."""
    args = run.args
    model = network.model
    optimizer = make_optimizer(model, stage.lr, args)
    if run.resumed.get("optimizer"):  # at the start of a stage there is none
        optimizer.load_state_dict(run.resumed["optimizer"])
    trained = distribute(network)
    schedule = "cosine" if t == 1 else args.schedule
    warmup = args.warmup if t == 1 else 0
    print(
        f"\nstage {t}, {stage.name}: {stage.epochs} epochs, rate {stage.lr:g} {schedule}; "
        "accuracy on the images as drawn, and on validation images"
    )
    for epoch in range(run.resumed.get("epoch", 0), stage.epochs):
        began = clock(loader.device)
        key = [args.seed, t, 1, epoch]
        torch.manual_seed(seed_from(*key) + RANK)  # of dropout
        rates = learning_rates(stage.lr, epoch, stage.epochs, loader.steps, schedule, warmup)
        picks = loader.draw(stage.probs, args.seed * 1000 + t, epoch)
        batches = loader.batches(picks, key, args.mixup)
        drawn, correct, loss = train(
            trained, optimizer, batches, rates, stage.log_alpha, args.weight_decay
        )
        stop_unless_finite(loss, model, f"stage {t}, epoch {epoch + 1}")
        seconds = clock(loader.device) - began
        images = loader.steps * loader.batch_size
        row = {
            "stage": t,
            "epoch": epoch + 1,
            "loss": loss.item() / images,
            "rate": rates[0],
        }
        row |= group_means((100 * correct / drawn).cpu(), loader.data.groups)  # NaN: nothing drawn
        row["val"] = None
        if epoch % 10 == 9 or epoch + 1 == stage.epochs:
            row["val"] = tested(network, "val", loader)["all"]
        run.log(row, images, seconds)
        run.save(model, optimizer, stage=t, epoch=epoch + 1, rest=model.stage_rest)
    if t == 1:
        model.stage_rest[0] = plain_state(model)  # sub-model 0: stage 1 before TPD
        write_file(run.folder / "stage1.pt", lambda tmp: torch.save(model.stage_rest[0], tmp))
    record(network, f"stage {t} ({stage.name}) after CPO", loader, run)

# ------------------------------------------------ Taylor-guided Parameter Decoupling (TPD), Eq. 4

def taylor_importance(weights, class_losses, kind="taylor", generator=None):
    """E = (w dL_y/dw)^2, the mean over classes y: importance of each weight to a group of
    classes, tensors shaped like `weights`.

    class_losses: iterable of scalars L_y, the loss averaged over images of one class y, each with
    its graph (a generator keeps one in memory at a time). "fisher": (dL_y/dw)^2 instead; "l1":
    |w|; "random": uniform (from `generator`). The last two ignore class_losses.
    """
    if kind == "l1":
        return [w.detach().abs() for w in weights]
    if kind == "random":
        return [torch.rand(w.shape, generator=generator).to(w.device) for w in weights]
    if kind not in ("taylor", "fisher"):
        raise ValueError(f"{kind}: unknown; take taylor, fisher, l1 or random")
    scores = [torch.zeros_like(w) for w in weights]
    classes = 0
    for loss in class_losses:
        for score, w, gradient in zip(scores, weights, torch.autograd.grad(loss, weights)):
            score += (gradient * w.detach() if kind == "taylor" else gradient) ** 2
        classes += 1
    return [score / max(classes, 1) for score in scores]

def gradual_ratio(step, dt, g0, g1):
    """Eq. 4: the share pruned after `step` of `dt` steps from ratio g0 to g1, fast at first (Zhu
    and Gupta 2017)."""
    return g1 + (g0 - g1) * (1 - step / dt) ** 3

def last_ratio_before_largest_drop(ratios, accuracies):
    """gamma_best ("Taylor-guided Parameter Decoupling"): the ratio after which accuracy falls
    most, but never the first: the next stage needs free weights."""
    changes = np.diff(accuracies[1:])
    return ratios[1 + int(changes.argmin())]

def importance(network, stage, loader, args, generator=None):
    """taylor_importance of the weights with owners to a stage's classes, by at most
    --importance-images training images of each, not augmented. Processes share the classes and all
    get the same scores."""
    network.eval()
    labels = loader.data.train.labels
    mine = stage.classes[RANK::WORLD]
    picks = [np.flatnonzero(labels == c)[: args.importance_images] for c in mine]

    def losses():
        """The losses of this process's classes, one graph at a time."""
        for c, x in zip(mine, loader.clean_batches(picks)):
            target = torch.full((len(x),), int(c), device=loader.device)
            yield compensation_loss(network(x), target, stage.log_alpha)

    weights = [layer.weight for layer in owned_layers(network.model).values()]
    scores = taylor_importance(weights, losses(), args.importance, generator)
    if WORLD > 1:
        scores = [all_sum(score * len(mine)) / len(stage.classes) for score in scores]
    return scores

@torch.no_grad()
def prune_to(model, ratio, scores):
    """Zero the lowest-scored weights until `ratio` of those that no stage owns is pruned. All
    layers are ranked together; what is pruned stays so. scores: one tensor per owned layer."""
    layers = owned_layers(model).values()
    owner = torch.cat([layer.weight_owner.flatten() for layer in layers])
    score = torch.cat([score.flatten() for score in scores])
    pruned = owner == PRUNED
    owned = (owner > 0) & ~pruned
    score[pruned] = -1  # first
    score[owned] = math.inf  # last
    count = round(ratio * int((~owned).sum()))
    owner[score.argsort(stable=True)[:count]] = PRUNED
    sizes = [layer.weight.numel() for layer in layers]
    for layer, part in zip(layers, owner.split(sizes)):
        layer.weight_owner.copy_(part.view(layer.weight.shape))
        layer.weight.mul_(layer.weight_owner != PRUNED)

def prune(network, before, ratio, t, stage, picks, loader, args):
    """From ratio `before` to `ratio` in --tpd-steps steps (Eq. 4), with --tpd-iters retraining
    iterations on the batches `picks` after each. BatchNorm's statistics are then those of the
    pruned network."""
    model = network.model
    dt = args.tpd_steps
    iters = args.tpd_iters
    key = [args.seed, t, 2, round(100 * ratio)]
    torch.manual_seed(seed_from(*key) + RANK)  # of dropout: a resumed run comes with other draws
    rates = learning_rates(args.tpd_lr, 0, 1, dt * iters)
    optimizer = make_optimizer(model, args.tpd_lr, args)
    trained = distribute(network)
    for step in range(1, dt + 1):
        seed = args.seed * 10**6 + t * 10**4 + round(1000 * ratio) + step
        random = torch.Generator().manual_seed(seed)
        scores = importance(network, stage, loader, args, random)
        prune_to(model, gradual_ratio(step, dt, before, ratio), scores)
        for weight, mask in trainable_masks(model).items():
            for momentum in optimizer.state[weight].values():
                momentum.mul_(mask)  # a weight just pruned must not drift on from zero
        some = slice((step - 1) * iters, step * iters)
        batches = loader.batches(picks[some], [*key, step], args.mixup)
        _, _, loss = train(
            trained, optimizer, batches, rates[some], stage.log_alpha, args.weight_decay
        )
        stop_unless_finite(loss, model, f"pruning after stage {t}", "--tpd-lr")
    with torch.no_grad():
        eager = Network(model, network.precision, eager=True)  # what update_bn does breaks graphs
        update_bn(loader.batches(picks[:40], [*key, 0]), eager)

def sweep_gamma(network, t, stage, loader, run):
    """--gamma auto: prune by 0, 10, .. 90 % and go back to the last ratio before the largest drop
    in validation accuracy of the stage's classes; returns it."""
    args = run.args
    model = network.model
    ratios = [g / 10 for g in range(10)]
    n = args.tpd_steps * args.tpd_iters
    draws = loader.draw(stage.probs, args.seed * 1000 + t, 10**6, n * len(ratios))
    picks = np.split(draws, len(ratios))
    curve = []
    states = {}
    for i, ratio in enumerate(ratios):
        if i > 0:
            prune(network, ratios[i - 1], ratio, t, stage, picks[i], loader, args)
        per_class = tested(network, "val", loader)["per_class"]
        accuracy = group_means(per_class, {"stage": stage.classes})["stage"]
        curve.append((ratio, accuracy))
        states[ratio] = copy.deepcopy(model.state_dict())
    gamma = last_ratio_before_largest_drop(*zip(*curve))
    model.load_state_dict(states[gamma])
    run.report.setdefault("pruning_curve", {})[stage.name] = curve
    return gamma

@torch.no_grad()
def hand_over(model, t, values):
    """The free weights belong to stage t from now on. Pruned ones become free and start from
    `values`, one tensor per owned layer."""
    for layer, fresh in zip(owned_layers(model).values(), values):
        owner = layer.weight_owner
        pruned = owner == PRUNED
        layer.weight.copy_(torch.where(pruned, fresh, layer.weight))
        owner[owner == 0] = t
        owner[pruned] = 0

def tpd(network, t, stage, loader, run):
    """Prune what stage t can do without, freeze what remains as its own, and start the pruned
    weights afresh for the next stage. The last stage keeps all.

    --reinit keep: what is pruned starts from its values before the pruning, which fine-tuning
    must not lose. It is not in the paper.
    """
    args = run.args
    model = network.model
    generator = torch.Generator().manual_seed(args.seed * 1000 + t)
    values = []
    for layer in owned_layers(model).values():
        weight = layer.weight.detach()
        if args.reinit == "keep":
            values.append(weight.clone())
        else:
            normal = torch.randn(weight.shape, generator=generator).to(weight)
            kaiming = math.sqrt(2 / weight[0].numel())
            values.append(normal * (args.reinit * kaiming))
    if t < len(args.order):
        began = clock(loader.device)
        gamma = args.gamma[t - 1]
        if gamma == "auto":
            gamma = sweep_gamma(network, t, stage, loader, run)
        else:
            n = args.tpd_steps * args.tpd_iters
            picks = loader.draw(stage.probs, args.seed * 1000 + t, 10**6, n)
            prune(network, 0.0, gamma, t, stage, picks, loader, args)
        seconds = clock(loader.device) - began
        run.report["tpd_seconds"] = run.report.get("tpd_seconds", 0.0) + seconds
        run.report.setdefault("gammas", []).append(gamma)
        print(
            f"TPD: {100 * gamma:.0f} % of the free weights pruned, by {args.importance} "
            "importance"
        )
        record(network, f"stage {t} ({stage.name}) after TPD", loader, run)
    keep_stage_rest(model, t)
    hand_over(model, t, values)
    run.save(model, stage=t + 1, epoch=0, rest=model.stage_rest)

# ------------------------------------------------------ test time: the sub-models are mixed, Eq. 5

def simplex_lattice(T):
    """All points of the simplex whose T coordinates are multiples of 1/50 (T > 3: 1/20), float64
    tensor G x T."""
    n = 50 if T <= 3 else 20
    counted = product(range(n + 1), repeat=T)
    points = [p for p in counted if sum(p) == n]
    return torch.tensor(points, dtype=torch.float64) / n

def agreement(p1, p2, lattice):
    """Cosine similarity of each mixture's predictions for two views of each image, U x G.

    p1, p2: T sub-models x U images x K; lattice: G mixtures x T, float64. It is computed from T x
    T inner products, so no mixture of K probabilities is formed.
    """
    p1 = p1.double()
    p2 = p2.double()
    pairs = (lattice[:, :, None] * lattice[:, None]).flatten(1).T  # T^2 x G

    def inner(a, b):
        """Inner products of the mixtures of a and of b, U x G."""
        return torch.einsum("tuk,suk->uts", a, b).flatten(1) @ pairs

    squares = inner(p1, p1) * inner(p2, p2)
    cosine = inner(p1, p2) / squares.sqrt().clamp_min(1e-12)
    uneven = (lattice - 1 / lattice.shape[1]).square().sum(1)
    return cosine - 1e-9 * uneven  # ties go to equal weights

def instance_weights(p1, p2):
    """Eq. 5: lambda of each test image, the mixture whose predictions for two views of the image
    agree best (cosine similarity).

    p1, p2: predictions of T sub-models for the views, T x U x K probabilities -> lambda, U x T,
    rows summing to 1. A lattice on the simplex is searched whole, where the paper climbs a
    softmax of T numbers: no gradient, no step size, no pass of the network. It takes the memory
    of 5,000 float64 numbers per image: give some thousand images at a time.
    """
    lattice = simplex_lattice(len(p1)).to(p1.device)
    return lattice[agreement(p1, p2, lattice).argmax(1)].float()

def product_bias(b, d, counts):
    """b log N_c + d [c is medium], (K,). counts: (K,) tensor."""
    medium = class_groups(counts)["medium"]
    bias = b * torch.as_tensor(counts, dtype=b.dtype, device=b.device).log()
    bias[medium] += d
    return bias

def product_of_experts(logp, weights, counts):
    """log of prod_t p_t^a_t * N_c^b * e^(d if c is medium), not normalised: N x K.

    logp: T x N x K; weights: (a_1 .. a_T, b, d); counts: (K,) tensor. With b and d that take off
    the priors of the stages it is the balanced product of experts of BalPoE (Aimar et al., CVPR
    2023).
    """
    *a, b, d = weights
    return torch.tensordot(torch.stack(a), logp, 1) + product_bias(b, d, counts)

def class_weights(labels, num_classes):
    """Weights of classes, (num_classes,), by which each of them counts alike among `labels`."""
    return 1 / torch.bincount(labels, minlength=num_classes).clamp_min(1)

def fit_weights(logp, labels, counts, start, pull):
    """Weights of product_of_experts, float (T + 2,), with the least log loss, each class weighing
    alike; a_t >= 0, and drawn towards `start` as if by `pull` images per class. logp: T x N x K;
    labels: int tensor (N,)."""
    alike = class_weights(labels, logp.shape[2])
    pull = pull * len(labels.unique()) / len(labels)

    def loss(values):
        """The loss and its gradient at float64 (T + 2,)."""
        weights = torch.tensor(values, dtype=torch.float32, device=logp.device, requires_grad=True)
        logits = product_of_experts(logp, weights, counts)
        fit = F.cross_entropy(logits, labels, alike)
        total = fit + pull * (weights - start).square().sum()
        total.backward()
        return total.item(), weights.grad.double().cpu().numpy()

    bounds = [(0, None)] * len(logp) + [(None, None)] * 2
    found = minimize(loss, start.cpu().numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
    return torch.tensor(found.x, dtype=torch.float32, device=logp.device)

def fit_product(logp, labels, counts, start, pulls=(0.25, 2), folds=5):
    """Weights of product_of_experts from validation images, float (T + 2,); `start`, the equal
    ones, where the images do not settle others. Not in the paper.

    They calibrate the sub-models (Guo et al., ICML 2017) and take off their priors (Menon et al.,
    ICLR 2021). How strongly `start` draws them is what gives the least log loss on each fifth of
    the images with weights from the others; they are kept if they also classify more of these
    images right than `start` does. logp: T x N x K; labels: int (N,); counts: (K,).
    """
    logp = logp.float()
    labels = torch.as_tensor(labels, device=logp.device)
    alike = class_weights(labels, logp.shape[2])
    order = labels.argsort(stable=True)
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=logp.device) % folds  # of each class a fifth
    left_out = {pull: torch.empty_like(logp[0]) for pull in pulls}
    for pull, k in product(pulls, range(folds)):
        mine = fold == k
        weights = fit_weights(logp[:, ~mine], labels[~mine], counts, start, pull)
        left_out[pull][mine] = product_of_experts(logp[:, mine], weights, counts)
    pull = min(pulls, key=lambda pull: F.cross_entropy(left_out[pull], labels, alike))
    equal = product_of_experts(logp, start, counts)
    right = group_accuracy(left_out[pull].argmax(1), labels, counts)["all"]
    if right <= group_accuracy(equal.argmax(1), labels, counts)["all"] + 1e-6:
        return start
    return fit_weights(logp, labels, counts, start, pull)

def enough_to_fit(labels, stages, num_classes):
    """Whether each stage's group has at least 5 validation images in at least half of its
    classes: with fewer the fitted weights are worse than equal ones. labels: int array (N,)."""
    found = np.bincount(labels, minlength=num_classes)
    return all((found[stage.classes] >= 5).mean() >= 0.5 for stage in stages)

def tested(network, part, loader):
    """top_1 of a network on a split's clean images."""
    data = loader.data
    return top_1(loader.answers(network, part), getattr(data, part), data)

def record(network, label, loader, run):
    """Accuracy on clean images as the stages pass, for the paper's Table 7."""
    entry = {
        "acc": tested(network, "test", loader),
        "val": tested(network, "val", loader),
    }
    run.report.setdefault("submodels", {})[label] = entry
    print(table(label, {"clean test images": entry["acc"]}), flush=True)

def oracle_route(stages, num_classes):
    """The sub-model of each class's group, K x T; of a class that no stage covers, all alike.
    Predictions routed by the true group are a diagnosis."""
    T = len(stages)
    route = torch.full((num_classes, T), 1 / T)
    for t, stage in enumerate(stages):
        route[stage.classes] = torch.eye(T)[t]
    return route

def mixtures(probs, truth, route, lattice):
    """What is kept of a few images, {name: tensor, a row per image}: the answers of the mixtures,
    of each sub-model and of the oracle, lambda, and what the one lambda of all images needs.

    probs: T x V x n x K, view 0 clean; truth: int (n,). Probabilities are averaged over all views;
    lambda comes from the first two random views.
    """
    mean = probs.mean(1)
    agree = agreement(probs[:, 1], probs[:, 2], lattice)
    instance = lattice[agree.argmax(1)].float()  # Eq. 5, as in instance_weights
    mixed = {f"alone {t}": p for t, p in enumerate(mean)}
    mixed["mean"] = mean.mean(0)
    mixed["instance"] = torch.einsum("tuk,ut->uk", mean, instance)
    mixed["oracle"] = torch.einsum("tuk,ut->uk", mean, route[truth])
    kept = {name: likeliest(p) for name, p in mixed.items()}
    kept["lambda"] = instance
    kept["agreement"] = agree
    kept["probs"] = mean.transpose(0, 1).half()  # n x T x K; at 8,142 classes 1 GiB
    return kept

def validation_fits(networks, stages, loader, args):
    """Weights of product_of_experts: {"product": (a_1 .. a_T, b, d), and for stage 1's network
    before TPD (a, b, d) of what DO has to beat: cross-entropy, the same with post-hoc logit
    adjustment (Menon et al., ICLR 2021: tau 1) and with fitted weights; --loss balanced: balanced
    softmax}; and the accuracy of the product on validation images.

    networks: stage 1 before TPD, then T sub-models. Without enough validation images nothing is
    fitted: the product's weights are equal, its accuracy None.
    """
    data = loader.data
    T = len(stages)
    kinds = {"product": [1 / T] * T + [0.0, 0.0]}
    base = "bsce" if args.loss == "balanced" else "ce"
    if stages[0].name == "many":
        kinds[base] = [1.0, 0.0, 0.0]
        if base == "ce":
            kinds["ce_la"] = [1.0, -1.0, 0.0]
    if not enough_to_fit(data.val.labels, stages, data.num_classes):
        return kinds, None

    def take(logits, rows):
        """The logarithms, means over the views."""
        return {"logp": logits.log_softmax(3).mean(1).transpose(0, 1)}
    found = loader.sweep(networks, "val", take, args.views, args.seed)
    logp = found["logp"].transpose(0, 1)  # (1 + T) x N x K

    def fit(name, logp):
        """fit_product, from the weights of this name."""
        start = torch.tensor(kinds[name], device=loader.device)
        return fit_product(logp, data.val.labels, data.counts, start)
    weights = fit("product", logp[1:])
    kinds["product"] = weights.tolist()
    if base in kinds:
        kinds[f"{base}_fitted"] = fit(base, logp[:1]).tolist()
    logits = product_of_experts(logp[1:], weights, data.counts)
    return kinds, top_1(answers(logits), data.val, data)

def aggregate(networks, kinds, stages, loader, args):
    """What result.json says of the test images, from one sweep over them: the four mixtures, each
    sub-model alone, the baselines, and the oracle. networks, kinds: see validation_fits."""
    data = loader.data
    split = data.test
    route = oracle_route(stages, data.num_classes).to(loader.device)
    lattice = simplex_lattice(len(stages)).to(loader.device)
    labels = torch.from_numpy(split.labels).to(loader.device)

    def take(logits, rows):
        """The mixtures, the product and the baselines."""
        show_progress("test images predicted", int(rows[-1]) + 1, len(split))
        kept = mixtures(logits[1:].softmax(3), labels[rows], route, lattice)
        logp = logits.log_softmax(3).mean(1)
        for name, values in kinds.items():
            experts = logp[1:] if name == "product" else logp[:1]
            weights = torch.tensor(values, device=loader.device)
            kept[name] = answers(product_of_experts(experts, weights, data.counts))
        return kept
    found = loader.sweep(networks, "test", take, args.views, args.seed)
    group = lattice[found["agreement"].sum(0).argmax()].float()
    answered = []
    for probs in found["probs"].split(64):
        mixed = (probs.float() * group[:, None]).sum(1)
        answered.append(likeliest(mixed))
    found["group"] = torch.cat(answered)
    instance = found["lambda"].cpu().numpy()
    by_group = {}
    for name, classes in data.groups.items():
        chosen = instance[np.isin(split.labels, classes)]
        by_group[name] = chosen.mean(0).tolist() if len(chosen) else None

    def accuracies(names):
        """{name: top_1}."""
        return {name: top_1(found[name], split, data) for name in names}
    return {
        "product": kinds["product"],
        "group_lambda": group.tolist(),
        "lambda_by_group": by_group,
        "aggregations": accuracies(("instance", "group", "mean", "product")),
        "alone": list(accuracies(f"alone {t}" for t in range(len(stages))).values()),
        "bar": accuracies(list(kinds)[1:]),
        "oracle_by_true_group": accuracies(["oracle"])["oracle"],
    }

def test_time(model, stages, loader, run):
    """All sub-models on validation and test images, then mixed. Adds to run.report; returns what
    model.pt predicts with: (plain state dicts, product's weights, its bias by class). What was
    fitted is kept in the checkpoint."""
    args = run.args
    data = loader.data
    report = run.report
    T = len(stages)
    states = [submodel_state(model, t) for t in range(T + 1)]
    networks = []
    for state in states:
        plain = build_model(args.arch, data.num_classes, size=data.size)
        plain.load_state_dict(state)
        plain.to(loader.device, memory_format=memory_format(plain, loader.device))
        networks.append(Network(plain, report["precision"]))
    began = clock(loader.device)
    if report.get("views") != args.views:
        kinds, accuracy = validation_fits(networks, stages, loader, args)
        report |= {"views": args.views, "kinds": kinds, "val": accuracy}
        run.save(model, stage=T + 1, epoch=0, rest=model.stage_rest)
    report["test"] = aggregate(networks, report["kinds"], stages, loader, args)
    report |= {key: report["test"][key] for key in ("aggregations", "lambda_by_group", "bar")}
    report["eval_seconds"] = clock(loader.device) - began
    *weights, b, d = torch.tensor(report["kinds"]["product"], device=loader.device)
    weights = torch.stack(weights)
    report["fitted"] = bool((weights != 1 / T).any())
    return states[1:], weights, product_bias(b, d, data.counts)

# ----------------------------------------------------------------------------------------- report

def show_report(report):
    """The tables of the paper, from this run."""
    test = report["test"]
    stages = {label: entry["acc"] for label, entry in report["submodels"].items()}
    print("\n" + table("Clean test images (Table 7)", stages))
    names = {
        "ce": "cross-entropy (stage 1)",
        "ce_la": "  + logit adjustment",
        "ce_fitted": "  + fitted",
        "bsce": "balanced softmax (stage 1)",
        "bsce_fitted": "  + fitted",
    }
    rows = {names[key]: accuracy for key, accuracy in report["bar"].items()}
    rows |= {f"sub-model {t} alone": accuracy for t, accuracy in enumerate(test["alone"], 1)}
    rows |= {f"DO, {name}": accuracy for name, accuracy in test["aggregations"].items()}
    rows["oracle: routed by the true group"] = test["oracle_by_true_group"]
    rows["model.pt: the product, clean images alone"] = report["clean"]
    print("\n" + table("Mean over the clean image and its views", rows))
    fitted = "fitted on validation images" if report["fitted"] else "not fitted"
    weights = [f"{w:.2f}" for w in test["product"]]
    print(f"weights of the product, {fitted}: {', '.join(weights)}")

def main(argv=None):
    """Train, decouple, mix, evaluate: the whole method in the paper's order."""
    args = parse_args(argv)
    device = start(args)
    data = load_from_flags(args)
    settle(args, data)
    resumed = find_checkpoint(args, data)
    stages = make_stages(args, data, device)
    if not enough_to_fit(data.val.labels, stages, data.num_classes):
        print("note: the sub-models will be mixed with equal weights: to fit them needs 5 "
              "validation images in half of the classes of each stage's group")
    stats = network_stats(args.arch)
    loader = Loader(data, device, args.batch_size, args.aug, args.workers, stats)
    torch.manual_seed(args.seed)
    start_from = not resumed and (args.weights or args.pretrained)
    model = build_model(args.arch, data.num_classes, start_from, data.size)
    untrained = args.epochs[0] == 0 and not resumed
    if untrained and not getattr(model, "complete", False):
        raise InputError("--epochs 0: stage 1, which is not trained here, has no last layer for "
                         "these classes; give its run's stage1.pt as --weights")
    add_owner_masks(model, args.prune_classifier)
    say_share(model, owned_layers(model).values(), "can belong to a stage")
    model.stage_rest = resumed.get("rest", {})

    run = Run(args, data, resumed)
    network = prepare(model, loader, run)
    for t, stage in enumerate(stages, 1):
        if t >= resumed.get("stage", 1):
            cpo(network, t, stage, loader, run)  # Eq. 1-3
            tpd(network, t, stage, loader, run)  # Eq. 4; the last stage keeps all
    states, weights, bias = test_time(model, stages, loader, run)  # Eq. 5

    report = run.report
    saved = classifier_content(args.arch, loader, states, weights, bias)
    classifier = Classifier(saved).to(device)
    report["clean"] = tested(classifier.experts, "test", loader)
    show_report(report)
    return finish(run, "do", report["aggregations"][args.agg], saved, loader)

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
