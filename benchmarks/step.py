#!/usr/bin/env python3
"""Images per second of a training step, ours and the plain reference loop's, timed in turn within one run.

    python benchmarks/step.py                    everything (about 15 minutes on 2 CPU cores)
    python benchmarks/step.py --only step        one part: step, trials, data or profile
    python benchmarks/step.py --only imagenet --threads 2    ResNet34 -> ResNet18 at 224 pixels, asked for alone

Only ratios within one run count on a shared machine; each is the median over rounds of the ratio within a round.
The pixels are random: time does not depend on them. "Cached" reads teacher logits from a cache that holds them all.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from random_pixels import MEAN, STD, pixels
from reference import ReferenceLoop, endless, loader
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mdistill.config import Config, load
from mdistill.data import DataInfo, InMemoryDataset
from mdistill.data.sampling import epoch_plan
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.build import Experiment, build, build_network, pick_device
from mdistill.engine.teacher import entries_of_epochs
from mdistill.engine.trainer import train_step
from mdistill.errors import UserError
from mdistill.models.weights import save_weights
from mdistill.precision import require_precision
from mdistill.reporting.tables import text_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cifar100"
PAIRS = ("res32x4_res8x4", "wrn40_2_wrn16_2")
BATCH = 64
VOID_BELOW = 58.0  # images/s of the reference on two CPU cores, first pair; a slower one would flatter us
INFO = DataInfo(num_classes=100, num_samples=4096, image_size=32, num_views=162, batch_size=BATCH)
"""What the networks are built for."""
LARGE = CONFIGS.parent / "imagenet" / "kd" / "res34_res18.yaml"
LARGE_BATCH, LARGE_IMAGES = 32, 256
LARGE_INFO = DataInfo(num_classes=1000, num_samples=LARGE_IMAGES, image_size=224, num_views=162, batch_size=LARGE_BATCH)


class Ours:
    """Our training of one configuration, built as a run is: its seeds take a step each in turn."""

    def __init__(
        self,
        cfg: Path,
        scratch: Path,
        device: torch.device,
        *,
        precision: str,
        cached: bool,
        seeds: Sequence[int] = (0,),
        engine: str = "auto",
        images: int = 4096,
        info: DataInfo = INFO,
    ) -> None:
        words = [*self.overrides(cfg, scratch, precision, engine, info), f"data.images={images}"]
        settings = [load(cfg, words, seed=seed) for seed in seeds]
        experiment = build(
            settings,
            device,
            data_root=scratch,
            checkpoint_root=scratch,
            output_root=scratch,
            cache_root=scratch / "cache" if cached else None,
        )
        if cached:
            fill(experiment, seeds)
        self.distiller, self.dataset = experiment.trials[0].distiller, experiment.dataset
        self.trials = [ActiveTrial(experiment, trial) for trial in experiment.trials]
        self.images, self.position = info.batch_size * len(seeds), 0  # a step of all seeds

    @property
    def extra_parameters(self) -> int:
        """How many numbers are trained beside the student's."""
        trained: int = sum(each.numel() for group in self.distiller.param_groups() for each in group["params"])
        return trained - sum(each.numel() for each in self.distiller.student.parameters())

    @property
    def state_bytes(self) -> int:
        """What the method keeps between steps beside the student."""
        state = self.distiller.state_dict()
        return sum(value.nbytes for key, value in state.items() if not key.startswith(("student.", "teacher.")))

    @staticmethod
    def overrides(cfg: Path, scratch: Path, precision: str, engine: str, info: DataInfo) -> list[str]:
        config = load(cfg)
        words = ["data.name=random_pixels", f"data.batch_size={info.batch_size}"]
        words += [f"run.precision={precision}", f"run.engine={engine}"]
        if info is not INFO:
            words += [f"data.image_size={info.image_size}", f"data.classes={info.num_classes}", "data.test_images=2"]
        if config.teacher is not None:
            weights = [scratch / f"{member.name.replace('/', '_')}.pt" for member in config.teacher.members]
            for path, member in zip(weights, config.teacher.members, strict=True):
                if not path.exists():
                    save_weights(path, network(member.name, info).state_dict())
            further = [
                {"name": member.name, "checkpoint": str(path)}
                for member, path in zip(config.teacher.ensemble, weights[1:], strict=True)
            ]
            words += [f"teacher.checkpoint={weights[0]}", "teacher.expected_top1=null"]
            words += [f"teacher.ensemble={json.dumps(further)}"] if further else []
        return words

    def step(self) -> None:
        """One step of each seed on the next batch of its first epoch, over and over."""
        for trial in self.trials:
            with trial.stream:
                step = self.position % trial.loader.steps
                if step == 0:
                    trial.begin_epoch(1)
                trial.run(train_step, trial.loader.fetch(step))
        self.position += 1


