import subprocess
import sys

import pytest

import bertkd
from bertkd.cli import info
from bertkd.cli.main import COMMANDS, STUDIES, build_parser, main
from bertkd.cli.parser import command_parser


def fail_with(monkeypatch, error, *, while_running):
    """Let ``bertkd info`` raise ``error`` while it prepares or while it runs."""

    def run():
        raise error

    monkeypatch.setattr(info, "prepare", lambda config: run if while_running else run())


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, *STUDIES])
def test_every_option_is_explained(name):
    parser = command_parser(name, (COMMANDS | STUDIES)[name].Config)
    assert parser.description.strip()
    assert [action.dest for action in parser._actions if not action.help] == []


def test_version_in_a_process_of_its_own():
    command = [sys.executable, "-m", "bertkd", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert found.stdout.split() == ["bertkd", bertkd.__version__]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "'distil'"),
        (["distill", "--teacher", "t"], "output_dir"),
        (["distill", "--teachr", "t"], "Did you mean --teacher?"),
        (["distill", "--teacher", "t", "--output_dir", "o", "--steps", "many"], "steps"),
        (["distill", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["study"], "topic"),
    ],
)
def test_wrong_usage_is_one_short_paragraph_and_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "--help" in text
    assert len(text.splitlines()) == 2


def test_config_file_and_flags_that_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("teacher: t\noutput_dir: o\nlr: 0.1\nlayers: [0, 2]\n")
    words = ["distill", "--config", str(path), "--lr", "0.2", "--resume", "--dry_run"]
    values = build_parser().parse_args(words).distill
    assert (values.teacher, values.lr, values.layers) == ("t", 0.2, [0, 2])
    assert values.resume is True
    assert values.dry_run is True
    assert (
        build_parser().parse_args([*words, "--resume", "last-good"]).distill.resume == "last-good"
    )


def test_unknown_key_in_a_config_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("teacher: t\noutput_dir: o\nobjectiv: kd\n")
    with pytest.raises(SystemExit) as exit_:
        main(["distill", "--config", str(path)])
    assert exit_.value.code == 2
    assert "objectiv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "while_running", "code"),
    [
        (ValueError("no such term\nin here"), False, 2),
        (FileNotFoundError("no such file"), False, 2),
        (ModuleNotFoundError("pip install it"), False, 1),
        (ValueError("loss is gone"), True, 1),
        (OSError("disk full"), True, 1),
        (bertkd.errors.CheckpointError("truncated"), True, 1),
        (bertkd.errors.NonFiniteError("teacher state 3"), True, 1),
    ],
)
def test_exit_codes(error, while_running, code, monkeypatch, capsys):
    fail_with(monkeypatch, error, while_running=while_running)
    assert main(["info"]) == code
    text = capsys.readouterr().err
    assert text == f"bertkd info: error: {' '.join(str(error).split())}\n"
    assert main(["info", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt(), while_running=True)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_are_not_dressed_up(monkeypatch):
    fail_with(monkeypatch, AssertionError("a bug"), while_running=True)
    with pytest.raises(AssertionError):
        main(["info"])


def test_info_tells_versions_devices_and_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    import torch

    assert torch.__version__ in text
    assert "chunked" in text
    assert "attention_kl on cpu" in text
    assert "bertkd_cpu" in text
