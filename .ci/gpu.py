# SPDX-License-Identifier: MIT
"""The first hour of a machine with CUDA, most valuable first, each part's result written as it ends.

    make gpu GPU="--data cifar100.npz"     about nine minutes; that split: data_lt.py --pack cifar100.npz --lossless
    make gpu GPU="--data cifar100.npz --only cross,MORE,paper"     the parts that nine minutes do not reach
    python .ci/gpu.py --rehearse           the same commands on the CPU at tiny sizes, but for what only CUDA can show

OUT/gpu.json holds the parts, {name: {"ok", "seconds", ..}}; OUT/NAME.json are result.json files, ready for .ci/results.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

from models import build_model

GOALS = {"ResNet-32, images/s": 100_000, "ResNet-50 at 224 px, images/s": 2_500, "DO's whole recipe, s": 60}

def agreement(device):
    """Largest relative difference of one step's loss and gradients in fp32 between the CPU and a device."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    x, y, found = torch.randn(32, 3, 32, 32), torch.randint(100, (32,)), []
    state = build_model("resnet32", 100).state_dict()
    for where in ("cpu", device):
        model = build_model("resnet32", 100).to(where, memory_format=torch.channels_last)
        model.load_state_dict(state)
        loss = torch.nn.functional.cross_entropy(model(x.to(where)), y.to(where))
        loss.backward()
        found.append([loss.detach().cpu()] + [p.grad.cpu() for p in model.parameters()])
    return max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(*found))

