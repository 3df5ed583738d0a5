"""`recalibrate`: the population's statistics, compared with numpy on all samples, and nothing else changed."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import tempfile
import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import batchlab
from batchlab.surgery import recalibrate

TORCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
OUR_NORMS = [batchlab.nn.BatchNorm1d, batchlab.nn.BatchNorm2d, batchlab.nn.BatchNorm3d]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spatial_of(norm):
    return {"3": (2, 3, 2), "2": (3, 4)}.get(norm.__name__.removesuffix("d")[-1], (5,))


def uneven(shape, sizes=(3, 11, 2, 7), seed=0):
    """Batches of different sizes whose means differ too: averaging per-batch statistics is then wrong."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) * (1 + i) + 4 * i for i, n in enumerate(sizes)]


def pooled(batches):
    """Mean and unbiased variance of all samples per channel, by numpy."""
    samples = np.concatenate([b.double().transpose(0, 1).flatten(1).numpy() for b in batches], axis=1)
    return samples.mean(1), samples.var(1, ddof=1)


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: (id(v), v.data_ptr()) for k, v in [*model.named_buffers(), *model.named_parameters()]},
        {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
    )


def assert_same(before, model, *, but=()):
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    changed = [k for k, v in before[0].items() if not torch.equal(v, after[0][k])]
    assert sorted(changed) == sorted(but)
    assert before[1] == after[1]
    assert all(
        (g is None) == (after[2][k] is None) and (g is None or torch.equal(g, after[2][k]))
        for k, g in before[2].items()
    )
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5]


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("norm", [*TORCH_NORMS, *OUR_NORMS], ids=lambda n: f"{n.__module__.split('.')[0]}.{n.__name__}")
def test_uneven_batches_equal_one_big_batch(norm, momentum):
    model = nn.Sequential(norm(4, momentum=momentum))
    batches = uneven((4, *spatial_of(norm)))
    recalibrate(model, batches)
    mean, var = pooled(batches)
    np.testing.assert_allclose(model[0].running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(model[0].running_var, var, rtol=1e-6)
    assert model[0].num_batches_tracked == 0


def test_float64_keeps_its_digits_at_a_large_mean():
    x = torch.randn(64, 2, dtype=torch.float64) + 1e8
    model = recalibrate(nn.BatchNorm1d(2).double(), x.split(10))
    mean, var = pooled([x])
    np.testing.assert_allclose(model.running_mean, mean, rtol=1e-15)
    np.testing.assert_allclose(model.running_var, var, rtol=1e-7)


def test_algorithm_2_averages_unbiased_variances_weighted_by_count():
    batches = uneven((3,))
    model = recalibrate(nn.BatchNorm1d(3), batches, estimator="algorithm2")
    arrays = [b.double().numpy() for b in batches]
    counts = [len(a) for a in arrays]
    np.testing.assert_allclose(
        model.running_mean, np.average([a.mean(0) for a in arrays], axis=0, weights=counts), rtol=1e-6
    )
    expected = np.average([len(a) / (len(a) - 1) * a.var(0) for a in arrays], axis=0, weights=counts)
    np.testing.assert_allclose(model.running_var, expected, rtol=1e-6)
    assert (torch.as_tensor(pooled(batches)[1]) > 2 * model.running_var).all()  # the variance between batches is large


def test_estimators_agree_on_shuffled_batches():
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    a = recalibrate(nn.BatchNorm1d(2), x.split(50)).running_var
    b = recalibrate(nn.BatchNorm1d(2), x.split(50), estimator="algorithm2").running_var
    torch.testing.assert_close(a, b, rtol=0.01, atol=0)
    assert not torch.equal(a, b)


def test_dropout_is_off_and_later_layers_see_batch_normalized_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].running_mean.fill_(9.0)  # normalizing with these would give other statistics downstream
    batches = uneven((4,))
    recalibrate(model, batches)

    def second_input(x):
        normalized = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return model[3](normalized.relu()).detach()

    mean, var = pooled([second_input(b) for b in batches])
    np.testing.assert_allclose(model[4].running_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model[4].running_var, var, rtol=1e-4)


