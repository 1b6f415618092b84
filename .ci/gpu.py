# SPDX-License-Identifier: MIT
"""The first hour of a machine with CUDA, most valuable first, each part's result written as it
ends.

    make gpu GPU="--data FOLDER"           about nine minutes (data_lt.py --pack FOLDER)
    make gpu GPU="--data FOLDER --only cross+MORE+paper"     what nine minutes do not reach
    python .ci/gpu.py --rehearse           the same commands on the CPU at tiny sizes

OUT/gpu.json holds the parts, {name: {"ok", "seconds", ..}}; OUT/NAME.json are result.json files,
ready for .ci/results.
"""
import argparse
import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch

from data_lt import beside
from models import Classifier, build_model

GOALS = {"ResNet-32, images/s": 100_000, "ResNet-50 at 224 px, images/s": 2_500,
         "DO's whole recipe, s": 60}


def agreement(device):
    """Largest relative difference of one step's loss and gradients in fp32 between the CPU and a
    device."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    x = torch.randn(32, 3, 32, 32)
    y = torch.randint(100, (32,))
    state = build_model("resnet32", 100).state_dict()
    found = []
    for where in ("cpu", device):
        model = build_model("resnet32", 100).to(where, memory_format=torch.channels_last)
        model.load_state_dict(state)
        loss = torch.nn.functional.cross_entropy(model(x.to(where)), y.to(where))
        loss.backward()
        found.append([loss.detach().cpu(), *[p.grad.cpu() for p in model.parameters()]])
    gaps = [(a - b).norm() / a.norm().clamp_min(1e-12) for a, b in zip(*found)]
    largest = float(torch.stack(gaps).max())  # NaN if one is
    return {"ok": largest < 0.01, "relative difference": f"{largest:.1e}"}


def lower_precision(device):
    """How far a classifier's probabilities in half precision and bf16 are from those in fp32."""
    torch.manual_seed(0)
    classifier = Classifier({
        "arch": "resnet20",
        "class_names": list("abc"),
        "size": [32, 32],
        "resize": 37,
        "multi_label": False,
        "networks": [build_model("resnet20", 3).state_dict()],
        "weights": torch.full((1,), 0.01),  # so that no probability is 1
        "bias": torch.zeros(3),
        "mean": torch.full((3,), 127.5),
        "std": torch.full((3,), 64.0),
    }).requires_grad_(False).to(device)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, device=device)
    exact = classifier(images).exp()
    gaps = {}
    for dtype in (torch.half, torch.bfloat16):
        found = copy.deepcopy(classifier).to(dtype)(images)
        gaps[str(dtype)] = float((found.exp().float() - exact).abs().max())
    return {"ok": max(gaps.values()) < 0.05, **gaps}


def stream_of_its_own(device):
    """Whether data_lt.beside hands over whole tensors: made late, by a stream that has much to do,
    and read late, when the next ones are made already."""
    busy = torch.ones(4096, 4096, device=device)

    def work(times):
        """Some milliseconds for the current stream, each time."""
        for _ in range(times):
            busy @ busy

    def numbers(times):
        """Tensors full of 0, 1, 2, .."""
        for i in range(20):
            work(times)
            yield torch.full((2**20,), float(i), device=device)

    found = []
    for making, reading in ((10, 1), (1, 10)):
        for tensor in beside(numbers(making), torch.cuda.Stream(device)):
            early = tensor.mean()
            work(reading)
            found.append([early, tensor.mean()])
    values = torch.tensor([[float(early), float(late)] for early, late in found])
    expected = torch.arange(20.0).repeat(2)[:, None].expand(40, 2)
    return {"ok": torch.equal(values, expected)}