def network(name: str, info: DataInfo = INFO) -> nn.Module:
    """With initial weights, in torch's default layout."""
    return build_network("student", name, {}, info, seed=0).to(memory_format=torch.contiguous_format)


def fill(experiment: Experiment, seeds: Sequence[int]) -> None:
    """Write random logits where the first epoch of each seed reads."""
    assert experiment.cache is not None
    ids = entries_of_epochs(experiment.dataset, 1, seeds)
    ids = ids[experiment.cache.missing(ids)]
    logits = torch.randn(len(ids), experiment.cache.width, generator=torch.Generator().manual_seed(0))
    experiment.cache.write(ids, logits.to(experiment.cache.dtype), np.zeros(len(ids), dtype=np.bool_))


def seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Time of ``count`` steps, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def alternate(
    steps: dict[str, Callable[[], None]], *, rounds: int, count: int, device: torch.device, warm_up: int = 6
) -> dict[str, list[float]]:
    """Seconds of ``count`` steps of each entry, round by round, after ``warm_up`` steps of each."""
    for step in steps.values():
        seconds(step, warm_up, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps) if number % 2 == 0 else list(reversed(steps))
        for name in names:
            times[name].append(seconds(steps[name], count, device))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float], images: float = 1.0) -> float:
    """Median over rounds of slow / fast, when a step of the second sees ``images`` times as many."""
    return statistics.median(images * a / b for a, b in zip(slow, fast, strict=True))


def rate(times: Sequence[float], count: int, images: int = BATCH) -> str:
    """Images per second, median over rounds."""
    return f"{images * count / statistics.median(times):,.0f}"


