"""``bertkd``: help, options, config files, errors and exit codes of every command."""

import os
import subprocess
import sys

import pytest
import torch

import bertkd
from bertkd.cli import info
from bertkd.cli.main import COMMANDS, STUDIES, build_parser, main
from bertkd.cli.parser import command_parser
from bertkd.cli.plain import TORCH_ALONE, config_from, plain_command_parser


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
        (
            ["distill", "--teachr", "t", "--studnt", "3"],
            "studnt 3. Did you mean --teacher, --student?",
        ),
        (["distill", "--bar", "2"], "unrecognized arguments: --bar 2\n"),
        (["distill", "--teacher", "t", "--output_dir", "o", "--steps", "many"], "steps"),
        (["distill", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["study"], "bertkd study: error: name one of: topic."),
        (
            ["study", "topic", "--seeds", "x"],
            "bertkd study topic: error: --seeds: Expected an int.",
        ),
        (["distill", "--teacher", "t"], "bertkd distill: error: the following"),
        (["evaluate"], "arguments are required: --model\n"),
        (["bench", "--rounds", "x"], "--rounds: Expected an int. Got value: x"),
        (["verify", "--ops", "logit_kl"], '--ops: Expected a list, e.g. "[a,b]". Got value'),
        (
            ["finetune", "--model", "m", "--output_dir", "o", "--precision", "fp8"],
            "--precision: Expected one of 'fp32', 'bf16', 'fp16' or null. Got value: fp8",
        ),
        (
            ["finetune", "--model", "m", "--output_dir", "o", "--resume", "maybe"],
            "--resume: Expected bool or one of 'last-good'. Got value: maybe",
        ),
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


@pytest.mark.parametrize("last", [["--config", "{}"], ["--config={}"]])
def test_flags_override_a_config_file_that_stands_after_them(last, tmp_path):
    path, other = tmp_path / "run.yaml", tmp_path / "more.yaml"
    path.write_text("teacher: t\noutput_dir: o\nlr: 0.1\nsteps: 5\nresume: false\n")
    other.write_text("steps: 6\nseed: 7\n")
    words = ["distill", "--lr", "0.2", "--resume", *last, "--dry_run", f"--config={other}"]
    values = build_parser().parse_args([word.format(path) for word in words]).distill
    assert (values.teacher, values.lr, values.resume) == ("t", 0.2, True)
    assert (values.dry_run, values.steps, values.seed) == (True, 6, 7)


@pytest.mark.parametrize("command", [["distill"], ["study", "topic"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected options, one `name: value` a line, got nothing.\n"),
        ("just words", "expected options, one `name: value` a line, got just words.\n"),
        ("seed: [3", "Problems parsing config"),
        ("output_dri: o", "unknown option --output_dri. Did you mean --output_dir?"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(command, text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--config", str(path)])
    assert exit_.value.code == 2
    assert f"bertkd {' '.join(command)}: error: {path}: {message}" in capsys.readouterr().err


def test_shortened_flags_are_unknown(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--conf", "run.yaml"])
    assert (
        "unrecognized arguments: --conf run.yaml. Did you mean --config?" in capsys.readouterr().err
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


@pytest.mark.parametrize("while_running", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_one_line(error, while_running, monkeypatch, capsys):
    fail_with(monkeypatch, error, while_running=while_running)
    assert main(["info"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("bertkd info: error: out of memory (")
    assert "batch_size" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("while_running", [False, True])
def test_interrupted(while_running, monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt(), while_running=while_running)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_interrupted_while_the_options_are_read(monkeypatch, capsys):
    def press_control_c():
        raise KeyboardInterrupt

    monkeypatch.setattr("bertkd.cli.main.build_parser", press_control_c)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "bertkd: interrupted\n"


def test_bugs_are_not_dressed_up(monkeypatch):
    fail_with(monkeypatch, AssertionError("a bug"), while_running=True)
    with pytest.raises(AssertionError):
        main(["info"])


def test_a_study_is_called_by_both_its_words(capsys):
    assert main(["study", "topic", "--seeds", "0"]) == 2
    assert capsys.readouterr().err.startswith("bertkd study topic: error: seeds must be")


@pytest.mark.parametrize("module", ["bertkd", "bertkd.bench"])
def test_nobody_reads_to_the_end(module):
    words = ["bench", "--list"] if module == "bertkd" else ["--list"]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def without(modules, *words):
    """Run ``bertkd`` in a process that lacks these modules."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] in {modules!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from bertkd.cli.main import main\n"
        "sys.exit(main())\n"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


TRAIN = ["jsonargparse", "docstring_parser", "yaml", "transformers", "accelerate", "datasets"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--version"], f"bertkd {bertkd.__version__}"),
        (["info"], "attention_kl on cpu"),
        (["bench", "--list", "--device", "cpu"], "relation_kl[B8 H12 L128 Ds64 Dt64 float32]"),
        (
            ["verify", "--impls", "[chunked]", "--device", "cpu", "--help"],
            "Width of the attention heads of both sides.",
        ),
        (["tune", "--help"], "Kernel forms to tune. Default: all."),
    ],
)
def test_commands_that_need_torch_alone_run_without_the_rest(words, text):
    done = without(TRAIN, *words)
    assert done.returncode == 0, done.stderr
    assert text in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (TRAIN, ["distill", "--teacher", "t", "--output_dir", "o"]),
        (["yaml"], ["study", "topic"]),
        (["docstring_parser"], ["--help"]),
        (["accelerate"], ["finetune", "--model", "m", "--output_dir", "o"]),
        (["transformers"], ["evaluate", "--model", "m", "--task", "t"]),
    ],
)
def test_a_missing_library_is_one_line_that_says_what_installs_it(modules, words):
    done = without(modules, *words)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"No module named {modules[0]!r}; pip install 'bertkd[train]' brings it" in done.stderr


def test_what_the_output_cannot_encode_fails_no_command():
    code = (
        "import sys\n"
        "from bertkd.cli import info\n"
        "from bertkd.cli.main import main\n"
        "info.prepare = lambda config: lambda: print('model: runs/Übung')\n"
        "sys.exit(main(['info']))\n"
    )
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert (done.returncode, done.stdout) == (0, "model: runs/\\xdcbung\n"), done.stderr


def test_closed_outputs_fail_no_command():
    code = (
        "import sys\n"
        "from bertkd.cli import info\n"
        "from bertkd.cli.main import main\n"
        "info.prepare = lambda config: lambda: (print('a'), sys.stderr.isatty())\n"
        "sys.exit(main(['info']))\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command).returncode == 0


def test_plain_options_are_read_as_the_others_are():
    parser = plain_command_parser("verify", COMMANDS["verify"].Config)
    words = ["--ops", "[attention_kl, 'logit_kl']", "--dtypes=float16", "--length", "7", "--debug"]
    plain = vars(parser.parse_args(words))
    values = build_parser().parse_args(["verify", *words[:2], "--dtypes=[float16]", *words[3:]])
    config = COMMANDS["verify"].Config
    assert config_from(config, plain) == config_from(config, values.verify)
    assert plain["debug"] is True
    for name in TORCH_ALONE:
        actions = plain_command_parser(name, COMMANDS[name].Config)._actions
        assert [action.dest for action in actions if not action.help] == []


def test_info_tells_versions_devices_and_reasons(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "2.99.0+cu999" in text
    assert "chunked" in text
    assert "attention_kl on cpu" in text
    assert "bertkd_cpu" in text
