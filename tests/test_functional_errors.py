"""Wrong input to the losses: each error names the argument, what it got and what to do."""

import pytest
import torch

from bertkd import functional, modules

Q = torch.randn(2, 4, 6, 8)
H = torch.randn(2, 6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: functional.attention_kl(Q, Q, Q, Q[0]),
            r"k_t must have 4 dimensions.*unflatten\(-1, \(heads, -1\)\)",
        ),
        (
            lambda: functional.attention_kl(Q, Q.long(), Q, Q),
            "k_s must be floating point, got torch.int64",
        ),
        (lambda: functional.attention_kl(Q, 1.0, Q, Q), "k_s must be a tensor, got float"),
        (
            lambda: functional.attention_kl(Q, [Q], Q, Q),
            "attention_kl: .* got a tensor for q_s, a sequence of 1 for k_s",
        ),
        (
            lambda: functional.attention_mse([Q, Q], [Q, Q], [Q], [Q]),
            "q_s, k_s, q_t, k_t must all be tensors, .* of 2 for k_s, a sequence of 1 for q_t",
        ),
        (lambda: functional.attention_kl([], [], [], []), "got a sequence of 0"),
        (
            lambda: functional.attention_kl([Q, Q], [Q, None], [Q, Q], [Q, Q]),
            r"k_s\[1\] must be a tensor, got NoneType",
        ),
        (
            lambda: functional.attention_kl([Q, Q], [Q, Q], [Q, Q[..., :4]], [Q, Q[..., :4]]),
            r"one shape, got .* for q_t\[0\] and .* for q_t\[1\]",
        ),
        (
            lambda: functional.attention_kl([Q, Q], [Q, Q], [Q, Q], [Q, Q], reduction="none"),
            "takes one block per call, got 2",
        ),
        (
            lambda: functional.attention_kl(Q, Q[..., :4], Q, Q),
            "attention_kl: q_s and k_s must have one shape",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q[:, :2], Q[:, :2]),
            "4 heads and the teacher 2. Pass relation_heads",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q[:, :, :3], Q[:, :, :3]),
            "same batch from the same tokenizer",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, torch.ones(2, 1, 1, 6)),
            r"mask must have shape \(2, 6\)",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, row_weight=torch.ones(6)),
            "row_weight must have shape",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, relation_heads=5),
            "relation_heads=5 does not divide",
        ),
        (lambda: functional.attention_kl(Q, Q, Q, Q, reduction="avg"), "reduction must be one of"),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, temperature=0),
            "temperature must be positive",
        ),
        (
            lambda: functional.attention_mse(Q, Q, Q, Q.to("meta")),
            "k_t on meta. Move them to one device",
        ),
        (lambda: functional.hidden_mse(H, H[..., :4]), r"Pass weight of shape \(4, 8\)"),
        (
            lambda: functional.hidden_mse(H, H, weight=torch.ones(4, 8)),
            r"weight must have shape \(d_t, d_s\)",
        ),
        (lambda: functional.hidden_mse(H, H, bias=torch.ones(8)), "bias needs weight"),
        (lambda: functional.hidden_mse([H, H], [H]), "2 student states but 1 teacher states"),
        (
            lambda: functional.hidden_mse([H, H], [H, H], reduction="none"),
            "take one state per call",
        ),
        (lambda: functional.hidden_mse(H, H[:, :4]), "feed both networks the same batch"),
        (lambda: functional.hidden_cosine(H, H[..., :4]), "Project one of them first"),
        (lambda: functional.hidden_combine_mse([], [H], H[0]), "h_s is empty"),
        (
            lambda: functional.hidden_combine_mse([H], [H], torch.ones(3, 3)),
            r"weight must have shape \(8, 8\)",
        ),
        (lambda: functional.softmax_kl(H, H[..., :4]), "same labels"),
        (lambda: functional.softmax_kl(H, H, torch.ones(2)), "mask must have shape"),
        (
            lambda: functional.softmax_kl(H, H, torch.zeros(2, 6)),
            r"mask must be bool or integer, .* if it is an additive one, mask == 0",
        ),
        (
            lambda: functional.value_relation_kl([Q, Q], Q),
            "value_relation_kl: v_s, v_t must all be .* got a sequence of 2 for v_s, a tensor for v_t",
        ),
        (
            lambda: functional.attention_kl(None, Q, Q, Q),
            "attention_kl: q_s must be a tensor, got NoneType",
        ),
        (lambda: functional.attention_kl(*[Q[..., :0]] * 4), "dimension of q_s must be at least 1"),
        (
            lambda: functional.softmax_kl(H[0, 0, 0], H[0, 0, 0]),
            "dimension of z_s must be at least",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, relation_heads=2.0),
            r"attention_kl: relation_heads must be a whole number, got 2\.0",
        ),
        (
            lambda: functional.softmax_kl(H, H, temperature=torch.tensor(2.0)),
            r"temperature must be a number, got a tensor; pass float\(temperature\)",
        ),
        (
            lambda: functional.softmax_kl(H, H, temperature=float("inf")),
            "temperature must be finite, got inf",
        ),
        (
            lambda: functional.attention_mse(Q, Q, Q, Q, scale_t="8"),
            "scale_t must be a number, got str",
        ),
        (
            lambda: modules.AttentionKL(temprature=2.0),
            "unknown option of AttentionKL 'temprature'. Did you mean 'temperature'",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, temprature=2.0),
            "unknown option of attention_kl 'temprature'. Did you mean 'temperature'",
        ),
        (
            lambda: functional.value_relation_kl(Q, Q, heads=2),
            "unknown option of value_relation_kl 'heads'. Did you mean 'relation_heads'",
        ),
        (
            lambda: functional.linear_kl(H, torch.ones(5, 4), H, torch.ones(5, 8)),
            "w_s .* does not take h_s of width 8",
        ),
        (lambda: functional.linear_kl(H, torch.ones(5, 8), H, torch.ones(6, 8)), "one vocabulary"),
        (lambda: functional.linear_kl(H, H[0, :0], H, H[0, :0]), "w_s and w_t have no rows"),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, min_prob=2.0),
            r"attention_kl: min_prob must lie between 0 and 1, got 2\.0",
        ),
        (
            lambda: functional.attention_kl(Q, Q, Q, Q, min_prob="1e-7"),
            "min_prob must be a number, got str",
        ),
        (
            lambda: functional.attention_mse(Q, Q, Q, Q, min_score=True),
            "attention_mse: min_score must be a number, got bool",
        ),
        (
            lambda: functional.hidden_mse(H[0], H[0], row_weight=torch.ones(3)),
            r"row_weight must have shape \(6,\), got \(3,\)",
        ),
        (lambda: modules.HiddenMSE(4, 8, project=False), "needs equal widths"),
        (lambda: modules.HiddenMSE(4, 8, project="yes"), "project must be True, False or 'auto'"),
    ],
)
def test_message(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_dtensor_is_refused(process_group):
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(torch.randn(8, 8), mesh)
    assert isinstance(sharded, DTensor)
    with pytest.raises(TypeError, match=r"weight is a DTensor.*full_tensor"):
        functional.hidden_mse(H, H, weight=sharded)
    rows = distribute_tensor(torch.ones(H.shape[:2]), mesh)
    with pytest.raises(TypeError, match=r"row_weight is a DTensor.*full_tensor"):
        functional.hidden_mse(H, H, row_weight=rows)
    with pytest.raises(TypeError, match=r"mask is a DTensor.*full_tensor"):
        functional.hidden_mse(H, H, rows.bool())


def test_modules_own_what_they_need_and_keep_their_options():
    module = modules.HiddenMSE(8, 4, reduction="sum")
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 8)]
    teacher = torch.randn(2, 6, 4)
    expected = functional.hidden_mse(H, teacher, weight=module.projection.weight, reduction="sum")
    torch.testing.assert_close(module(H, teacher), expected)
    assert modules.HiddenMSE(8, 8).projection is None
    kl = modules.AttentionKL(temperature=2.0, impl="eager")
    torch.testing.assert_close(
        kl(Q, Q, Q * 2, Q), functional.attention_kl(Q, Q, Q * 2, Q, temperature=2.0)
    )
    assert "temperature=2.0" in repr(kl)