def machine(device: torch.device) -> str:
    """What it is measured on, with versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} CPU threads, {versions}"


def precisions(device: torch.device) -> list[str]:
    """What the device computes in: its float32 units, and bf16 where it has them."""
    found = ["tf32" if device.type == "cuda" else "fp32"]
    try:
        require_precision("bf16", device, "benchmark")
        found.append("bf16")
    except UserError:
        pass
    return found


def time_pairs(scratch: Path, device: torch.device, args: argparse.Namespace) -> str:
    rows = []
    for pair in PAIRS:
        cfg = CONFIGS / "kd" / f"{pair}.yaml"
        config = load(cfg)
        assert config.teacher is not None
        plain = ReferenceLoop(network(config.student.name), network(config.teacher.name), device)
        batches = endless(loader(*pixels(4096), BATCH, device))
        held = [next(batches) for _ in range(args.count)]
        cursor = iter(range(10**9))
        steps: dict[str, Callable[[], None]] = {
            "reference": lambda plain=plain, batches=batches: plain.step(*next(batches)),  # type: ignore[misc]
            "reference in memory": lambda plain=plain, held=held, cursor=cursor: plain.step(  # type: ignore[misc]
                *held[next(cursor) % len(held)]
            ),
        }
        for cached in (False, True):
            for precision in precisions(device):
                name = f"{'cached' if cached else 'live'} {precision}"
                steps[name] = Ours(cfg, scratch, device, precision=precision, cached=cached).step
        times = alternate(steps, rounds=args.rounds, count=args.count, device=device)
        slow = BATCH * args.count / statistics.median(times["reference"])
        if device.type == "cpu" and pair == PAIRS[0] and slow < VOID_BELOW:
            print(f"void: the reference did {slow:.0f} images/s, below {VOID_BELOW:.0f}: other work is using the cores")
        for name, spent in times.items():
            against = [f"{ratio(times[base], spent):.2f}" for base in ("reference", "reference in memory")]
            rows.append([f"{config.teacher.name} -> {config.student.name}", name, rate(spent, args.count), *against])
    return text_table(["KD", "step", "images/s", "over reference", "over in memory"], rows)


def time_imagenet(scratch: Path, device: torch.device, args: argparse.Namespace) -> str:
    """The pair of ``LARGE`` at 224 pixels with a live teacher, on batches in memory."""
    config = load(LARGE)
    assert config.teacher is not None
    plain = ReferenceLoop(network(config.student.name, LARGE_INFO), network(config.teacher.name, LARGE_INFO), device)
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(LARGE_BATCH, 3, 224, 224, generator=generator), torch.arange(LARGE_BATCH)
    steps: dict[str, Callable[[], None]] = {"reference in memory": lambda: plain.step(*held)}
    for precision in precisions(device):
        ours = Ours(LARGE, scratch, device, precision=precision, cached=False, images=LARGE_IMAGES, info=LARGE_INFO)
        steps[f"live {precision}"] = ours.step
    times = alternate(steps, rounds=args.rounds, count=args.count, device=device, warm_up=2)
    base, rows = times["reference in memory"], []
    for name, spent in times.items():
        ratios = [a / b for a, b in zip(base, spent, strict=True)]
        found = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
        images = LARGE_BATCH * args.count / statistics.median(spent)
        rows.append([name, f"{images:.1f}", *found])
    title = f"KD, {config.teacher.name} -> {config.student.name}, 224 pixels, batch {LARGE_BATCH}"
    return text_table([title, "images/s", "over reference", "rounds"], rows)


def time_trials(scratch: Path, device: torch.device, args: argparse.Namespace) -> str:
    """One trial against three together, the teacher's logits cached."""
    cfg = CONFIGS / "kd" / f"{PAIRS[0]}.yaml"
    rows = []
    for precision in precisions(device):
        makers = {
            count: Ours(cfg, scratch, device, precision=precision, cached=True, seeds=range(count)) for count in (1, 3)
        }
        steps = {f"{count}": it.step for count, it in makers.items()}
        times = alternate(steps, rounds=args.rounds, count=args.count, device=device)
        for count, it in makers.items():
            share = ratio(times["1"], times[f"{count}"], count)
            rows.append([f"{count}", precision, rate(times[f"{count}"], args.count, it.images), f"{share:.2f}"])
    return text_table(["trials together", "precision", "images/s in all", "over one"], rows)


def time_data(scratch: Path, device: torch.device, args: argparse.Namespace) -> str:
    images, labels = pixels(50_000)
    data = InMemoryDataset((images, labels), (images[:1], labels[:1]), num_classes=100, mean=MEAN, std=STD)
    data = data.to(device)
    batches = endless(loader(images, labels, BATCH, device))
    plan = epoch_plan(0, 1, data.num_samples, data.num_views)
    index, view = (torch.from_numpy(part[:BATCH]).to(device) for part in (plan.index, plan.view))
    count, many = 50, 40  # of ours many more, so that the loader's workers, which fetch ahead, disturb little of it

    def ours() -> None:
        for _ in range(many):
            data.train_batch(index, view)

    times = alternate(
        {"reference": lambda: (next(batches), None)[1], "ours": ours},
        rounds=args.rounds,
        count=count,
        device=device,
    )
    row = ["pixels to a normalised batch", rate(times["reference"], count), rate(times["ours"], count, many * BATCH)]
    header = ["data path, images/s", "DataLoader", "ours", "ratio"]
    return text_table(header, [[*row, f"{ratio(times['reference'], times['ours'], many):.1f}"]])