class Session:
    """Runs parts in turn until the time is over, and writes down what each of them found."""

    def __init__(self, args):
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        before = self.out / "gpu.json"  # of a call before
        self.parts = json.loads(before.read_text()) if before.exists() else {}
        self.failed = []  # parts of this call
        self.device = "cpu" if args.rehearse else "cuda"
        self.synth = ["--dataset", "synth", "--device", self.device, "--workers", "0"]
        self.data = ["--dataset", args.data, "--data-root", args.data_root, "--device",
                     self.device, "--resume"]
        self.once = []
        if args.rehearse:
            self.data = [*self.synth, "--aug", "none", "--resume"]
            self.once = ["--epochs", "1"]

    def call(self, *command, kill_after=None, launcher=()):
        """Run a script of the project; its output goes to OUT/log.txt."""
        command = [sys.executable, *launcher, *map(str, command)]
        with open(self.out / "log.txt", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            try:
                process.wait(kill_after or 1200)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.returncode and not kill_after:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: see "
                               f"{self.out / 'log.txt'}")

    def part(self, name, work, *args):
        """Do one part, if there is time; a failure is written down and the next part comes."""
        if not any(word in name for word in self.args.only.split("+")):
            return
        if time.time() - self.began > 60 * self.args.minutes:
            print(f"{name}: left out, the time is over", flush=True)
            return
        start = time.time()
        try:
            entry = {"ok": True} | (work(*args) or {})
        except Exception as error:
            entry = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        seconds = time.time() - start
        self.parts[name] = entry | {"seconds": seconds}
        if not entry["ok"]:
            self.failed.append(name)
        (self.out / "gpu.json").write_text(json.dumps(self.parts, indent=1))
        said = " ".join(f"{key} {value}" for key, value in entry.items() if key != "ok")
        print(f"{name}: {'ok' if entry['ok'] else 'FAILED'}, {seconds:.0f} s {said}", flush=True)

    def training(self, name, script, *flags):
        """Train and keep the result."""
        self.call(script, *self.data, *flags, "--out", self.out / name)
        shutil.copy(self.out / name / "result.json", self.out / f"{name}.json")
        result = json.loads((self.out / f"{name}.json").read_text())
        acc = {group: value and round(value, 1) for group, value in result["acc"].items()}
        parts = ("train_seconds", "tpd_seconds", "eval_seconds")  # of all calls that it took
        return {"acc": acc, "images_per_second": round(result["images_per_second"]),
                "seconds of the run": round(sum(result.get(part, 0) for part in parts))}

    def do(self, name, *flags):
        """Train DO."""
        tpd = ["--tpd-iters", "1"] if self.args.rehearse else []
        return self.training(f"do_{name}", "do_lt.py", *flags, *self.once, *tpd)

    def more(self, name, *flags):
        """Train MORE or a baseline."""
        return self.training(name, "more_lt.py", *flags, *self.once)

    def smoke(self):
        """Both scripts in both precisions for an epoch."""
        for script, more in (("do_lt.py", ["--tpd-iters", "1"]), ("more_lt.py", [])):
            for precision in ("fp32", "bf16"):
                shutil.rmtree(self.out / "smoke", ignore_errors=True)
                self.call(script, *self.synth, "--epochs", "1", *more, "--precision", precision,
                          "--compile", "0", "--out", self.out / "smoke")

    def bench(self, name, *flags):
        """The figures of .ci/bench.py."""
        if self.args.rehearse:
            flags = "--arch resnet20 --batch-size 8 --steps 1 --rounds 1 --device cpu".split()
        file = self.out / f"bench_{name}.json"
        self.call(".ci/bench.py", *flags, "--out", file)
        return json.loads(file.read_text())["rates"]

    def compiled(self):
        """Images per second without and with torch.compile, in the last of ten epochs: compiling
        takes about a minute of the first."""
        rates = {}
        for switch in (0, 1):
            shutil.rmtree(self.out / f"compile{switch}", ignore_errors=True)
            flags = ["--no-more", "--epochs", 1 if self.args.rehearse else 10, "--compile",
                     0 if self.args.rehearse else switch]
            self.training(f"compile{switch}", "more_lt.py", *flags)
            with open(self.out / f"compile{switch}" / "log.csv") as file:
                rates[f"--compile {switch}"] = round(float(list(csv.DictReader(file))[-1]["img/s"]))
        return rates

    def resumed(self):
        """A killed and resumed run beside an unbroken one."""
        seconds = 4 if self.args.rehearse else 20
        accuracies = []
        for name in ("whole", "killed"):  # what a call before left is finished
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name, kill_after in (("whole", None), ("killed", seconds), ("killed", None)):
            self.call("more_lt.py", *self.synth, "--no-more", *self.once, "--seed", "5",
                      "--precision", "fp32", "--resume", "--out", self.out / name,
                      kill_after=kill_after)
            found = self.out / name / "result.json"
            if kill_after and found.exists():
                raise RuntimeError(f"the run ended within {seconds} s, before it could be killed")
            if not kill_after:
                accuracies.append(json.loads(found.read_text())["acc"]["all"])
        near = abs(accuracies[0] - accuracies[1]) < 5  # a GPU adds up in another order each time
        return {"ok": near, "unbroken and resumed, all": accuracies}

    def torchrun(self):
        """One process through torchrun."""
        self.call("more_lt.py", *self.synth, "--no-more", "--epochs", "1", "--out",
                  self.out / f"torchrun{int(self.began)}",
                  launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"))

    def all(self):
        """Every part, most valuable first."""
        seeds = (0,) if self.args.rehearse else (0, 1, 2)
        self.part("smoke", self.smoke)
        self.part("agreement of CPU and device, fp32", agreement, self.device)
        self.part("a classifier in half and bf16", lower_precision, self.device)
        if not self.args.rehearse:
            self.part("a stream of its own", stream_of_its_own, self.device)
        for seed in seeds:
            name = f"cifar100_imb100_seed{seed}"
            self.part(f"DO, seed {seed}", self.do, name, "--seed", seed)
            self.part(f"balanced softmax, seed {seed}", self.more, f"base_bsce_{name}", "--loss",
                      "bsce", "--no-more", "--seed", seed)
            if seed == 0:
                self.part("bench, ResNet-32", self.bench, "resnet32", "--steps", "32")
                self.part("bench, ResNet-50", self.bench, "resnet50",
                          *"--arch resnet50 --size 224 --batch-size 256 --steps 4 --rounds 3"
                          .split())
                self.part("--compile off and on", self.compiled)
                self.part("--resume after a kill", self.resumed)
                self.part("one process through torchrun", self.torchrun)
        for seed in seeds:
            name = f"cifar100_imb100_seed{seed}"
            self.part(f"cross-entropy, seed {seed}", self.more, f"base_ce_{name}", "--no-more",
                      "--seed", seed)
            self.part(f"MORE, seed {seed}", self.more, f"more_bsce_{name}", "--loss", "bsce",
                      "--seed", seed)
        self.part("DO, the paper's recipe", self.do, "paper_cifar100_imb100_seed0", "--recipe",
                  "paper")

    def show_goals(self):
        """What was found beside GOALS."""
        found = {
            "ResNet-32, images/s": self.parts.get("--compile off and on", {}).get("--compile 1"),
            "ResNet-50 at 224 px, images/s": self.parts.get("bench, ResNet-50", {}).get("bare"),
            "DO's whole recipe, s": self.parts.get("DO, seed 0", {}).get("seconds of the run"),
        }
        for name, value in found.items():
            seconds = name.endswith(" s")
            met = value and (value <= GOALS[name] if seconds else value >= GOALS[name])
            seen = f"{value:,.0f}" if value else "not measured"
            print(f"{name}: {seen}, goal {GOALS[name]:,}{'' if met else '   MISSED'}")


def main(argv=None):
    """Run the parts in turn until the time is over."""
    parser = argparse.ArgumentParser(description="what needs a GPU, in one command")
    parser.add_argument("--data", default="cifar100",
                        help="dataset of the trainings: a pack, or a name")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--minutes", type=float, default=9, help="no part is begun after these")
    parser.add_argument("--only", default="",
                        help="parts whose names contain one of these, with + between")
    parser.add_argument("--rehearse", action="store_true",
                        help="on the CPU, tiny, without what only CUDA can show")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("error: no CUDA device here: run it on a machine with one, or --rehearse it on the "
              "CPU", file=sys.stderr)
        sys.exit(2)
    session = Session(args)
    session.all()
    session.show_goals()
    sys.exit(1 if session.failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, os.cpu_count() or 1)))
    main()
