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
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_lt import (GROUPS, ClassSampler, InputError, add_data_arguments, argument_parser, augment, channel_stats, class_groups,
                     expected_calibration_error, group_accuracy, load_dataset, normalize, show)
from models import (LowRank, add_low_rank, build_model, fast_bf16, general_only, git_commit, keep_memory, load_checkpoint, merge_low_rank,
                    pick_device, save_checkpoint, write_atomic, write_json, write_log)

RECIPES = {
    "cifar10": dict(arch="resnet32", epochs=200, lr=0.05, batch_size=256, aug="strong"),
    "cifar100": dict(arch="resnet32", epochs=200, lr=0.05, batch_size=256, aug="strong"),
    "synth": dict(arch="resnet32", epochs=24, lr=0.1, batch_size=32, aug="basic"),
    "folder": dict(arch="resnet50", epochs=200, lr=0.02, batch_size=256, aug="strong"),
}


# --------------------------------------------------------------------------------------------- the equations, one function each

def sinusoidal_weight(step, total, amplitude):
    """a(t) = A sin(pi t / T): the weight of the discrepancy loss after `step` of `total` steps."""
    return amplitude * math.sin(math.pi * step / total)


def more_loss(full, general, prior, target, discrepancy="l2"):
    """Mean over the batch of prior(y) x discrepancy of the two passes' logits, without the schedule; a scalar.

    full, general: n x K logits of W_g + B A and of W_g. prior: (K,) class frequencies. target: int (n,).
    "l2": squared l2 distance of the logits; "kl": KL(softmax(full) || softmax(general)).
    """
    return (prior[target] * discrepancies(full, general, discrepancy)).mean()


def discrepancies(full, general, kind="l2"):
    """Discrepancy of each image, (n,)."""
    if kind == "l2":
        return (full - general).square().sum(1)
    return F.kl_div(general.log_softmax(1), full.log_softmax(1), log_target=True, reduction="none").sum(1)


def balanced_softmax(logits, target, counts):
    """CE(f + log N_c, y), the mean (Ren et al., NeurIPS 2020): logit adjustment with tau 1. counts: (K,) tensor or array."""
    return F.cross_entropy(logits + torch.as_tensor(counts, dtype=logits.dtype, device=logits.device).log(), target)


def focal_loss(logits, target, gamma=2.0):
    """Mean of (1 - p_y)^gamma * CE (Lin et al., ICCV 2017)."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ((1 - (-ce).exp()) ** gamma * ce).mean()


def ldam_loss(logits, target, counts, max_margin=0.5, weight=None):
    """Label-distribution-aware margins, N_c^(-1/4) with the largest max_margin (Cao et al., NeurIPS 2019), on a plain linear head:
    the margin is taken off the true class's logit and nothing is scaled. weight: (K,) class weights for the deferred re-weighting."""
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    margins = counts ** -0.25
    margins = margins * (max_margin / margins.max())
    return F.cross_entropy(logits - F.one_hot(target, len(counts)) * margins, target, weight=weight)


def effective_weights(counts, beta=0.9999):
    """Class weights (1 - beta) / (1 - beta^N_c), mean 1, float array (K,) (Cui et al., CVPR 2019): LDAM-DRW's re-weighting."""
    weights = (1 - beta) / (1 - beta ** np.asarray(counts, dtype=np.float64))
    return weights / weights.mean()


def base_loss(kind, logits, target, counts, deferred=None):
    """The loss MORE is put on: ce, bsce, ldam (deferred: class weights once the re-weighting has begun) or focal."""
    if kind == "bsce":
        return balanced_softmax(logits, target, counts)
    if kind == "ldam":
        return ldam_loss(logits, target, counts, weight=deferred)
    return focal_loss(logits, target) if kind == "focal" else F.cross_entropy(logits, target)


# --------------------------------------------------------------------------------------------------- batches and predictions

