"""A Distiller in DistributedDataParallel or sharded by FSDP, and a student in either."""

from __future__ import annotations

import pytest
import torch
from test_distiller import BOTH, gradients, models
from tiny_models import tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bertkd.distiller import Distiller
from bertkd.training import Supervised


def test_ddp_wraps_student_and_projections_and_gives_the_same_gradients(process_group):
    teacher, student = models(hidden=16)
    distiller = Distiller(teacher, student, BOTH)
    batch = tiny_batch(teacher)
    distiller(batch).loss.backward()
    alone = gradients(distiller)
    wrapped = DistributedDataParallel(distiller, find_unused_parameters=True)
    for _ in range(2):  # a parameter left out of the reduction shows at the second step
        distiller.zero_grad()
        wrapped(batch).loss.backward()
    torch.testing.assert_close(gradients(distiller), alone)


def test_ddp_needs_no_search_for_unused_parameters_where_logits_are_used(process_group):
    teacher, student = models("sequence")
    distiller = Distiller(teacher, student, f"{BOTH} + kd")
    assert distiller.uses_student_logits
    wrapped = DistributedDataParallel(distiller)
    for _ in range(2):
        wrapped(tiny_batch(teacher, labels=True)).loss.backward()


@pytest.mark.parametrize("supervised", [False, True])
def test_a_static_graph_exchanges_gradients(process_group, supervised):
    """Only tensors that DDP finds in the output tell it when a backward has ended."""
    teacher, student = models("sequence")
    module = Supervised(student) if supervised else Distiller(teacher, student, f"{BOTH} + kd")
    wrapped, exchanged = DistributedDataParallel(module, static_graph=True), []

    def exchange(state, bucket):
        exchanged.append(sum(x.numel() for x in bucket.gradients()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, exchange)
    batch = tiny_batch(teacher, labels=True)
    for step in (1, 2):
        wrapped(batch).loss.backward()
        assert sum(exchanged) == step * sum(p.numel() for p in student.parameters())


def test_a_student_in_ddp_is_refused_where_its_output_is_not_used(process_group):
    teacher, student = models("sequence")
    wrapped = DistributedDataParallel(student)
    with pytest.raises(ValueError, match="wrap the Distiller instead"):
        Distiller(teacher, wrapped, BOTH)
    distiller = Distiller(teacher, wrapped, f"{BOTH} + kd")
    for _ in range(2):
        distiller(tiny_batch(teacher, labels=True)).loss.backward()


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_a_student_in_ddp_may_end_in_a_state_that_is_read(process_group, model_type):
    teacher, student = tiny_model(model_type, layers=4), tiny_model(model_type, seed=1)
    if model_type == "bert":
        with pytest.raises(ValueError, match="wrap the Distiller instead"):
            Distiller(teacher, DistributedDataParallel(student), "hid_seq")
        student.pooler.requires_grad_(False)
    wrapped = DistributedDataParallel(student)
    distiller = Distiller(teacher, wrapped, "hid_seq")
    for _ in range(2):
        distiller(tiny_batch(teacher)).loss.backward()
    for model, term in (
        (wrapped, "att_kl"),
        (DistributedDataParallel(student, static_graph=True), "hid_seq"),
    ):
        with pytest.raises(ValueError, match="wrap the Distiller instead"):
            Distiller(teacher, model, term)


# What is sharded, each in a call of its own; a list in one.
SHARDS = {
    "blocks": lambda d: [*d.student.bert.encoder.layer],
    "blocks and student": lambda d: [*d.student.bert.encoder.layer, d.student],
    "blocks and distiller": lambda d: [*d.student.bert.encoder.layer, d],
    "student": lambda d: [d.student],
    "attention": lambda d: [*(x.attention for x in d.student.bert.encoder.layer), d.student],
    "blocks as one": lambda d: [[*d.student.bert.encoder.layer], d.student],
    "encoder": lambda d: [d.student.bert.encoder, d],
}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("objective", ["att_kl + val_kl", "qkv_kl(student_block=0)", BOTH, "pkd"])
def test_a_sharded_student_has_the_same_gradients(objective, shards, process_group):
    """FSDP goes by the outputs of modules, while terms may read nothing but the inside of some."""
    teacher, student = models("sequence")
    distiller = Distiller(teacher, student, objective)
    batch = tiny_batch(teacher)
    expected = distiller(batch)
    expected.loss.backward()
    alone = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    distiller.zero_grad(set_to_none=True)
    mesh = init_device_mesh("cpu", (1,))
    for modules in SHARDS[shards](distiller):
        fully_shard(modules, mesh=mesh, reshard_after_forward=True)
    for _ in range(2):
        distiller.zero_grad(set_to_none=True)
        got = distiller(batch)
        got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    sharded = {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    for name, grad in sharded.items():
        # What lies behind the last thing read gets zeros.
        torch.testing.assert_close(grad, alone.get(name, torch.zeros_like(grad)))
    assert sharded.keys() >= alone.keys()


def full(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad
