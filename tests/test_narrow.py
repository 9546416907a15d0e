"""Slices of a teacher's weights, against views of them."""

from __future__ import annotations

import pytest
import torch
from model_outputs import outputs
from tiny_models import tiny_model

from bertkd import encoders
from bertkd.narrow import SLICEABLE
from bertkd.student import create_student

# Per architecture: where queries, keys, values and the matrix after them are within a block.
ATTENTION = {
    "bert": (
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        "attention.output.dense",
    ),
    "distilbert": (
        ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        "attention.out_lin",
    ),
    "nomic_bert": (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj",
    ),
    "modernbert": (["attn.Wqkv"], "attn.Wo"),
}
for _name in ("camembert", "electra", "ernie", "roberta", "xlm-roberta"):
    ATTENTION[_name] = ATTENTION["bert"]


@pytest.mark.parametrize(("num_heads", "width"), [(4, 4), (2, 8)])
@pytest.mark.parametrize("model_type", SLICEABLE)
def test_narrow_attention_keeps_heads(model_type: str, num_heads: int, width: int) -> None:
    teacher = tiny_model(model_type, layers=3)
    student = create_student(teacher, [0, 2], hidden_size=16, num_heads=num_heads, verbose=False)
    within = list(range(width))
    if model_type in ("modernbert", "nomic_bert") and width == 4:
        # Of the pairs (0, 4), (1, 5), (2, 6), (3, 7) those with the narrower head's frequencies.
        within = [0, 2, 4, 6]
    projections, after = ATTENTION[model_type]
    for i, layer in enumerate([0, 2]):
        ours, theirs = encoders.block_list(student)[i], encoders.block_list(teacher)[layer]
        for path in projections:
            big, small = theirs.get_submodule(path), ours.get_submodule(path)
            heads = big.weight.view(-1, 4, 8, 32)[:, :num_heads, within, :16]
            assert torch.equal(small.weight, heads.reshape(-1, 16))
            if big.bias is not None:
                heads = big.bias.view(-1, 4, 8)[:, :num_heads, within]
                assert torch.equal(small.bias, heads.flatten())
        big, small = theirs.get_submodule(after), ours.get_submodule(after)
        heads = big.weight.view(32, 4, 8)[:16, :num_heads, within]
        assert torch.equal(small.weight, heads.reshape(16, -1))


@pytest.mark.parametrize("model_type", ["modernbert", "nomic_bert"])
def test_narrow_heads_turn_at_the_same_speed(model_type: str) -> None:
    teacher = tiny_model(model_type)
    student = create_student(teacher, "first:2", hidden_size=16, verbose=False)
    before, after = dict(teacher.named_buffers()), dict(student.named_buffers())
    names = [name for name in after if name.endswith("inv_freq")]
    assert names
    for name in names:
        torch.testing.assert_close(after[name], before[name][[0, 2]])


@pytest.mark.parametrize("model_type", SLICEABLE)
def test_dropping_idle_inner_units_changes_nothing(model_type: str) -> None:
    teacher = tiny_model(model_type, head_cls="sequence")
    ends = ("output.dense", "ffn.lin2", "mlp.Wo", "mlp.down_proj")
    with torch.no_grad():
        for block in encoders.block_list(teacher):
            last = [m for n, m in block.named_modules() if n in ends]
            assert len(last) == 1
            last[0].weight[:, 24:] = 0
    student = create_student(
        teacher, "first:2", intermediate_size=24, copy_head=True, verbose=False
    )
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    for ours, theirs in zip(outputs(student), outputs(teacher), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", SLICEABLE)
def test_everything_else_keeps_its_first_coordinates(model_type: str) -> None:
    teacher = tiny_model(model_type, head_cls="sequence", layers=1)
    student = create_student(
        teacher, "first:1", hidden_size=24, num_heads=3, copy_head=True, verbose=False
    )
    big, stacked = teacher.state_dict(), ("Wqkv", "Wi")
    seen = 0
    for name, small in student.state_dict().items():
        if any(part in name for part in stacked):
            continue
        corner = tuple(slice(size) for size in small.shape)
        assert torch.equal(small, big[name][corner]), name
        seen += small.shape != big[name].shape
    assert seen > 5
    assert all(t.isfinite().all() for t in outputs(student))


def test_modernbert_stacked_feed_forward() -> None:
    teacher = tiny_model("modernbert")
    student = create_student(
        teacher, "first:2", hidden_size=16, intermediate_size=20, verbose=False
    )
    big = teacher.layers[1].mlp.Wi.weight.view(2, 64, 32)
    assert torch.equal(student.layers[1].mlp.Wi.weight, big[:, :20, :16].reshape(40, 16))


def test_electra_embeddings_as_wide_as_its_blocks(tmp_path) -> None:
    teacher = tiny_model("electra", embedding_size=32, head_cls="sequence")
    student = create_student(teacher, "first:1", hidden_size=16, verbose=False)
    assert student.config.embedding_size == 16
    assert not hasattr(student.electra, "embeddings_project")


def test_unset_sizes_stay_the_teachers() -> None:
    teacher = tiny_model("distilbert")
    spec = encoders.describe(create_student(teacher, "first:1", hidden_size=16, verbose=False))
    assert (spec.hidden_size, spec.num_heads, spec.head_dim) == (16, 4, 4)
    inner = create_student(teacher, "first:1", intermediate_size=20, verbose=False)
    assert inner.config.hidden_dim == 20
    assert encoders.describe(inner).hidden_size == 32


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"hidden_size": 64}, "hidden_size must be from 1 to the teacher's 32, got 64"),
        ({"hidden_size": 0}, "hidden_size must be from 1 to the teacher's 32, got 0"),
        ({"num_heads": 8}, "num_heads must be from 1 to the teacher's 4, got 8"),
        ({"intermediate_size": 65}, "intermediate_size must be from 1 to the teacher's 64"),
        ({"hidden_size": 18}, "hidden_size must be divisible by num_heads"),
        ({"num_heads": 2}, "wider than the teacher's 8: use num_heads=4"),
        ({"hidden_size": 24, "num_heads": 2}, "wider than the teacher's 8: use num_heads=3"),
    ],
)
def test_widths_that_cannot_be(widths: dict[str, int], message: str) -> None:
    for model_type in ("bert", "distilbert", "nomic_bert"):
        with pytest.raises(ValueError, match=message):
            create_student(tiny_model(model_type), "first:1", **widths)


def test_widths_of_rotary_heads() -> None:
    for hidden_size in (24, 12):
        with pytest.raises(ValueError, match="even and divide the teacher's 8: num_heads="):
            create_student(tiny_model("modernbert"), "first:1", hidden_size=hidden_size)


@pytest.mark.parametrize("model_type", ["albert", "mobilebert"])
def test_architectures_that_cannot_be_sliced(model_type: str) -> None:
    teacher = tiny_model(model_type)
    for widths in ({"hidden_size": 16}, {"num_heads": 2}, {"intermediate_size": 8}):
        with pytest.raises(ValueError, match=f"narrower '{model_type}' cannot be sliced"):
            create_student(teacher, "first:1", **widths)
