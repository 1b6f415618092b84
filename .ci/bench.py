# SPDX-License-Identifier: MIT
"""Images a second and ratios of the two scripts' steps on this machine, all measured in one run, beside their goals.

    make bench                                   ResNet-32, batch 128
    python .ci/bench.py --arch resnet50 --size 224 --batch-size 64 --out bench.json

The calls take turns, so that a machine that slows down slows all of them; after a round to warm up, the median of five.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

import do_lt
import more_lt
from data_lt import Dataset, Split
from models import (add_low_rank, add_owner_masks, autocast, build_model, clock, faster_precision, merge_low_rank,
                    owned_layers, start)

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
AMX = "amx_bf16" in CPU

def measure(calls, device, rounds=5):
    """{name: images/s} of calls {name: (function, images it processes)}."""
    times = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, (call, _) in calls.items():
            began = clock(device)
            call()
            times[name].append(clock(device) - began)
    return {name: calls[name][1] / sorted(seconds[1:])[rounds // 2] for name, seconds in times.items()}

def usual_loop(arch, images, labels, device):
    """What most published code for CIFAR does, to compare with: float32, images cropped and flipped one by one by up
    to four worker processes, the loss asked for in each step. Returns a call that trains on all images once."""
    from torchvision import transforms as T
    side = images.shape[1]
    transform = T.Compose([T.ToPILImage(), T.RandomCrop(side, padding=side // 8), T.RandomHorizontalFlip(),
                           T.ToTensor(), T.Normalize([0.5] * 3, [0.2] * 3)])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return transform(images[i]), int(labels[i])
    loader = torch.utils.data.DataLoader(Images(), 128, shuffle=True, num_workers=min(4, os.cpu_count() or 1),
                                         persistent_workers=True, pin_memory=device.type == "cuda")
    model = build_model(arch, 100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def run():
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device, non_blocking=True)), y.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
    return run

def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="time the steps of both scripts", allow_abbrev=False)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0)
    parser.add_argument("--out", help="file for the figures, as JSON")
    args = parser.parse_args(argv)
    args.precision, n, k, steps = "auto", args.batch_size, 100, args.steps
    device = start(args)
    rng, crop = np.random.default_rng(0), None if args.size <= 64 else args.size
    side = args.size * 256 // 224 if crop else args.size  # photographs as --pack leaves them
    images = rng.integers(0, 256, (steps * n, side, side, 3), np.uint8)
    labels = rng.permutation(np.arange(steps * n) % k)
    split, tests = Split(images, labels), Split(images[:2 * n], labels[:2 * n])
    data = Dataset("bench", split, tests, tests, np.bincount(labels, minlength=k), [str(c) for c in range(k)], "", crop)
    data.to(device, n, "strong")
    torch.manual_seed(0)

    def fresh():
        model = build_model(args.arch, k).to(device, memory_format=torch.channels_last)
        if args.compile:
            model.compile(mode="reduce-overhead")
        return model
    args.precision = precision = faster_precision(fresh(), data)
    run = argparse.Namespace(precision=precision, mixup=0.0, weight_decay=5e-4, seed=0, recipe="default", views=2,
                             discrepancy="mse", prior_weight="sample", optimizer="sgd", lr=0.01, low_rank_decay=0.0)
    x, y = next(data.batches(np.arange(n), [0]))
    log_alpha, sampler, rates = torch.zeros(k, device=device), data.sampler(None, 0), [0.01] * steps

    def bare(precision):
        model = fresh()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)

        def steps_of():
            model.train()
            for _ in range(steps):
                with autocast(device, precision):
                    loss = F.cross_entropy(model(x).float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return steps_of

    def do_steps(masked, loop):
        model = add_owner_masks(fresh())
        alive = {name: torch.rand_like(m.weight) < 0.5 for name, m in owned_layers(model).items()}
        masks, optimizer = do_lt.trainable_masks(model, alive) if masked else {}, do_lt.make_optimizer(model, 0.01, run)

        def steps_of():
            batches = data.batches(sampler.indices(), [0]) if loop else [(x, y)] * steps
            do_lt.train(model, optimizer, batches, rates, log_alpha, masks, data, run, rng).sum().item()
        return steps_of

    def more_steps(both, detach=False):
        model = add_low_rank(fresh()) if both else fresh()
        network, optimizer = more_lt.TwoPasses(model, both, detach), more_lt.make_optimizer(model, run)
        losses, plan = [more_lt.base_losses(data)["ce"]] * 2, [(0.01, 1.0, False)] * steps
        return lambda: more_lt.train(network, optimizer, [(x, y)] * steps, plan, losses, data, run, rng).sum().item()
    plain, merged = fresh(), merge_low_rank(add_low_rank(fresh()))
    fused = [fuse(build_model(args.arch, k).to(device, memory_format=torch.channels_last).eval()) for _ in range(3)]
    look = lambda model, views=0: do_lt.predict(model, tests.images, data, run, views)
    probs = torch.stack([look(model, 2).softmax(2) for model in fused])
    other = "bf16" if precision == "fp32" else "fp32"
    calls = {"bare": (bare(precision), steps * n), f"bare, {other}": (bare(other), steps * n),
             "loop": (do_steps(False, True), steps * n), "frozen": (do_steps(True, False), steps * n),
             "base": (more_steps(False), steps * n), "more": (more_steps(True), steps * n),
             "more, detached": (more_steps(True, True), steps * n),
             "one pass": (lambda: look(plain).sum().item(), 2 * n),
             "merged": (lambda: look(merged).sum().item(), 2 * n),
             "T x V": (lambda: [look(model, 2).sum().item() for model in fused], 2 * n),
             "lambda": (lambda: do_lt.instance_weights(probs[:, 1], probs[:, 2]).sum().item(), 2 * n)}
    if not crop:
        calls["usual"] = (usual_loop(args.arch, images, labels, device), steps * n)
    rate = measure(calls, device, args.rounds)
    ratios = [("loop (draws, strong augmentation, log) / bare step", rate["loop"] / rate["bare"], 0.95, True),
              ("DO's step with frozen weights / bare step", rate["frozen"] / rate["bare"], 0.95, True),
              ("MORE's step over the base's, in time", rate["base"] / rate["more"], 2.1, False),
              ("the same with --detach-general", rate["base"] / rate["more, detached"], 1.45, False),
              ("merged network / plain one", rate["merged"] / rate["one pass"], 0.95, True),
              ("3 sub-models x 3 views over 9 passes, in time", rate["one pass"] / rate["T x V"] / 9, 0.8, False),
              ("instance weights over those passes, in time", rate["T x V"] / rate["lambda"], 0.05, False)]
    if "usual" in rate:
        goal = 2.0 if AMX else 1.5
        ratios.insert(1, ("loop, strong / the usual fp32 loop, basic", rate["loop"] / rate["usual"], goal, True))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(args.arch, k)(torch.zeros(1, 3, args.size, args.size))
    names = [line.split(":")[1].strip() for line in CPU.splitlines() if line.startswith("model name")] or ["cpu"]
    kind = torch.cuda.get_device_name() if device.type == "cuda" else names[0]
    note = f"{kind}, {torch.get_num_threads()} threads, AMX {'yes' if AMX else 'no'}, torch {torch.__version__}"
    print(f"{args.arch}, {args.size} px, batch {n}, {precision}; {note}; {counter.get_total_flops() / 1e6:,.0f} MFLOP "
          "an image")
    for name, value in rate.items():
        print(f"  {name:22}{value:12,.0f} images/s")
    for label, value, goal, least in ratios:
        met = value >= goal if least else value <= goal
        print(f"  {label:56}{value:8.3f}   goal {'>=' if least else '<='} {goal:g}{'' if met else '   MISSED'}")
    if args.out:
        commit = subprocess.run("git describe --always --dirty=+ --exclude '*'", shell=True, capture_output=True,
                                text=True, cwd=Path(__file__).parent).stdout.strip()
        result = {"note": note, "git": commit, "arch": args.arch, "size": args.size, "batch_size": n,
                  "precision": precision, "rates": rate,
                  "ratios": {label: [value, goal] for label, value, goal, _ in ratios}}
        Path(args.out).write_text(json.dumps(result, indent=1))
    return rate

if __name__ == "__main__":
    main()