def batches(env, indices, key):
    """Augmented training batches (x float n x 3 x H x W, y int (n,)) in the order of `indices`; `key` fixes the augmentation."""
    rng, size = np.random.default_rng(key), env.args.batch_size
    indices = torch.from_numpy(indices).to(env.device)
    if len(indices) > size and len(indices) % size == 1:
        indices = indices[:-1]  # BatchNorm cannot train on a single image
    for chunk in indices.split(16 * size):
        x = augment(env.images[chunk].permute(0, 3, 1, 2), rng, env.args.aug)
        for xb, yb in zip(x.split(size), env.labels[chunk].split(size)):
            yield normalize(xb, env.mean, env.std), yb


def logits_of(model, x, env):
    """Forward pass in the run's precision; float32 logits."""
    with torch.autocast(env.device.type, torch.bfloat16, enabled=env.bf16):
        return model(x).float()


@torch.no_grad()
def predict(model, images, env):
    """Logits N x K on the device. images: uint8 array N x H x W x 3."""
    model.eval()
    return torch.cat([logits_of(model, normalize(torch.from_numpy(part).to(env.device).permute(0, 3, 1, 2), env.mean, env.std), env)
                      for part in np.array_split(images, math.ceil(len(images) / 512))])


def evaluate(logits, split, env):
    """group_accuracy and ECE of N x K logits on a split."""
    acc = group_accuracy(logits.argmax(1).cpu(), split.labels, env.counts)
    return acc | {"ece": expected_calibration_error(logits.softmax(1), torch.from_numpy(split.labels).to(logits.device))}


def clock(device):
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------------------------- training

