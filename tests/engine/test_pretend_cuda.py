"""The CUDA path without a GPU: whole runs on a pretended device, and faults that are planted in them and found."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdistill.data import loader, randaugment
from mdistill.data.loader import BatchLoader, PinnedUpload, Reader
from mdistill.distillers import Distiller, Signals, functional
from mdistill.distillers.kd import KD
from mdistill.distillers.mcld import Queue
from mdistill.engine import active_trial, cuda_graph, teacher
from mdistill.engine.active_trial import ActiveTrial
from mdistill.engine.checkpoint import Snapshot
from mdistill.engine.metrics import RunningMetrics
from mdistill.engine.teacher import TeacherLogits
from mdistill.optim import solvers
from mdistill.optim.averaging import AveragedNetwork

from ..pretend_cuda import Event, PretendError, Stream, pretend
from .scenarios import SCENARIOS

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(teacher, "BATCH", {**teacher.BATCH, "cuda": 16})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # each capture collects garbage: here among what the test makes alone
    with pretend():
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


# ---- the device ----


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, device="cuda", **options)


def pinned(*shape: int) -> Tensor:
    return torch.zeros(shape, pin_memory=True)


def capture(function: Callable[[], Any], **options: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **{"capture_error_mode": "thread_local", **options}):  # other tests leave threads
        function()
    return graph


def in_the_background(function: Callable[[], Any]) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        function()


def replay_what_was_freed() -> None:
    x, total = [ones(2)], ones(2)
    graph = capture(lambda: total.add_(x[0]))
    graph.replay()
    x.clear()
    graph.replay()


def overwrite_an_upload() -> None:
    source = pinned(2)
    source.to("cuda", non_blocking=True)
    source.add_(1)


def overwrite_an_upload_unseen() -> None:
    source = pinned(2)
    array = source.numpy()
    source.to("cuda", non_blocking=True)
    array += 1
    torch.cuda.synchronize()


def read_a_download() -> None:
    target = pinned(2)
    target.copy_(ones(2), non_blocking=True)
    target.sum()


def time_the_unfinished() -> None:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record()
        ones(2)
    events[0].elapsed_time(events[1])


def step_in_another_layout() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3, 2, 2).cuda().to(memory_format=torch.channels_last))
    weight.grad = torch.ones(4, 3, 2, 2).cuda()
    torch.optim.SGD([weight], lr=torch.tensor(0.1, device="cuda"), fused=True).step()


def wait_where_no_wait_is_allowed() -> None:
    torch.cuda.set_sync_debug_mode("error")
    ones(2).sum().item()


def pool_without_a_deterministic_kernel() -> None:
    torch.use_deterministic_algorithms(True)
    torch.nn.functional.adaptive_avg_pool2d(ones(1, 1, 4, 4, requires_grad=True), 2).sum().backward()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two devices": (lambda: ones(2) + torch.ones(2), "expected all tensors on one device"),
    "an array of the device": (lambda: ones(2).numpy(), "cannot become a NumPy array"),
    "a wait": (wait_where_no_wait_is_allowed, "the host waits for the device: aten._local_scalar_dense"),
    "a read in a capture": (lambda: capture(lambda: float(ones(()))), "while the stream is capturing"),
    "a mask in a capture": (lambda: capture(lambda: ones(2)[ones(2) > 0]), "while the stream is capturing"),
    "an upload in a capture": (lambda: capture(lambda: torch.ones(2).cuda()), "while the stream is capturing"),
    "a constant made in a capture": (lambda: capture(lambda: torch.tensor(1.0, device="cuda")), "is capturing"),
    "a fork in a capture": (lambda: capture(lambda: in_the_background(lambda: ones(2))), "on another stream"),
    "freed memory": (replay_what_was_freed, "memory that was freed"),
    "an overwritten upload": (overwrite_an_upload, "race: the host uses pinned memory"),
    "an upload overwritten by NumPy": (overwrite_an_upload_unseen, "race: pinned memory was written"),
    "a download read early": (read_a_download, "race: the host uses pinned memory"),
    "a race": (lambda: in_the_background(ones(2).sum), "race: aten.sum.default on stream"),
    "an unfinished event": (time_the_unfinished, "device not ready"),
    "layouts of the fused update": (step_in_another_layout, "laid out differently"),
    "no deterministic kernel": (pool_without_a_deterministic_kernel, "deterministic implementation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_device_refuses(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(PretendError, match=message):
        function()


def test_a_capture_has_no_effect_and_a_replay_works_on_the_same_memory() -> None:
    x, total, made = ones(3), ones(3), []
    graph = capture(lambda: made.append(total.add_(x) * 2))
    assert total.tolist() == [1.0, 1.0, 1.0]
    assert made[0].isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
    assert total.tolist() == [7.0, 7.0, 7.0]
    assert made[0].tolist() == [14.0, 14.0, 14.0]


def test_who_waits_may_read_and_write() -> None:
    stream, source, target, event = torch.cuda.Stream(), pinned(2), pinned(2), torch.cuda.Event()
    x = source.to("cuda", non_blocking=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x += 1
        target.copy_(x, non_blocking=True)
        event.record()
    event.synchronize()
    source += 5
    assert target.tolist() == [1.0, 1.0]


# ---- captured against eager runs ----


FAST = ("mcld",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in SCENARIOS])
def test_a_captured_run_equals_an_eager_one(name: str, tmp_path: Path) -> None:
    """Bit for bit: weights, averages, momentum, queues, metrics, exported networks and the teacher's cached logits."""
    scenario = SCENARIOS[name]
    cfg = scenario.write(tmp_path)
    scenario.run(cfg, tmp_path / "eager", "eager")
    scenario.compare(cfg, tmp_path / "eager", tmp_path / "graph")


