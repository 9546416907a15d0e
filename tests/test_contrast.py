"""All contrasts: values against float64 loops, resuming, gradients, refusals, two processes."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrast_checks import D_S, D_T, DIM, N, features, gradient, unit
from torch import Tensor, nn

from bertkd.contrast import InBatchContrast, MemoryBankContrast, QueueContrast


def make(kind: str, seed: int = 0):
    if kind == "bank":
        return MemoryBankContrast(N, D_S, D_T, dim=DIM, negatives=6, seed=seed)
    if kind == "queue":
        return QueueContrast(D_S, D_T, 12, dim=DIM, seed=seed)
    return InBatchContrast(D_S, D_T, dim=DIM, seed=seed)


KINDS = ["bank", "queue", "batch"]


def run(module: nn.Module, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        f_s, f_t = features(seed=step)
        index = torch.arange(5) * 3 + step % 5
        losses.append(module(f_s, f_t, index=index, labels=index % 2).detach())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_resume_continues_bit_for_bit(kind: str) -> None:
    module = make(kind)
    run(module, range(3))
    saved = copy.deepcopy(module.state_dict())
    expected = run(module, range(3, 7))
    again = make(kind, seed=99)
    again.load_state_dict(saved)
    torch.manual_seed(123)
    assert run(again, range(3, 7)) == expected
    assert run(copy.deepcopy(again), range(7, 9)) == run(module, range(7, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(make(kind), range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert run(make(kind), range(2)) == first
    assert run(make(kind, seed=1), range(2)) != first


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(kind: str) -> None:
    module = make(kind)
    run(module, range(2))
    module.eval()
    before = copy.deepcopy(module.state_dict())
    first = run(module, range(2, 4))
    assert run(module, range(2, 4)) == first
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_stop_at_the_teacher(kind: str) -> None:
    module = make(kind)
    run(module, range(2))
    f_s, f_t = features()
    f_t.requires_grad_()
    module(f_s, f_t, index=torch.arange(5)).backward()
    assert f_t.grad is None
    assert f_s.grad is not None
    assert f_s.grad.any()
    names = {name for name, _ in module.named_parameters()}
    assert names == {"embed_s.weight", "embed_s.bias", "embed_t.weight", "embed_t.bias"}
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_costs_less_than_chance(kind: str) -> None:
    if kind == "bank":
        module = MemoryBankContrast(50, D_S, D_S, dim=DIM, negatives=20)
    elif kind == "queue":
        module = QueueContrast(D_S, D_S, 64, dim=DIM)
    else:
        module = InBatchContrast(D_S, D_S, dim=DIM)
    module.embed_t.load_state_dict(module.embed_s.state_dict())
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(50, D_S, generator=generator)
    for _ in range(3):
        module(f, f, index=torch.arange(50))
    module.eval()
    same = module(f, f, index=torch.arange(50))
    other = module(f, f.roll(1, 0), index=torch.arange(50))
    assert same < other - 1


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_features_are_computed_in_fp32(kind: str) -> None:
    f_s, f_t = features()
    index = torch.arange(5)
    for dtype in (torch.float16, torch.bfloat16):
        low_s, low_t = f_s.detach().to(dtype), f_t.to(dtype)
        expected = make(kind)(low_s.float(), low_t.float(), index=index)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = make(kind)(low_s, low_t, index=index)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


def naive_nce(
    v: Tensor, keys: Tensor, allowed: list[list[bool]], own: list[int], temperature: float
) -> Tensor:
    loss = 0.0
    for i, positive in enumerate(own):
        scores = [v[i] @ key / temperature for key in keys]
        total = sum(torch.exp(s) for s, ok in zip(scores, allowed[i], strict=True) if ok)
        loss = loss - torch.log(torch.exp(scores[positive]) / total)
    return loss / len(own)


@pytest.mark.parametrize(
    ("index", "labels"),
    [
        (None, None),
        (None, [0, 1, 0, 2, 1]),
        ([4, 5, 4, 6, 7], None),
        ([4, 5, 4, 6, 7], [0, 1, 2, 2, 3]),
        (None, [0.1, 0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_batch_against_loops(index: list[int] | None, labels: list | None) -> None:
    module = InBatchContrast(D_S, D_T, dim=DIM, temperature=0.2)
    f_s, f_t = features()
    loss = module(
        f_s,
        f_t,
        index=None if index is None else torch.tensor(index),
        labels=None if labels is None else torch.tensor(labels),
    )
    keys = [key for key in (index, labels) if key is not None and isinstance(key[0], int)]
    allowed = [[i == j or all(k[i] != k[j] for k in keys) for j in range(5)] for i in range(5)]
    v_s, v_t = unit(module.embed_s, f_s), unit(module.embed_t, f_t)
    own = list(range(5))
    expected = naive_nce(v_s, v_t, allowed, own, 0.2) + naive_nce(v_t, v_s, allowed, own, 0.2)
    torch.testing.assert_close(loss.double(), expected / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(loss, f_s), gradient(expected / 2, f_s), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("batches", [[3, 3, 3, 3, 3], [1, 2, 5, 1, 4], [9, 2, 8]])
def test_queue_against_a_deque(batches: list[int], with_labels: bool, with_index: bool) -> None:
    module = QueueContrast(D_S, D_T, 7, dim=DIM, temperature=0.2)
    torch.testing.assert_close(module.queue.norm(dim=1), torch.ones(7))
    past = deque(((key, None, None) for key in module.queue.double().clone()), maxlen=7)
    for step, batch in enumerate(batches):
        f_s, f_t = features(batch, seed=step)
        # One batch without: its keys must not keep the numbers of those they replace.
        index = [(step + 2 * i) % 9 for i in range(batch)] if with_index and step != 2 else None
        labels = [(step + i) % 3 for i in range(batch)] if with_labels and step != 2 else None
        loss = module(
            f_s,
            f_t,
            index=None if index is None else torch.tensor(index),
            labels=None if labels is None else torch.tensor(labels),
        )
        v_s, v_t = unit(module.embed_s, f_s), unit(module.embed_t, f_t)
        nones = [None] * batch
        current = list(zip(v_t, index or nones, labels or nones, strict=True))
        entries = current + list(past)
        allowed = [
            [
                j == i or not ((index and a == e[1]) or (labels and c == e[2]))
                for j, e in enumerate(entries)
            ]
            for i, (_, a, c) in enumerate(current)
        ]
        keys = torch.stack([e[0] for e in entries])
        expected = naive_nce(v_s, keys, allowed, list(range(batch)), 0.2)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            gradient(loss, f_s), gradient(expected, f_s), rtol=1e-4, atol=1e-6
        )
        past.extend(current)
        oldest = int(module.oldest)
        order = [*range(oldest, 7), *range(oldest)]
        torch.testing.assert_close(module.queue[order].double(), torch.stack([e[0] for e in past]))


def test_what_cannot_work_is_refused() -> None:
    f_s, f_t = features()
    index = torch.arange(5)
    for kind in KINDS:
        module = make(kind)
        with pytest.raises(ValueError, match=r"f_s must be \(B, 6\) .* got \(5, 10\)"):
            module(f_t, f_t, index=index)
        with pytest.raises(ValueError, match=r"f_t must be \(B, 10\) .* got \(5, 1, 10\)"):
            module(f_s, f_t[:, None], index=index)
        with pytest.raises(ValueError, match="f_s has 5 examples but f_t has 4"):
            module(f_s, f_t[:4], index=index)
        with pytest.raises(ValueError, match=r"labels must be one integer .* got \(5, 3\)"):
            module(f_s, f_t, index=index, labels=torch.zeros(5, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="labels must not be negative, got -100; leave it"):
            module(f_s, f_t, index=index, labels=index - 100)
        with pytest.raises(ValueError, match=r"index must be one integer .* got \(4,\)"):
            module(f_s, f_t, index=index[:4])
        with pytest.raises(ValueError, match="index must not be negative, got -1"):
            module(f_s, f_t, index=index - 1)
        with pytest.raises(ValueError, match=r"f_s must be \(B, 6\) with B >= 1"):
            module(f_s[:0], f_t[:0], index=index[:0])
    with pytest.raises(ValueError, match=r"index 20 is out of range: .* num_examples=20, numbered"):
        make("bank")(f_s, f_t, index=index + 16)
    with pytest.raises(ValueError, match=r"index is missing: .*QueueContrast and InBatch"):
        make("bank")(f_s, f_t)


def test_a_batch_of_one_has_no_negatives_but_in_the_queue() -> None:
    f_s, f_t = features(1)
    with pytest.warns(UserWarning, match="batch of 1 has no negatives, .* use larger batches"):
        loss = make("batch")(f_s, f_t)
    assert loss == 0
    assert not gradient(loss, f_s).any()
    assert make("queue")(f_s, f_t) > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MemoryBankContrast(1, 2, 2), "num_examples must be at least 2, got 1"),
        (lambda: MemoryBankContrast(5, 2, 2, negatives=0), "negatives must be at least 1"),
        (lambda: MemoryBankContrast(5, 2, 2, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: MemoryBankContrast(5, 0, 2), "d_s must be at least 1, got 0"),
        (lambda: InBatchContrast(2, 0), "d_t must be at least 1, got 0"),
        (lambda: InBatchContrast(2, 2, temperature=0.0), "temperature must be positive"),
        (lambda: QueueContrast(2, 2, dim=0), "dim must be at least 1"),
        (lambda: QueueContrast(2, 2, 0), "queue_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: MemoryBankContrast(5.0, 2, 2), "num_examples"),
        (lambda: MemoryBankContrast(5, 2, 2, negatives="9"), "negatives"),
        (lambda: QueueContrast(2, 2, True), "queue_size"),
        (lambda: InBatchContrast(2, 2, dim=1.5), "dim"),
    ],
)
def test_sizes_are_whole_numbers(build, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a whole number"):
        build()


def _two_ranks(rank: int, store: str, cut: int) -> None:
    """Compare each rank's part of a batch with the whole batch in one process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(cut, 8) if rank else slice(cut)
    f_s, f_t = (f.detach() for f in features(8))
    index, labels = torch.arange(8) * 2, torch.arange(8) % 3
    parts = {"index": index[mine], "labels": labels[mine]}

    local = make("batch")
    loss = local(f_s[mine], f_t[mine], **parts)
    loss.backward()
    bank, queue = make("bank"), make("queue")
    first = bank._draw_negatives(index[:2], None)
    bank(f_s[mine], f_t[mine], **parts)
    queue(f_s[mine], f_t[mine], **parts)
    scores = torch.stack([f_s, -3 * f_s])
    log_z = make("bank")._normalisers(scores[:, mine], [cut, 8 - cut])
    gradients = torch.cat([p.grad.flatten() for p in local.parameters()])
    dist.all_reduce(gradients)
    seen = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(seen, first)
    states = [t.double().flatten() for m in (bank, queue) for t in m.buffers()]
    states = [torch.cat(states), torch.empty(sum(len(s) for s in states), dtype=torch.double)]
    other = states[0].clone()
    dist.broadcast(other, src=0)
    # Without a process group, InBatchContrast sees no other ranks.
    dist.destroy_process_group()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(states[0], other)

    torch.testing.assert_close(log_z, make("bank")._normalisers(scores, [8]))
    whole = make("batch")
    expected = whole(f_s, f_t, index=index, labels=labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients / 2, torch.cat([p.grad.flatten() for p in whole.parameters()])
    )
    for module, gathered in ((make("bank"), bank), (make("queue"), queue)):
        module(f_s, f_t, index=index, labels=labels)
        for name in ("memory_s", "memory_t", "labels", "queue", "queue_index", "queue_labels"):
            if hasattr(module, name):
                torch.testing.assert_close(getattr(gathered, name), getattr(module, name))
        assert module.state_dict().keys() == gathered.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 5])
def test_two_processes_see_one_batch(tmp_path, cut: int) -> None:
    mp.spawn(_two_ranks, args=(str(tmp_path / "store"), cut), nprocs=2)