class Busy(nn.Module):
    """Everything that could be disturbed: modes, dropout, a buffer that the forward changes, random numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
        self.second = batchlab.nn.BatchNorm1d(4, momentum=None)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("ring", torch.zeros(2))
        self.ring_backup = None

    def forward(self, x):
        self.calls += 1
        self.ring = self.ring + 1  # rebinds the buffer
        return self.second(self.first(x) + torch.rand(4) + random.random() * 0)


@pytest.fixture
def busy():
    torch.manual_seed(0)
    model = Busy()
    model(torch.randn(5, 3)).sum().backward()
    model.first[3].eval()
    model.first[1].register_forward_pre_hook(lambda *_: None)
    return model


STATISTICS = ["first.1.running_mean", "first.1.running_var", "second.running_mean", "second.running_var"]


def test_only_running_statistics_change_in_place(busy):
    before = snapshot(busy)
    assert recalibrate(busy, uneven((3,))) is busy
    assert_same(before, busy, but=STATISTICS)


def test_pending_backward_is_not_disturbed():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.register_buffer("table", torch.randn(3))
    model.table.requires_grad_(False)
    weight = torch.randn(3, requires_grad=True)
    loss = (weight * model.table).sum()
    recalibrate(model, uneven((3,)))
    loss.backward()
    assert torch.equal(weight.grad, model.table)


def failing_iterator(error):
    yield torch.randn(4, 3)  # draws from the random state while it runs, as a shuffling loader does
    raise error


@contextlib.contextmanager
def failing_write(monkeypatch):
    real = torch.Tensor.copy_
    writes = []

    def copy(self, other, *args):
        writes.append(1)
        if len(writes) == 3:
            raise KeyboardInterrupt
        return real(self, other, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", copy)
        yield
    assert len(writes) > 3


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (lambda: failing_iterator(RuntimeError("broken loader")), RuntimeError),
        (lambda: failing_iterator(KeyboardInterrupt()), KeyboardInterrupt),
        (lambda: [torch.randn(4, 3), torch.randn(4, 5)], RuntimeError),  # in forward
        (lambda: [torch.randn(4, 3), torch.randn(1, 3)], ValueError),  # one sample per channel
        (lambda: [torch.randn(4, 3), torch.full((4, 3), float("nan"))], ValueError),
        (lambda: [torch.randn(4, 3), "text"], TypeError),
        (lambda: [], ValueError),
        (lambda: iter([]), ValueError),
    ],
)
def test_failure_leaves_the_model_bitwise_as_before(busy, batches, error):
    given = batches()
    before = snapshot(busy)
    with pytest.raises(error) as caught:
        recalibrate(busy, given)
    assert (
        not isinstance(given, list)
        or len(given) < 2
        or "the model is as it was" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    )
    assert_same(before, busy)


def test_interrupt_while_writing_is_undone(busy, monkeypatch):
    before = snapshot(busy)
    module = importlib.import_module("batchlab.surgery.recalibrate")
    real = module._write

    def write(new):
        with failing_write(monkeypatch):
            real(new)

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(busy, uneven((3,)))
    assert_same(before, busy)


def test_one_sample_in_all_is_too_few():
    layer = batchlab.nn.BatchNorm1d(2)
    mask = torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="1 samples per channel"):
        recalibrate(nn.ModuleList([layer]), [torch.randn(2, 2)], forward=lambda m, x: m[0](x, mask=mask))
    assert layer.running_mean.eq(0).all()


def test_masked_samples_count_only():
    layer = batchlab.nn.BatchNorm1d(3)
    x = [torch.randn(4, 3, 5), torch.randn(2, 3, 9)]
    masks = [torch.rand(b.shape[0], 1, b.shape[2], generator=torch.Generator().manual_seed(3)) > 0.4 for b in x]
    poisoned = [torch.where(m, b, torch.nan) for b, m in zip(x, masks, strict=True)]
    recalibrate(
        nn.ModuleList([layer]),
        zip(poisoned, masks, strict=True),
        forward=lambda model, batch: model[0](batch[0], mask=batch[1]),
    )
    valid = [b.transpose(0, 1)[:, m.squeeze(1)].T for b, m in zip(x, masks, strict=True)]
    mean, var = pooled(valid)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)


def test_layer_that_is_called_twice_pools_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, a, b):
            return self.norm(a), self.norm(input=b)

    a, b = uneven((2,), (4, 6))
    model = recalibrate(Twice(), [{"a": a, "b": b}])
    mean, var = pooled([a, b])
    np.testing.assert_allclose(model.norm.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(model.norm.running_var, var, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x, "label"], lambda x: {"input": x}])
def test_forms_of_batches(wrap):
    batches = uneven((3,))
    model = recalibrate(nn.BatchNorm1d(3), (wrap(b) for b in batches), device="cpu")
    np.testing.assert_allclose(model.running_mean, pooled(batches)[0], rtol=1e-6)


def test_device_moves_batches():
    with pytest.raises((RuntimeError, NotImplementedError)):
        recalibrate(nn.BatchNorm1d(3), uneven((3,)), device="meta")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_model(half):
    batches = [b.to(half) for b in uneven((3,))]
    theirs = recalibrate(nn.BatchNorm1d(3).to(half), batches)
    ours = recalibrate(batchlab.nn.BatchNorm1d(3).to(half), batches)
    mean, var = pooled(batches)
    np.testing.assert_allclose(ours.running_var, var, rtol=1e-6)
    np.testing.assert_allclose(theirs.running_mean.float(), mean, rtol=4e-3)
    assert theirs.running_var.dtype == half
    assert ours.running_var.dtype == torch.float32


def test_overflow_of_half_statistics_is_an_error():
    model = nn.BatchNorm1d(2).half()
    with pytest.raises(ValueError, match="non-finite"):
        recalibrate(model, [torch.tensor([[60000.0, 0.0], [-60000.0, 1.0]]).half()])
    assert model.running_var.eq(1).all()


def test_frozen_and_untracked_layers_are_left_and_run_as_in_evaluation():
    frozen = batchlab.nn.BatchNorm1d(3)
    frozen.running_mean.fill_(2.0)
    frozen.statistics = "running"
    held = batchlab.nn.BatchNorm1d(3)
    held.update_statistics = False
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    tracked = nn.BatchNorm1d(3)
    model = nn.Sequential(frozen, held, tracked, untracked)
    before = snapshot(model)
    batches = uneven((3,))
    recalibrate(model, batches)
    assert_same(before, model, but=["2.running_mean", "2.running_var"])
    scale = (1 + 1e-5) ** -0.5
    np.testing.assert_allclose(
        tracked.running_mean, pooled([(b - 2) * scale**2 for b in batches])[0], rtol=1e-5, atol=1e-6
    )


def test_model_of_frozen_layers_only_is_left_with_a_warning():
    layer = batchlab.nn.BatchNorm1d(3)
    layer.update_statistics = False
    before = snapshot(layer)
    with pytest.warns(UserWarning, match="changed nothing"):
        recalibrate(layer, uneven((3,)))
    assert_same(before, layer)


def test_layer_that_no_batch_reaches_is_left_with_a_warning():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)})
    model["unused"].running_mean.fill_(5.0)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="no batch reached 'unused'"):
        recalibrate(model, uneven((3,)), forward=lambda m, x: m["used"](x))
    assert_same(before, model, but=["used.running_mean", "used.running_var"])


def test_forward_may_raise_after_a_layer_was_left_in_another_mode(busy):
    def forward(model, x):
        model.eval()
        raise RuntimeError("mine")

    before = snapshot(busy)
    with pytest.raises(RuntimeError, match="mine"):
        recalibrate(busy, uneven((3,)), forward=forward)
    assert_same(before, busy)


def test_compiled_in_place_model_runs_as_it_is():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):  # torch compiles no module of its own in place
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.fc(x))

    model = Net()
    expected = recalibrate(nn.Sequential(model.fc, nn.BatchNorm1d(3)), uneven((3,)))[1].running_mean.clone()
    model.compile(backend=backend)
    model(torch.randn(4, 3))
    compiled = len(graphs)
    recalibrate(model, uneven((3,)))
    assert len(graphs) == compiled > 0  # nothing was compiled for the passing hooks
    torch.testing.assert_close(model.norm.running_mean, expected)


def test_scripted_part_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        part = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    model = nn.Sequential(part, nn.BatchNorm1d(3))
    batches = uneven((3,))
    recalibrate(model, batches)
    part.eval()
    np.testing.assert_allclose(model[1].running_var, pooled([part(b).detach() for b in batches])[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": nn.Linear(3, 3)}, ValueError, "no batch normalization"),
        ({"model": nn.DataParallel(nn.BatchNorm1d(3))}, TypeError, r"pass model\.module"),
        ({"model": nn.LazyBatchNorm1d()}, ValueError, "not initialized"),
        ({"batches": torch.randn(4, 3)}, TypeError, "one Tensor"),
        ({"batches": {"x": torch.randn(4, 3)}}, TypeError, "one dict"),
        ({"estimator": "ema"}, ValueError, "'pooled', 'algorithm2'"),
        ({"process_group": object()}, ValueError, "not initialized"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    given = {"model": nn.BatchNorm1d(3), "batches": [torch.randn(4, 3)], **arguments}
    with pytest.raises(error, match=match):
        recalibrate(given.pop("model"), given.pop("batches"), **given)


# --- ranks ---------------------------------------------------------------------------------------------------------


def recalibrate_on_ranks(rank):
    world = torch.distributed.group.WORLD
    batches = uneven((3,))
    plain = recalibrate(nn.BatchNorm1d(3), batches[:3] if rank == 0 else batches[3:], process_group=world)
    empty = recalibrate(nn.BatchNorm1d(3), batches if rank == 0 else [], process_group=world, estimator="algorithm2")
    # Normalizes over the ranks by itself: the second layer's input tells, and no group is named.
    deep = nn.Sequential(*(batchlab.nn.BatchNorm1d(3, process_group=world) for _ in range(2)))
    recalibrate(deep, batches[:2] if rank == 0 else batches[2:])
    model = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="mine" if rank == 0 else "another rank"):
        recalibrate(model, failing_iterator(RuntimeError("mine")) if rank == 0 else batches, process_group=world)
    assert model.running_mean.eq(0).all()
    results = [plain.running_mean, plain.running_var, empty.running_mean, empty.running_var]
    return [t.tolist() for t in [*results, deep[1].running_mean, deep[1].running_var]]


def ranks(rank, address, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    # In a function of its own, so that nothing holds the group when it is destroyed: gloo's
    # threads may abort a process that ends while they still run.
    queue.put((rank, recalibrate_on_ranks(rank)))
    torch.distributed.destroy_process_group()


def test_two_ranks_with_uneven_batches_equal_one_process():
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = mp.spawn(ranks, args=(os.path.join(folder, "store"), queue), nprocs=2, join=False)  # noqa: PTH118
        while not workers.join(timeout=1):
            pass
        results = dict(queue.get() for _ in range(2))
    assert results[0] == results[1]  # bitwise
    batches = uneven((3,))
    mean, var = pooled(batches)
    np.testing.assert_allclose(results[0][0], mean, rtol=1e-6)
    np.testing.assert_allclose(results[0][1], var, rtol=1e-6)
    alone = recalibrate(nn.BatchNorm1d(3), batches, estimator="algorithm2")
    np.testing.assert_allclose(results[0][3], alone.running_var, rtol=1e-6)
    together = [torch.cat([batches[i], batches[i + 2]]) for i in range(2)]
    normalized = [(b - b.mean(0)) / (b.var(0, unbiased=False) + 1e-5).sqrt() for b in together]
    mean, var = pooled(normalized)
    np.testing.assert_allclose(results[0][4], mean, atol=1e-6)
    np.testing.assert_allclose(results[0][5], var, rtol=1e-5)
