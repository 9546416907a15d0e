"""The CUDA kernels themselves, run lane by lane on a CPU, against the float64 reference."""

import os
import sys
from pathlib import Path

import cuda_cases
import pytest
import torch

from bertkd.ops import cuda, tensors
from bertkd.ops.cuda import library, limits, relation_kl, rows

# build_support is no part of the package: it lies beside it.
sys.path.insert(0, str(Path(__file__).parent.parent))
import cuda_emulated

from build_support import toolchain

pytestmark = pytest.mark.slow

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    # Workers of pytest-xdist have neighbouring base folders.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    # For example BERTKD_EMULATED_FLAGS="-fsanitize=undefined -fno-sanitize-recover=undefined".
    flags = os.environ.get("BERTKD_EMULATED_FLAGS", "").split()
    try:
        return cuda_emulated.load(cuda_emulated.build(shared / "emulated", flags))
    except toolchain.Missing as error:
        pytest.skip(f"the emulated kernels cannot be built: {error}")


@pytest.fixture(autouse=True)
def on_a_cpu(emulated, monkeypatch):
    """The launchers find the emulated kernels, a stream that is none, and memory full of NaN."""
    for module in (library, relation_kl, rows, limits):
        monkeypatch.setattr(module, "kernels", lambda: emulated.cuda)
    monkeypatch.setattr(library, "stream", lambda x: 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("shape", "width_s", "width_t"),
    [
        ((1, 1, 1), 16, 16),
        ((4, 2, 7), 16, 24),
        ((4, 1, 16), 32, 16),
        ((4, 2, 17), 24, 40),
        ((4, 1, 63), 64, 32),
        ((4, 1, 64), 32, 64),
        ((4, 1, 65), 40, 16),
        ((4, 1, 100), 32, 128),
        ((4, 2, 128), 64, 64),
        ((1, 1, 128), 128, 128),
    ],
)
def test_relation_kl(shape, width_s, width_t, dtype, poisoned):
    cuda_cases.check_relation(shape, width_s, width_t, dtype, seed=shape[2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("shape", "width_s", "width_t"),
    [((4, 2, 9), 16, 32), ((4, 1, 50), 40, 24), ((4, 1, 81), 64, 64), ((1, 2, 128), 32, 128)],
)
def test_self_relation_kl(shape, width_s, width_t, dtype, poisoned):
    cuda_cases.check_self_relation(shape, width_s, width_t, dtype, seed=shape[2])


def test_relation_kl_without_mask_and_with_one_weight_for_all(poisoned):
    cuda_cases.check_relation((2, 2, 33), 32, 16, torch.bfloat16, masked=False)
    student, teacher, _ = cuda_cases.attention_inputs((2, 2, 33), 16, 16, torch.float16)
    weight = torch.full((1, 1, 1), 0.5)
    args = (*student, *teacher, None, 0.2, 0.2)
    expanded = cuda.relation_kl_fwd_bwd(weight.expand(2, 2, 33), *args)
    whole = cuda.relation_kl_fwd_bwd(torch.full((2, 2, 33), 0.5), *args)
    assert all(torch.equal(x, y) for x, y in zip(expanded, whole, strict=True))


def test_tiny_weights_do_not_vanish_in_fp16(poisoned):
    student, teacher, _ = cuda_cases.attention_inputs((1, 1, 40), 32, 32, torch.float16)
    args = (*student, *teacher, None, 0.3, 0.3)
    one = cuda.relation_kl_fwd_bwd(torch.ones(1, 1, 40), *args)
    small = cuda.relation_kl_fwd_bwd(torch.full((1, 1, 40), 2.0**-8), *args)
    for x, y in zip(one[1:], small[1:], strict=True):
        torch.testing.assert_close(y.float() * 2.0**8, x.float(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("length", [40, 128])
def test_pads_and_unweighted_rows_are_not_read(length, poisoned):
    """NaN in a pad's key and in a query without weight reaches nothing."""
    shape, dtype = (3, 1, length), torch.bfloat16
    student, teacher, mask = cuda_cases.attention_inputs(shape, 32, 32, dtype)
    weight = cuda_cases.weights_of(shape, mask, seed=5, device="cpu")
    clean = cuda.relation_kl_fwd_bwd(weight, *student, *teacher, mask, 0.2, 0.3)
    nan = float("nan")
    for queries, keys in (student, teacher):
        queries.masked_fill_((weight == 0)[..., None], nan)
        keys.masked_fill_(~mask[:, None, :, None], nan)
    dirty = cuda.relation_kl_fwd_bwd(weight, *student, *teacher, mask, 0.2, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert all(grad.abs().sum() > 0 for grad in dirty[1:])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [20, 100])
def test_equal_networks_give_exactly_zero(dtype, length, poisoned):
    student, _, mask = cuda_cases.attention_inputs((4, 2, length), 32, 32, dtype)
    weight = cuda_cases.weights_of((4, 2, length), mask, seed=1, device="cpu")
    for result in cuda.relation_kl_fwd_bwd(weight, *student, *student, mask, 0.3, 0.3):
        assert (result == 0).all()
    assert (cuda.relation_kl_rows(*student, *student, mask, 0.3, 0.3) == 0).all()
    for result in cuda.self_relation_kl_fwd_bwd(weight, student[0], student[0], mask, 0.3, 0.3):
        assert (result == 0).all()
    z = cuda_cases.matrix(5, 100, dtype)
    assert all((x == 0).all() for x in cuda.softmax_kl_fwd_bwd(torch.ones(5), z, z, 1.0))


def test_results_do_not_depend_on_the_order_in_which_threads_run(poisoned):
    student, teacher, mask = cuda_cases.attention_inputs((2, 2, 90), 32, 64, torch.bfloat16)
    weight = cuda_cases.weights_of((2, 2, 90), mask, seed=1, device="cpu")
    args = (weight, *student, *teacher, mask, 0.2, 0.2)
    # The emulator goes on shuffling: no two runs have one order.
    first, second = cuda.relation_kl_fwd_bwd(*args), cuda.relation_kl_fwd_bwd(*args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nothing_is_written_beside_the_gradients():
    student, teacher, mask = cuda_cases.attention_inputs((2, 2, 21), 24, 16, torch.float16)
    weight = cuda_cases.weights_of((2, 2, 21), mask, seed=1, device="cpu")
    room = [torch.full((2, 25, 4, 40), 7.0, dtype=torch.float16) for _ in range(2)]
    grads = [x[:, 2:23, 1:3, 8:32].transpose(1, 2) for x in room]
    args = (weight, *student, *teacher, mask, 0.2, 0.2)
    relation_kl._fwd_bwd("relation_kl", *args, grads)
    want = cuda.relation_kl_fwd_bwd(*args)[1:]
    for whole, grad, right in zip(room, grads, want, strict=True):
        assert torch.equal(grad, right)
        grad.fill_(7.0)
        assert (whole == 7.0).all()


@pytest.mark.parametrize("dtypes", [(s, t) for s in FLOATS for t in FLOATS])
@pytest.mark.parametrize("width", [1, 2, 9, 300])
def test_softmax_kl_of_narrow_rows(width, dtypes, poisoned):
    cuda_cases.check_softmax(6, width, dtypes)


@pytest.mark.parametrize("dtypes", [(s, t) for s in FLOATS for t in FLOATS])
def test_softmax_kl_of_wide_rows(dtypes, poisoned):
    cuda_cases.check_softmax(5, 1031, dtypes)


@pytest.mark.parametrize("shared", [232448, 2048])
def test_softmax_kl_of_a_vocabulary_in_shared_memory_and_not(shared, monkeypatch, poisoned):
    monkeypatch.setenv("BERTKD_EMULATED_SHARED", str(shared))
    cuda_cases.check_softmax(3, 30522, (torch.bfloat16, torch.bfloat16))
    cuda_cases.check_softmax(2, 8200, (torch.float16, torch.float32))


@pytest.mark.parametrize("offset", [1, 3, 7, 8])
@pytest.mark.parametrize("gap", [0, 1, 6])
def test_softmax_kl_of_rows_at_any_address(offset, gap, poisoned):
    cuda_cases.check_softmax(5, 60, (torch.bfloat16, torch.float32), offset=offset, gap=gap)


def test_softmax_kl_may_overwrite_its_logits(emulated):
    z_s, z_t = cuda_cases.matrix(4, 1500, torch.float16), cuda_cases.matrix(4, 1500, torch.float32)
    weight = cuda_cases.row_weights(4)
    loss, grad = cuda.softmax_kl_fwd_bwd(weight, z_s, z_t, 2.0)
    again, work = torch.empty(()), library.workspace(z_s, 4)
    emulated.cuda.softmax_kl_fwd_bwd(
        4,
        (weight.data_ptr(), 1),
        tensors.rows(z_s),
        tensors.rows(z_t),
        2.0,
        again.data_ptr(),
        tensors.rows(z_s),
        library.launch(work),
    )
    assert torch.equal(again, loss)
    assert torch.equal(z_s, grad)


@pytest.mark.parametrize("dtypes", [(s, t) for s in FLOATS for t in FLOATS])
@pytest.mark.parametrize(("states", "width"), [(1, 40), (3, 37)])
def test_hidden_mse(states, width, dtypes, poisoned):
    cuda_cases.check_hidden(states, 11, width, dtypes)


def test_hidden_mse_of_more_states_than_a_launch_takes(poisoned):
    cuda_cases.check_hidden(35, 9, 16, (torch.bfloat16, torch.float32))


@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (3, 5), (8, 8)])
def test_hidden_mse_of_rows_at_any_address(offset, gap, poisoned):
    cuda_cases.check_hidden(2, 9, 50, (torch.float16, torch.float32), offset=offset, gap=gap)


def test_no_rows_at_all(poisoned):
    empty = torch.empty(0, 8)
    loss, grad = cuda.softmax_kl_fwd_bwd(torch.empty(0), empty, empty, 1.0)
    assert loss == 0
    assert grad.shape == (0, 8)
    loss, _ = cuda.hidden_mse_fwd_bwd(torch.empty(0), [empty], [empty])
    assert loss == 0
    heads = torch.empty(0, 2, 5, 16, dtype=torch.float16)
    loss, *_ = cuda.relation_kl_fwd_bwd(torch.empty(0, 2, 5), *[heads] * 4, None, 1.0, 1.0)
    assert loss == 0


def test_layout_has_no_bank_conflicts_and_no_overlaps(emulated):
    for length in (1, 16, 17, 64, 100, 128):
        for width_s in range(16, 129, 8):
            for width_t in (16, 64, 128):
                for of_itself in (False, True):
                    at = emulated.layout(length, width_s, width_t, of_itself, True)
                    _check_layout(at, length, width_s, width_t, of_itself)


def test_a_head_of_bert_fits_every_gpu(emulated):
    """Shared memory of a block, in KiB: 99 on sm_86, sm_89 and sm_120, 163 on sm_80."""
    for of_itself in (False, True):
        assert emulated.layout(128, 64, 64, of_itself, True)["total"] <= 99 * 1024
        assert emulated.layout(128, 128, 128, of_itself, True)["total"] <= 163 * 1024


def _check_layout(at, length, width_s, width_t, of_itself):
    tile = {name: at["rows"] * at[f"stride_{name}"] * 2 for name in "std"}
    assert at["rows"] >= length
    for name, width in (("s", width_s), ("t", width_t), ("d", at["rows"])):
        stride = at[f"stride_{name}"]
        assert stride >= -(-width // 16) * 16
        # ldmatrix reads eight rows of 16 bytes: together they must touch all 32 banks once.
        banks = {(row * stride // 2 + word) % 32 for row in range(8) for word in range(4)}
        assert len(banks) == 32
    sides = 1 if of_itself else 2
    assert at["teacher"] == sides * tile["s"]
    assert at["weights"] >= at["teacher"] + max(sides * tile["t"], tile["d"])
    assert at["student_keys"] == (0 if of_itself else tile["s"])
    assert all(at[name] % 16 == 0 for name in ("student_keys", "teacher", "weights", "max_weight"))
    assert at["total"] == at["real"] + 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 129}, "length is 129"),
        ({"width": 20}, "width is 20"),
        ({"width": 136}, "width is 136"),
        ({"dtype": torch.float32}, "fp16 or bf16"),
        ({"offset": 1}, "16-byte boundary"),
        ({"pitch": 36}, "16-byte boundaries"),
    ],
)
def test_bad_arguments_are_refused_before_a_kernel_runs(change, message):
    case = {"length": 20, "width": 32, "dtype": torch.float16, "offset": 0, "pitch": 40} | change
    pitch = max(case["pitch"], case["width"])
    size = case["offset"] + case["length"] * pitch
    whole = torch.zeros(size, dtype=case["dtype"])[case["offset"] :]
    x = whole.view(1, 1, case["length"], pitch)[..., : case["width"]]
    with pytest.raises(ValueError, match=message):
        cuda.relation_kl_rows(x, x, x, x, None, 1.0, 1.0)


def test_a_head_too_large_for_the_device_is_refused(monkeypatch):
    monkeypatch.setenv("BERTKD_EMULATED_SHARED", str(99 * 1024))
    x = torch.zeros(1, 1, 128, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match="shared memory"):
        cuda.relation_kl_rows(x, x, x, x, None, 1.0, 1.0)


def test_a_missing_workspace_and_an_unknown_dtype_are_refused(emulated):
    z, weight, out = torch.zeros(4, 8), torch.ones(4), torch.empty(())
    args = (4, (weight.data_ptr(), 1), tensors.rows(z), tensors.rows(z), 1.0, out.data_ptr())
    with pytest.raises(ValueError, match="workspace has 0 floats, needs 4"):
        emulated.cuda.softmax_kl_fwd_bwd(*args, tensors.rows(z), (0, 0, 0))
    strange = (z.data_ptr(), 9, 8, 8)
    with pytest.raises(ValueError, match="unknown dtype 9"):
        emulated.cuda.softmax_kl_rows(4, strange, strange, 1.0, out.data_ptr(), (0, 0, 0))