CLASSES = {
    "convolution, backward": ("convolution_backward",),
    "convolution, forward": ("mkldnn_convolution", "cudnn_convolution", "thnn_conv2d", "_slow_conv2d"),
    "BatchNorm, backward": ("batch_norm_backward",),
    "BatchNorm, forward": ("batch_norm",),
    "ReLU and its gradient": ("threshold_backward", "clamp_min", "relu"),
    "residual and gradient sums": ("aten::add", "aten::add_"),
    "casts and copies": ("aten::copy_", "aten::_to_copy"),
    "optimiser": ("fused_sgd", "SGD"),
}
"""Operations by the beginning or a part of their name; the first class that fits."""


def time_profile(scratch: Path, device: torch.device, args: argparse.Namespace) -> str:
    """Where a cached KD step's time goes, against the student's own arithmetic at the device's measured peak."""
    rows = []
    for precision in precisions(device):
        cfg = CONFIGS / "kd" / f"{PAIRS[0]}.yaml"
        ours = Ours(cfg, scratch, device, precision=precision, cached=True, engine="eager")
        seconds(ours.step, 6, device)
        wall = seconds(ours.step, args.count, device) / args.count
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            seconds(ours.step, args.count, device)
        spent = dict.fromkeys([*CLASSES, "everything else"], 0.0)
        for event in profile.key_averages():
            if event.device_type != torch.profiler.DeviceType.CPU:
                continue  # a kernel, whose time the operation that launched it has too
            micro = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            found = [name for name, parts in CLASSES.items() if any(_fits(event.key, part) for part in parts)]
            spent[found[0] if found else "everything else"] += micro / 1e3 / args.count
        total = sum(spent.values())
        rows += [[precision, name, f"{value:.1f}", f"{100 * value / total:.0f} %"] for name, value in spent.items()]
        at_peak = 1e3 * student_flops(load(cfg)) / peak(device, precision)
        rows.append([precision, "a step, unprofiled", f"{1e3 * wall:.1f}", ""])
        rows.append(
            [precision, "the student's arithmetic at peak", f"{at_peak:.1f}", f"{100 * at_peak / 1e3 / wall:.0f} %"]
        )
    return text_table(["precision", "kind of operation", "ms a step", "share"], rows)


def _fits(key: str, part: str) -> bool:
    return key == part if part.startswith("aten::") else part in key


def student_flops(config: Config) -> float:
    """Multiplications and additions of a step of the student, forward and backward."""
    student = network(config.student.name)
    with FlopCounterMode(display=False) as counter:
        student(torch.zeros(BATCH, 3, 32, 32)).sum().backward()
    return float(counter.get_total_flops())


def peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        best = min(seconds(lambda: (a @ b, None)[1], 1, device) for _ in range(8))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 2 * size**3 / best


PARTS = {
    "step": time_pairs,
    "trials": time_trials,
    "data": time_data,
    "profile": time_profile,
}
ASKED_FOR = {"imagenet": time_imagenet}
"""Parts that run by name alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS, *ASKED_FOR], help="one part")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each entry is timed (%(default)s)")
    parser.add_argument("--count", type=int, help="steps a timing (6 on a CPU, 50 on a GPU)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.count = args.count or (6 if device.type == "cpu" else 50)
    print(f"{machine(device)}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for part, measure in {**PARTS, **ASKED_FOR}.items():
            if args.only == part or (args.only is None and part in PARTS):
                print(measure(Path(scratch), device, args) + "\n", flush=True)


if __name__ == "__main__":
    main()