def train(model, optimizer, rate, data, first_step, env):
    """One epoch: full pass, general pass, base loss + a(t) x discrepancy. Returns sums on the device: base loss, discrepancy loss, and
    (3, K): drawn, correct, discrepancy per class. rate: learning rate of each step."""
    args = env.args
    model.train()
    sums = torch.zeros(2, device=env.device)
    tally = torch.zeros(3, env.num_classes, device=env.device)
    for step, ((x, y), lr) in enumerate(zip(data, rate), first_step):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        full = logits_of(model, x, env)
        deferred = env.deferred if step >= 0.8 * env.total_steps else None  # LDAM-DRW: the last fifth
        base = base_loss(args.loss, full, y, env.counts_t, deferred)
        loss, extra = base, torch.zeros_like(base)
        if not args.no_more and args.amplitude > 0:
            amplitude = args.amplitude * env.num_classes  # A = A' C
            with general_only(model), torch.set_grad_enabled(not args.detach_general):
                general = logits_of(model, x, env)
            extra = more_loss(full, general, env.prior, y, args.discrepancy)
            loss = base + extra * (sinusoidal_weight(step, env.total_steps, amplitude) if args.schedule == "sin" else amplitude)
            with torch.no_grad():
                tally[2].index_add_(0, y, discrepancies(full, general, args.discrepancy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # progress, without asking the device
            sums += torch.stack([base.detach(), extra.detach()]) * len(y)
            tally[0].index_add_(0, y, torch.ones_like(y, dtype=torch.float32))
            tally[1].index_add_(0, y, (full.argmax(1) == y).float())
    return sums, tally


def make_optimizer(model, args):
    """SGD with momentum 0.9; the low-rank factors have a rate scale and a weight decay of their own."""
    factors = [p for m in model.modules() if isinstance(m, LowRank) for p in (m.A, m.B)]
    known = {id(p) for p in factors}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": args.weight_decay, "scale": 1.0}]
    if factors:
        groups.append({"params": factors, "weight_decay": args.low_rank_decay, "scale": args.low_rank_lr})
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, foreach=True)


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
        right.plot(epochs, [r[f"discrepancy_{g}"] or math.nan for r in log], label=g)
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
    model.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    model.add_argument("--loss", choices=["ce", "bsce", "ldam", "focal"], default="ce", help="base loss (default %(default)s)")
    model.add_argument("--epochs", type=int)
    model.add_argument("--lr", type=float, help="cosine to 0")
    model.add_argument("--batch-size", type=int)
    model.add_argument("--weight-decay", type=float, default=5e-4, help="(default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--no-more", action="store_true", help="the base loss alone, on plain weights: the paired baseline")
    method.add_argument("--amplitude", type=float, default=2.0, help="A', times the number of classes; 0: decomposition alone (default %(default)s)")
    method.add_argument("--rank-ratio", type=float, default=0.1, help="rank over the smaller side of a weight (default %(default)s)")
    method.add_argument("--discrepancy", choices=["l2", "kl"], default="l2", help="(default %(default)s)")
    method.add_argument("--schedule", choices=["sin", "constant"], default="sin", help="of the loss weight (default %(default)s)")
    method.add_argument("--detach-general", action="store_true", help="no gradient through the general pass: cheaper")
    method.add_argument("--low-rank-decay", type=float, default=5e-4, help="weight decay of A and B (default %(default)s)")
    method.add_argument("--low-rank-lr", type=float, default=1.0, help="rate of A and B over that of the rest (default %(default)s)")
    system = parser.add_argument_group("system")
    system.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    system.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    system.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    system.add_argument("--out", help="folder of the run (default runs/NAME)")
    system.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    system.add_argument("--export", action="store_true", help="write the merged network as a plain state dict, merged.pt")
    args = parser.parse_args(argv)

    recipe = RECIPES.get(args.dataset, RECIPES["cifar100" if args.dataset.endswith(".npz") else "folder"])
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.imb is None and args.imb_type != "keep":
        args.imb = {"cifar10": 100.0, "cifar100": 100.0, "synth": 60.0}.get(args.dataset)
    for flag, least in (("epochs", 1), ("lr", 1e-12), ("batch_size", 2), ("weight_decay", 0), ("amplitude", 0), ("low_rank_decay", 0),
                        ("low_rank_lr", 0), ("seed", 0), ("split_seed", 0)):
        value = getattr(args, flag)
        if not (value >= least and math.isfinite(value)):
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be at least {least:g}")
    if not 0 < args.rank_ratio <= 1:
        raise InputError(f"--rank-ratio {args.rank_ratio:g}: must lie between 0 and 1")
    if args.out is None:
        name = Path(args.dataset).stem + (f"_imb{args.imb:g}" if args.imb else "")
        args.out = f"runs/{'base' if args.no_more else 'more'}_{args.loss}_{name}_{args.arch}_seed{args.seed}"
    return args


FREE_FLAGS = {"resume", "out", "export", "device", "data_root"}  # may differ between a checkpoint and the run that goes on from it


def check_same_run(state, args, counts, path):
    """Raise InputError when a checkpoint is not this run's."""
    if not isinstance(state, dict) or not {"args", "epoch", "counts", "report", "model", "optimizer"} <= set(state):
        raise InputError(f"{path} is no checkpoint of this script; give another --out")
    for key in sorted(set(vars(args)) - FREE_FLAGS):
        if state["args"].get(key) != getattr(args, key):
            raise InputError(f"{path} is of another run: --{key.replace('_', '-')} was {state['args'].get(key)}, now {getattr(args, key)}; "
                             "give the same flags or another --out")
    if state["counts"] != counts.tolist():
        raise InputError(f"{path} is of a run on other data: the training images per class differ; give another --out")


def main(argv=None):
    """Decompose, train with two passes, merge, evaluate."""
    args, commit = parse_args(argv), git_commit()
    device = pick_device(args.device)
    keep_memory()
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_flush_denormal(True)

    # ---- data
    data = load_dataset(args.dataset, args.data_root, args.imb, args.split_seed, args.imb_type, args.size)
    counts, groups = data.counts, class_groups(data.counts)
    print(f"{data.name} from {data.source}: {data.num_classes} classes, {len(data.train):,} train ({counts.max()}..{counts.min()} a class), "
          f"{len(data.val):,} val, {len(data.test):,} test; " + ", ".join(f"{len(c)} {g}" for g, c in groups.items()))
    mean, std = (v.to(device) for v in channel_stats(data.train.images))
    steps = math.ceil(len(data.train) / args.batch_size)
    prior = counts / counts.sum()
    env = Namespace(
        args=args, device=device, bf16=args.precision == "bf16" or (args.precision == "auto" and fast_bf16(device)),
        images=torch.from_numpy(data.train.images).to(device), labels=torch.from_numpy(data.train.labels).to(device), counts=counts,
        num_classes=data.num_classes, mean=mean, std=std, total_steps=steps * args.epochs, prior=torch.tensor(prior, dtype=torch.float32, device=device),
        counts_t=torch.tensor(counts, dtype=torch.float32, device=device),
        deferred=torch.tensor(effective_weights(counts), dtype=torch.float32, device=device))

    # ---- model: every weight W_g + B A, at the start exactly the plain network
    torch.manual_seed(args.seed)
    model = build_model(args.arch, data.num_classes, args.pretrained).to(device, memory_format=torch.channels_last)
    if not args.no_more:
        add_low_rank(model, args.rank_ratio)
    optimizer = make_optimizer(model, args)
    out = Path(args.out)
    print(f"{args.arch}, {'plain' if args.no_more else 'W_g + B A'}, {sum(p.numel() for p in model.parameters()):,} parameters in training; "
          f"{args.loss}; {device}, {'bf16' if env.bf16 else 'fp32'}, batch {args.batch_size}, rate {args.lr:g}, seed {args.seed}, "
          f"split seed {args.split_seed}; writes {out}", flush=True)
    epoch, report = 0, {"log": [], "train_seconds": 0.0, "images": 0}
    if args.resume and (state := load_checkpoint(out / "last.pt")) is not None:
        check_same_run(state, args, counts, out / "last.pt")
        epoch, report = state["epoch"], state["report"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    elif args.resume:
        print(f"nothing to resume in {out}: starting from the beginning")
    elif list(out.glob("last.pt*")):
        raise InputError(f"--out {out} holds a run: add --resume to go on with it, or give another folder, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made a folder ({error.strerror}); give another") from None

    # ---- training
    sampler = ClassSampler(data.train.labels, prior, len(data.train), args.seed)  # natural draws: a shuffle
    print(f"{'epoch':>8}{'loss':>8}{'discrep.':>10}{'|BA|/|W|':>9}   drawn:{'many':>6}{'medium':>8}{'few':>8}{'all':>8}   val:{'all':>6}{'img/s':>8}{'left':>10}")
    while epoch < args.epochs:
        start = clock(device)
        sampler.set_epoch(epoch)
        first = epoch * steps
        rate = [args.lr * (0.5 + 0.5 * math.cos(math.pi * s / env.total_steps)) for s in range(first, first + steps)]
        sums, tally = train(model, optimizer, rate, batches(env, sampler.indices(), [args.seed, epoch]), first, env)
        if not torch.stack([sums.sum(), *(p.sum() for p in model.parameters())]).isfinite().all():
            print(f"error: the loss became {sums.sum().item()} in epoch {epoch + 1}; the last checkpoint is kept: lower --lr or --amplitude "
                  "and start again, or look at the data", file=sys.stderr)
            sys.exit(3)
        loss, extra = (sums / len(data.train)).tolist()
        seconds = clock(device) - start
        epoch += 1
        report["train_seconds"] += seconds
        report["images"] += len(data.train)
        drawn, correct, apart = tally.cpu().double().numpy()
        by_group = {g: float(100 * (correct[c] / np.maximum(drawn[c], 1)).mean()) if len(c) else None for g, c in (groups | {"all": np.arange(len(counts))}).items()}
        gaps = {g: float((apart[c] / np.maximum(drawn[c], 1)).mean()) if len(c) else None for g, c in groups.items()}
        val = None
        if len(data.val) and (epoch % 10 == 0 or epoch == args.epochs):
            val = evaluate(predict(model, data.val.images, env), data.val, env)["all"]
        share = list(low_rank_share(model).values())
        left = (args.epochs - epoch) * len(data.train) * report["train_seconds"] / report["images"]
        weight = sinusoidal_weight(first, env.total_steps, args.amplitude * env.num_classes) if args.schedule == "sin" else args.amplitude * env.num_classes
        report["log"].append({"epoch": epoch, "loss": loss, "discrepancy_loss": extra, "weight": 0.0 if args.no_more else weight, "lr": rate[0],
                              "low_rank_share": float(np.mean(share)) if share else 0.0, **{f"drawn_{g}": v for g, v in by_group.items()},
                              **{f"discrepancy_{g}": v for g, v in gaps.items()}, "val_all": val, "images_per_second": len(data.train) / seconds})
        print(f"{epoch:>4}/{args.epochs:<4}{loss:7.3f}{extra:10.5f}{np.mean(share) if share else 0:9.4f}{'':7}" + "".join(f"{show(by_group[g]):>8}" for g in (*GROUPS, "all"))
              + f"{'':6}{show(val):>7}{len(data.train) / seconds:8.0f}{left / 60:6.1f} min", flush=True)
        save_checkpoint(out / "last.pt", {"args": vars(args), "epoch": epoch, "counts": counts.tolist(), "report": report, "model": model.state_dict(),
                                          "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})
        write_log(out / "log.csv", report["log"])

    # ---- evaluation: the general path alone, the whole, and the merged network, which must be the same
    start = clock(device)
    full = predict(model, data.test.images, env)
    seconds = clock(device) - start
    results, merged_diff, share = {"test": evaluate(full, data.test, env)}, None, low_rank_share(model)
    if len(data.val):
        results["val"] = evaluate(predict(model, data.val.images, env), data.val, env)
    if not args.no_more:
        with general_only(model):
            results["general path alone, test"] = evaluate(predict(model, data.test.images, env), data.test, env)
        env.bf16, before = False, None
        sample = data.test.images[:256]
        before = predict(model, sample, env)
        merge_low_rank(model)
        merged_diff = float((predict(model, sample, env) - before).abs().max())
    print(f"\n{'':34}" + "".join(f"{g:>8}" for g in (*GROUPS, "all", "ece")))
    for label, acc in results.items():
        print(f"{label:34}" + "".join(f"{show(acc[g]):>8}" for g in (*GROUPS, "all", "ece")))
    if share:
        print("\n|BA| / |W_g| by layer: " + "  ".join(f"{k} {v:.3f}" for k, v in share.items()))
        last = report["log"][-1]
        ends = [last["discrepancy_few"], last["discrepancy_many"]]
        if None not in ends and args.amplitude > 0:
            print(f"discrepancy at the end, few {ends[0]:.4g} against many {ends[1]:.4g}: " + ("as claimed" if ends[0] > ends[1] else "NOT as the paper claims"))

    # ---- files
    if args.export:
        write_atomic(out / "merged.pt", lambda tmp: torch.save({k: v.cpu() for k, v in model.state_dict().items()}, tmp))
    write_atomic(out / "model.pt", lambda tmp: torch.save({"arch": args.arch, "class_names": data.class_names, "mean": mean.cpu(), "std": std.cpu(),
                                                            "model": {k: v.cpu() for k, v in model.state_dict().items()}}, tmp))
    acc = results["test"]
    result = {"method": "base" if args.no_more else "more", "dataset": args.dataset, "imb": args.imb, "arch": args.arch, "seed": args.seed,
              "split_seed": args.split_seed, "epochs": args.epochs, "args": vars(args), "acc": {g: acc[g] for g in (*GROUPS, "all")},
              "per_class": acc["per_class"], "ece": acc["ece"], "val": results.get("val"), "general": results.get("general path alone, test"),
              "merged_max_abs_diff": merged_diff, "low_rank_share": share, "images_per_second": report["images"] / report["train_seconds"],
              "train_seconds": report["train_seconds"], "eval_seconds": seconds, "precision": args.precision,
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__, "git": commit}
    write_log(out / "log.csv", report["log"])
    write_json(out / "result.json", result)
    if not args.no_more:
        draw_figures(report["log"], out)
    print(f"\nresult: {out / 'result.json'}")
    return result


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
