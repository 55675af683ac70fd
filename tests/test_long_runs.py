"""Runs that last: flat memory, optimizers that die, threads, and processes that are forked and spawned."""

import copy
import gc
import multiprocessing
import pickle
import threading
import weakref

import pytest
import torch
from helpers.comparing import assert_same
from helpers.loops import Net, train
from helpers.optimizers import BACKENDS, OPTIMIZERS, every_optimizer

from fusedopt import StatisticsRecorder, get_linear_schedule_with_warmup
from perf import long_run

OPTIONS = {"max_grad_norm": 0.5, "skip_nonfinite": True, "track_statistics": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", long_run.OPTIMIZERS)
def test_a_long_run_counts_right_and_holds_what_it_held(name):
    """`python -m perf.long_run --steps 100000` is the same for longer, and prints times."""
    long_run.run(name, 100)
    outcome = long_run.run(name, 3000)
    assert outcome.counted == outcome.expected == 3000 - 3000 // long_run.SPOILT
    # Of 2,700 steps after the first tenth: one that kept anything would have kept as many blocks.
    assert outcome.grown.objects < 50
    assert outcome.grown.blocks < 1000
    assert outcome.grown.resident < 8 * 1024


def trained(name, backend="eager", steps=1):
    model = Net()
    optimizer = OPTIMIZERS[name](model, backend=backend, **OPTIONS)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_that_is_dropped_dies_at_once(name, backend):
    """Without the collector: its states are most of a process's memory."""
    model, optimizer = trained(name, backend)
    moment = next(iter(optimizer.state.values()))["exp_avg" if name != "Adafactor" else "exp_avg_sq_row"]
    gc.collect()
    gc.disable()
    try:
        dead = [weakref.ref(optimizer), weakref.ref(moment), weakref.ref(model.first.weight)]
        del moment
        del optimizer
        model.zero_grad()
        del model
        assert [ref() is None for ref in dead] == [True] * 3
    finally:
        gc.enable()


@pytest.mark.slow
@every_optimizer
def test_a_recorder_and_a_schedule_go_with_their_optimizer(name):
    model, optimizer = trained(name)
    recorder = StatisticsRecorder(optimizer)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 10) if name != "Adafactor" else None
    train(model, optimizer, 2, schedule)
    dead = weakref.ref(optimizer)
    del optimizer, recorder, schedule
    gc.collect()
    assert dead() is None


@pytest.mark.slow
@every_optimizer
def test_thousands_of_optimizers_leave_nothing(name):
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)

    def made_and_dropped(number):
        for _ in range(number):
            optimizer = OPTIMIZERS[name]([p], **OPTIONS)
            optimizer.step()
            copy.deepcopy(optimizer.state_dict())

    made_and_dropped(500)
    before = long_run.Memory.now()
    made_and_dropped(1000)
    grown = long_run.Memory.now().since(before)
    # Python's allocator goes on growing a little, with or without optimizers: less than a block for each of them.
    assert grown.objects < 50 and grown.blocks < 1000


# Threads.


def run_all(*targets):
    """Runs these at once, and raises what one of them raised."""
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@every_optimizer
def test_two_threads_step_two_optimizers(name):
    """Of one process, which share the memory that steps work in only where that is safe."""
    (expected, _) = trained(name, steps=20)
    models = [Net(), Net()]
    optimizers = [OPTIMIZERS[name](model, backend="eager", **OPTIONS) for model in models]
    generators = [torch.Generator().manual_seed(1) for _ in models]

    def loop(model, optimizer, generator):
        for step in range(20):
            x = torch.randn(4, 5, generator=generator)
            model(x, skip=step % 3 == 2).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    run_all(*(lambda i=i: loop(models[i], optimizers[i], generators[i]) for i in range(2)))
    for model in models:
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in expected.parameters()])


@pytest.mark.slow
@every_optimizer
def test_a_thread_reads_while_another_steps(name):
    """Statistics, norms and checkpoints of a moment, none of which disturbs the run."""
    expected, _ = trained(name, steps=30)
    model = Net()
    optimizer = OPTIMIZERS[name](model, backend="eager", **OPTIONS)
    train(model, optimizer, 0)
    done = threading.Event()

    def step():
        try:
            train(model, optimizer, 30)
        finally:
            done.set()

    def read():
        while not done.is_set():
            if optimizer.state:
                optimizer.state_dict()
            if optimizer.grad_norm is not None:
                assert float(optimizer.grad_norm) >= 0.0
            if optimizer.skipped_steps is not None:
                assert dict(optimizer.skipped_steps)
            if optimizer.statistics.tensor is not None:
                assert optimizer.statistics.tensor.shape[0] == len(list(model.parameters()))

    run_all(step, read)
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in expected.parameters()])


# Processes.


def go_on(pickled, queue):
    """In a process of its own: steps with an optimizer that came in a pickle."""
    torch.set_num_threads(1)
    model, optimizer = pickle.loads(pickled)
    train(model, optimizer, 2, seed=2)
    queue.put([p.detach().numpy() for p in model.parameters()])


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.full((5,), float(i))


@every_optimizer
@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_process(name, how):
    model, optimizer = trained(name, steps=2)
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    child = context.Process(target=go_on, args=(pickle.dumps((model, optimizer)), queue))
    child.start()
    there = queue.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    train(model, optimizer, 2, seed=2)
    assert_same([torch.from_numpy(p) for p in there], [p.detach() for p in model.parameters()])


@every_optimizer
def test_a_forked_process_steps_without_touching_its_parent(name):
    model, optimizer = trained(name, steps=2)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def step():
        torch.set_num_threads(1)
        train(model, optimizer, 2, seed=2)
        queue.put([p.detach().numpy() for p in model.parameters()])

    child = context.Process(target=step)
    child.start()
    there = queue.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert_same([model.state_dict(), optimizer.state_dict()], before)
    train(model, optimizer, 2, seed=2)
    assert_same([torch.from_numpy(p) for p in there], [p.detach() for p in model.parameters()])


@pytest.mark.slow
@every_optimizer
def test_workers_of_a_loader_do_not_disturb_a_run(name):
    """They are forked between steps, with all that a step keeps."""
    results = []
    for workers in (0, 2):
        model, optimizer = trained(name)
        for _ in range(2):
            for x in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=workers):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert_same(*results)