def main(argv=None):
    """Run the parts in turn until the time is over."""
    parser = argparse.ArgumentParser(description="what needs a GPU, in one command")
    parser.add_argument("--data", default="cifar100", help="dataset of the trainings: a packed .npz, or a name")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--minutes", type=float, default=9, help="no part is begun after these")
    parser.add_argument("--only", default="", help="parts whose names contain one of these, with commas between")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, without what only CUDA can show")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("error: no CUDA device here: run it on a machine with one, or --rehearse it on the CPU", file=sys.stderr)
        sys.exit(2)
    device, out, began = "cpu" if args.rehearse else "cuda", Path(args.out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    parts = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}  # of a call before
    synth = ["--dataset", "synth", "--device", device, "--workers", "0"]
    data = ["--dataset", args.data, "--data-root", args.data_root, "--device", device, "--resume"]
    short, once, two = [], [], ["--order", "many,few", "--epochs", "150,50"]  # cifar100's default; not of every .npz
    if args.rehearse:
        data = [*synth, "--aug", "none", "--resume"]
        short, once, two = ["--epochs", "1", "--tpd-iters", "1"], ["--epochs", "1"], []
        bench = ["--arch", "resnet20", "--batch-size", "8", "--steps", "1", "--rounds", "1", "--device", "cpu"]

    def call(*command, kill_after=None, launcher=()):
        """Run a script of the project; its output goes to OUT/log.txt."""
        with open(out / "log.txt", "a") as log:
            command = [sys.executable, *launcher, *map(str, command)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            try:
                process.wait(kill_after or 1200)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        if process.returncode and not kill_after:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: see {out / 'log.txt'}")

    def part(name, work):
        """Do one part, if there is time; a failure is written down and the next part comes."""
        if not any(word in name for word in args.only.split(",")):
            return
        if time.time() - began > 60 * args.minutes:
            return print(f"{name}: left out, the time is over", flush=True)
        start = time.time()
        try:
            entry = {"ok": True} | (work() or {})
        except Exception as error:
            entry = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        parts[name] = entry | {"seconds": time.time() - start}
        (out / "gpu.json").write_text(json.dumps(parts, indent=1))
        print(f"{name}: {'ok' if entry['ok'] else 'FAILED'}, {parts[name]['seconds']:.0f} s "
              + " ".join(f"{k} {v}" for k, v in entry.items() if k != "ok"), flush=True)

    def training(name, script, *flags):
        call(script, *data, *flags, "--out", out / name)
        result = json.loads((out / name / "result.json").read_text())
        shutil.copy(out / name / "result.json", out / f"{name}.json")
        acc = {g: v and round(v, 1) for g, v in result["acc"].items()}
        return {"acc": acc, "images_per_second": round(result["images_per_second"])}

    def smoke():
        for script, more in (("do_lt.py", ["--epochs", "1", "--tpd-iters", "1"]), ("more_lt.py", ["--epochs", "1"])):
            for precision in ("fp32", "bf16"):
                shutil.rmtree(out / "smoke", ignore_errors=True)
                call(script, *synth, *more, "--precision", precision, "--compile", "0", "--out", out / "smoke")

    def benched(name, *flags):
        call(".ci/bench.py", *(bench if args.rehearse else flags), "--out", out / f"bench_{name}.json")
        return json.loads((out / f"bench_{name}.json").read_text())["rates"]

    def compiled():
        rates, epochs = {}, 1 if args.rehearse else 10
        for c in (0, 1):
            flags = ["--no-more", "--epochs", epochs, "--compile", 0 if args.rehearse else c]
            rates[f"--compile {c}"] = training(f"compile{c}", "more_lt.py", *flags)["images_per_second"]
        return rates

    def resumed():
        for name, seconds in (("whole", None), ("killed", 4 if args.rehearse else 20), ("killed", None)):
            call("more_lt.py", *synth, "--no-more", *once, "--seed", "5", "--precision", "fp32", "--resume",
                 "--out", out / name, kill_after=seconds)
        both = [json.loads((out / name / "result.json").read_text())["acc"]["all"] for name in ("whole", "killed")]
        return {"unbroken and resumed, all": both}
    part("smoke", smoke)
    part("agreement of CPU and device, fp32", lambda: {"relative difference": f"{agreement(device):.1e}"})
    for seed in (0,) if args.rehearse else (0, 1, 2):
        name, more = f"cifar100_imb100_seed{seed}", ["more_lt.py", "--loss", "bsce", "--seed", seed, *once]
        part(f"DO, seed {seed}", lambda: training(f"do_{name}", "do_lt.py", "--seed", seed, *short, *two))
        part(f"balanced softmax, seed {seed}", lambda: training(f"base_bsce_{name}", *more, "--no-more"))
        if seed == 0:
            part("bench, ResNet-32", lambda: benched("resnet32", "--steps", "64", "--compile", "1"))
            large = "--arch resnet50 --size 224 --batch-size 256".split()
            part("bench, ResNet-50", lambda: benched("resnet50", *large))
            part("--compile off and on", compiled)
            part("--resume after a kill", resumed)
            part("one process through torchrun", lambda: call(
                "more_lt.py", *synth, "--no-more", "--epochs", "1", "--out", out / f"torchrun{int(began)}",
                launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")))
    for seed in (0,) if args.rehearse else (0, 1, 2):
        name, more = f"cifar100_imb100_seed{seed}", ["more_lt.py", "--seed", seed, *once]
        part(f"cross-entropy, seed {seed}", lambda: training(f"base_ce_{name}", *more, "--no-more"))
        part(f"MORE, seed {seed}", lambda: training(f"more_bsce_{name}", *more, "--loss", "bsce"))
    paper = ["do_lt.py", "--recipe", "paper", *short]
    part("DO, the paper's recipe", lambda: training("do_paper_cifar100_imb100_seed0", *paper))
    found = {"ResNet-32, images/s": parts.get("bench, ResNet-32", {}).get("loop"),
             "ResNet-50 at 224 px, images/s": parts.get("bench, ResNet-50", {}).get("bare"),
             "DO's whole recipe, s": parts.get("DO, seed 0", {}).get("seconds")}
    for name, value in found.items():
        met = value and (value <= GOALS[name] if name.endswith(" s") else value >= GOALS[name])
        seen = f"{value:,.0f}" if value else "not measured"
        print(f"{name}: {seen}, goal {GOALS[name]:,}{'' if met else '   MISSED'}")
    return parts

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, os.cpu_count() or 1)))
    main()