def test_the_graph_of_a_step_is_freed_when_its_trial_ends(monkeypatch: Patch, tmp_path: Path) -> None:
    """NCCL waits for the graphs that use a communicator before it is destroyed."""
    steps: list[Any] = []
    freed: list[bool] = []
    before(monkeypatch, ActiveTrial, "__exit__", lambda self, *a: steps.append(weakref.ref(self._step.replay.__self__)))
    after(monkeypatch, ActiveTrial, "__exit__", lambda *a: freed.append(steps[-1]() is None))
    scenario = SCENARIOS["kd"]
    scenario.run(scenario.write(tmp_path), tmp_path / "graph", "graph")
    assert freed == [True]


# ---- planted faults ----


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Patch], None]
    scenario: str
    found_by: str


FAULTS: dict[str, Fault] = {}
DIFFERS, ONE_DEVICE, CAPTURING = "differs from the eager run", "expected all tensors on one device", "is capturing"
FREED = "memory that was freed"


def fault(scenario: str, found_by: str) -> Callable[[Callable[[Patch], None]], None]:
    """What is decorated plants a fault, which the error or line ``found_by`` has to tell of."""

    def register(plant: Callable[[Patch], None]) -> None:
        FAULTS[plant.__name__.replace("_", " ")] = Fault(plant, scenario, found_by)

    return register


def before(patch: Patch, owner: Any, name: str, action: Callable[..., Any]) -> None:
    """Do ``action`` with the same arguments before each call."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(owner, name, replaced)


def after(patch: Patch, owner: Any, name: str, action: Callable[..., Any]) -> None:
    """Do ``action`` with the same arguments after each call."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(*args, **kwargs)
        return result

    patch.setattr(owner, name, replaced)


