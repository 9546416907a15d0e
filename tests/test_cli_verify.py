"""``bertkd verify``: right results pass, a wrong one is named and ends with code 1."""

import pytest

from bertkd.cli.main import main
from bertkd.ops import verify
from bertkd.ops.implementations import implementation

SMALL = [
    "verify",
    *("--impls", "[triton]", "--ops", "[logit_kl]", "--dtypes", "[float32,float16]"),
    *("--length", "5", "--batch_size", "2", "--classes", "50", "--device", "cpu"),
]


def test_right_results_are_listed_with_their_errors(capsys):
    assert main(SMALL) == 0
    text = capsys.readouterr().out
    assert text.count("softmax_kl  triton  float") == 2
    assert text.count(" right\n") == 2
    assert "2 results checked on cpu, all right." in text


def test_a_wrong_result_is_named_and_fails(capsys, monkeypatch):
    real = verify.compare
    monkeypatch.setattr(verify, "compare", lambda *a: real(*a)._replace(error=0.5))
    assert main(SMALL) == 1
    captured = capsys.readouterr()
    assert "5.0e-01" in captured.out
    assert "WRONG" in captured.out
    assert "2 of 2 results are wrong" in captured.err


@pytest.mark.parametrize("wrong", ["fwd_bwd", "rows"])
def test_either_form_counts(wrong, capsys, monkeypatch):
    real = verify.compare

    def compare(op, impl, case, form):
        found = real(op, impl, case, form)
        return found._replace(error=0.5) if form == wrong else found

    monkeypatch.setattr(verify, "compare", compare)
    assert main(SMALL) == 1
    assert "2 of 2 results are wrong" in capsys.readouterr().err


def test_a_kernel_that_raises_is_a_finding_too(capsys, monkeypatch):
    def compare(*_):
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(verify, "compare", compare)
    assert main(SMALL) == 1
    assert "WRONG: RuntimeError: no kernel image for this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "[attention_k]"], "unknown loss 'attention_k'. Did you mean 'attention_kl'"),
        (["--impls", "[tritn]"], "unknown impl 'tritn'. Did you mean 'triton'"),
        (["--impls", "[cuda]", "--device", "cpu"], "impls: 'cuda' cannot run here"),
        (["--dtypes", "[fp8]"], "unknown dtype 'fp8'"),
        (["--length", "0"], "length must be at least 1, got 0"),
        (["--dtypes", "[]"], "dtypes is empty"),
        (["--device", "cpux"], "device must be 'cpu', 'cuda' or 'cuda:N', got 'cpux'"),
        (["--device", "meta"], "got 'meta'"),
        (["--device", "cuda:99"], "device='cuda:99': "),
    ],
)
def test_wrong_options_end_with_code_2(words, message, capsys):
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_nothing_checked_is_not_all_right(capsys, monkeypatch):
    from bertkd.ops import triton

    monkeypatch.setattr(triton, "refusal", lambda *_: "it is too small")
    assert main(SMALL) == 1
    captured = capsys.readouterr()
    assert "not run: it is too small" in captured.out
    assert "nothing was checked on cpu" in captured.err


def test_a_machine_without_fast_code_is_no_wrong_option(capsys, monkeypatch):
    for impl in ("native", "triton", "cuda"):
        monkeypatch.setattr(implementation(impl), "unavailable", lambda: "not built")
    assert main(["verify"]) == 1
    assert (
        "no fast implementation runs here, nothing to check (native: not" in capsys.readouterr().err
    )


def test_what_does_not_fit_is_one_line(capsys):
    assert main([*SMALL, "--length", "100000000000"]) == 1
    assert "softmax_kl do not fit into memory; lower --batch_size" in capsys.readouterr().err


def test_a_name_given_twice_is_checked_once(capsys):
    assert main([*SMALL, "--impls", "[triton,triton]", "--dtypes", "[float32,float32]"]) == 0
    assert "1 results checked" in capsys.readouterr().out