def within(patch: Patch, owner: Any, name: str, context: Callable[[], Any]) -> None:
    """Each call in a context of its own."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    patch.setattr(owner, name, replaced)


def a_new_stream() -> Any:
    return torch.cuda.stream(torch.cuda.Stream())


def the_default_stream() -> Any:
    return torch.cuda.stream(torch.cuda.default_stream())


# -- on the wrong device --


@fault("kd", ONE_DEVICE)
def offsets_within_a_batch_on_the_host(patch: Patch) -> None:
    after(patch, BatchLoader, "__init__", lambda self, *a, **k: setattr(self, "_offsets", self._offsets.cpu()))


@fault("kd", ONE_DEVICE)
def sums_of_metrics_on_the_host(patch: Patch) -> None:
    after(patch, RunningMetrics, "__init__", lambda self, *a: setattr(self, "totals", self.totals.cpu()))


@fault("resumed", ONE_DEVICE)
def sums_of_metrics_restored_to_the_host(patch: Patch) -> None:
    after(patch, RunningMetrics, "load_state_dict", lambda self, state: setattr(self, "totals", state["totals"]))


@fault("dkd", ONE_DEVICE)
def classes_numbered_on_the_host(patch: Patch) -> None:
    def class_mask(classes: Tensor, num_classes: int) -> Tensor:
        return classes[:, None] == torch.arange(num_classes)

    patch.setattr(functional, "class_mask", class_mask)


@fault("mlkd", ONE_DEVICE)
def tables_of_strong_views_on_the_host(patch: Patch) -> None:
    patch.setattr(randaugment.Strengthen, "to", lambda self, device: self)


# -- what a capture freezes or refuses --


@fault("drops of the rate", "the rate is a number")
def rate_as_a_number(patch: Patch) -> None:
    patch.setattr(solvers, "rate_tensor", lambda device, value=0.0: value)


@fault("drops of the rate", FREED)
def rate_in_another_tensor_each_epoch(patch: Patch) -> None:
    def set_group_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), lr * group["lr_scale"], device="cuda")

    patch.setattr(solvers, "set_group_rates", set_group_rates)


@fault("resumed", "the fused update reads its rate on the host")
def rate_on_the_host_after_a_resume(patch: Patch) -> None:
    patch.setattr(solvers, "load_optimizer", lambda optimizer, state: optimizer.load_state_dict(state))


@fault("mcld", CAPTURING)
def place_in_the_queue_on_the_host(patch: Patch) -> None:
    before(patch, Queue, "push", lambda self, keys, index: int(self.pointer))


@fault("kd", CAPTURING)
def constant_uploaded_in_the_step(patch: Patch) -> None:
    def distillation(self: KD, signals: Signals) -> dict[str, Tensor]:
        terms = original(self, signals)
        return {name: term * torch.tensor(1.0).to(term.device) for name, term in terms.items()}

    original = KD.distillation
    patch.setattr(KD, "distillation", distillation)


@fault("kd", CAPTURING)
def loss_printed_in_each_step(patch: Patch) -> None:
    before(patch, RunningMetrics, "update", lambda self, output: print(float(output.total)))


@fault("dkd", DIFFERS)
def epoch_as_a_number(patch: Patch) -> None:
    def forward(self: Distiller, batch: Any, epoch: Tensor) -> Any:
        return original(self, batch, torch.full_like(epoch, number[-1]))

    number = [1]
    original = Distiller.forward
    before(patch, ActiveTrial, "begin_epoch", lambda self, epoch: number.append(epoch))
    patch.setattr(Distiller, "forward", forward)


@fault("kd", DIFFERS)
def position_in_the_epoch_as_a_number(patch: Patch) -> None:
    def fetch(self: BatchLoader, step: int) -> int:
        number.append(step * self.batch_size)
        return original(self, step)

    number: list[int] = []
    original = BatchLoader.fetch
    patch.setattr(BatchLoader, "fetch", fetch)
    before(patch, BatchLoader, "batch", lambda self, size: self._position.fill_(number[-1]))


# -- memory that a graph does not follow --


@fault("kd", FREED)
def plan_of_an_epoch_in_other_memory(patch: Patch) -> None:
    before(patch, BatchLoader, "begin", lambda self, *a: setattr(self, "_pairs", self._pairs.clone()))


@fault("kd", FREED)
def metrics_in_other_memory_each_epoch(patch: Patch) -> None:
    patch.setattr(RunningMetrics, "reset", lambda self: setattr(self, "totals", torch.zeros_like(self.totals)))


@fault("kd", FREED)
def logits_of_the_teacher_in_other_memory(patch: Patch) -> None:
    before(patch, TeacherLogits, "begin", lambda self, *a, **k: setattr(self, "rows", self.rows.clone()))


@fault("streamed", FREED)
def pixels_of_a_streamed_batch_in_other_memory(patch: Patch) -> None:
    before(patch, Reader, "fetch", lambda self: setattr(self, "pixels", self.pixels.clone()))


# -- order --


@fault("kd", "race: .* does not wait for")
def stream_of_a_trial_not_behind_its_setup(patch: Patch) -> None:
    patch.setattr(active_trial, "side_stream", lambda device: a_new_stream())


@fault("kd", "graphs cannot be captured on the default stream")
def steps_on_the_default_stream(patch: Patch) -> None:
    patch.setattr(active_trial, "side_stream", lambda device: nullcontext())


@fault("averages", "race: .* does not wait for")
def averages_on_a_stream_of_their_own(patch: Patch) -> None:
    within(patch, AveragedNetwork, "update", a_new_stream)


@fault("kd", "race: .* does not wait for")
def metrics_read_on_another_stream(patch: Patch) -> None:
    within(patch, ActiveTrial, "collect_results", the_default_stream)


@fault("kd", "race: .* does not wait for")
def snapshot_taken_on_another_stream(patch: Patch) -> None:
    within(patch, ActiveTrial, "save", the_default_stream)


@fault("kd", "state is not finite")
def snapshot_written_before_it_is_there(patch: Patch) -> None:
    patch.setattr(Snapshot, "get", lambda self: self._state)


@fault("kd", "device not ready")
def time_read_before_the_device_is_done(patch: Patch) -> None:
    after(patch, ActiveTrial, "end_training", lambda self: self._clock.seconds())


@fault("two trials", "race: the host uses pinned memory")
def one_pinned_buffer_for_all_uploads(patch: Patch) -> None:
    def upload(values: Any, device: torch.device) -> Tensor:
        tensor = torch.as_tensor(values)
        kind = tensor.dtype, tensor.shape
        if kind not in buffers:
            buffers[kind] = tensor.pin_memory()
        return buffers[kind].copy_(tensor).to(device, non_blocking=True)

    buffers: dict[Any, Tensor] = {}
    for module in (loader, teacher):
        patch.setattr(module, "upload", upload)


@fault("streamed", "race: pinned memory was written")
def buffer_of_the_reader_filled_too_early(patch: Patch) -> None:
    patch.setattr(PinnedUpload, "wait", lambda self, buffer: None)


@fault("streamed", "race: .* does not wait for")
def step_not_behind_the_upload_of_its_pixels(patch: Patch) -> None:
    def wait_event(self: Stream, event: Event) -> None:
        if self.number in copying:
            original(self, event)

    original, copying = Stream.wait_event, set[int]()
    patch.setattr(Stream, "wait_event", wait_event)
    after(patch, PinnedUpload, "__init__", lambda self, *a: copying.add(self.stream.number))


@fault("streamed", "race: .* does not wait for")
def staging_buffer_overwritten_while_it_is_read(patch: Patch) -> None:
    after(patch, PinnedUpload, "__init__", lambda self, *a: setattr(self.stream, "wait_event", lambda event: None))


@fault("streamed with two views", "race: .* does not wait for")
def stream_of_uploads_not_behind_its_setup(patch: Patch) -> None:
    after(patch, PinnedUpload, "__init__", lambda self, *a: setattr(self, "stream", Stream()))


@fault("streamed with two views", "race: the host uses pinned memory|race: pinned memory was written")
def one_pinned_buffer_for_all_batches(patch: Patch) -> None:
    after(patch, Reader, "__init__", lambda self, *a, **k: setattr(self, "_buffers", self._buffers[:1] * 4))


# -- captures --


@fault("kd", "another graph was destroyed")
def garbage_collected_during_a_capture(patch: Patch) -> None:
    def capture_graph(function: Callable[[], None]) -> Callable[[], None]:
        old: Any = torch.cuda.CUDAGraph()
        old.operations, old.cycle = [], old
        del old
        return capture(function, stream=torch.cuda.current_stream(), capture_error_mode="thread_local").replay

    patch.setattr(cuda_graph, "capture_graph", capture_graph)


@fault("streamed", "another thread may call CUDA")
def capture_that_forbids_calls_by_other_threads(patch: Patch) -> None:
    def capture_graph(function: Callable[[], None]) -> Callable[[], None]:
        return capture(function, stream=torch.cuda.current_stream(), capture_error_mode="global").replay

    patch.setattr(cuda_graph, "capture_graph", capture_graph)


@fault("mlkd", CAPTURING)
def histograms_in_rows_under_deterministic_kernels(patch: Patch) -> None:
    def histograms(values: Tensor) -> Tensor:
        count = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=values.device)
        return count.scatter_add_(2, values, torch.ones_like(values, dtype=torch.int32))

    patch.setattr(randaugment, "_histograms", histograms)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The file and the output of an eager run without faults, one for each scenario."""
    done: dict[str, tuple[Path, Path]] = {}

    def run(name: str) -> tuple[Path, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp("eager")
            cfg = SCENARIOS[name].write(folder)
            SCENARIOS[name].run(cfg, folder / "eager", "eager")
            done[name] = cfg, folder / "eager"
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(
    name: str, eager: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: Patch
) -> None:
    """By an error, a line that a capture failed, or a difference; without it the same run passes above."""
    planted = FAULTS[name]
    reference = eager(planted.scenario)
    planted.plant(monkeypatch)
    with pytest.raises(Exception, match=planted.found_by):
        SCENARIOS[planted.scenario].compare(*reference, tmp_path)
