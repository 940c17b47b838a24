"""The life of a run: its folder, its checkpoints, signals and kills, with real processes, real
signals and real folders.

`python tests/test_runs.py` is the other side of the fixture `programs`: it imports the program once
and runs it in forks of itself, so that a test can start and kill many of them."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

# ---- a process that runs jobs in forks of itself ----


def serve():
    """For each job on stdin: fork, run it, and answer with its exit status, negative for a signal.

    {argv}: train_small.main. {save: folder, step}: one save of two parts, a text and a state.
    files, updates: [[n, number], ...]: a signal right before the nth time that the child touches a
    path under its folder (Python reports it to an audit hook), or its nth optimizer update."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor  # noqa: F401

    import papo
    import train_small as ts
    from program import report

    report.plot_curves, report.look_closely = lambda *_: None, lambda *_: []
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run_job(papo, ts, job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_job(papo, ts, job):
    """In the fork: run the program and leave without a return."""
    log = open(job["log"], "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    folder = job.get("save") or job["argv"][job["argv"].index("--out") + 1]
    update, counts = papo.papo_step, {"files": 0, "updates": 0}

    def count(what):
        counts[what] += 1
        for n, number in job.get(what, ()):
            if n == counts[what]:
                os.kill(os.getpid(), number)

    def hook(event, arguments):
        path = arguments[0] if arguments else None
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(folder):
            count("files")

    sys.addaudithook(hook)
    papo.papo_step = lambda *args: (count("updates"), update(*args))[1]
    code = 0
    try:
        if "save" in job:
            save(Path(folder), job["step"])
        else:
            ts.main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    log.flush()
    sys.stdout.flush()
    os._exit(code)


class Part:
    """What save_pretrained writes: a file."""

    def __init__(self, name, step):
        self.name, self.step = name, step

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(str(self.step))


def save(out, step):
    """A checkpoint whose files all hold one number."""
    from program import runs

    parts, texts = [Part("model", step), Part("processor", step)], {"run.json": str(step)}
    runs.save_checkpoint(out / "checkpoint", parts, texts, step)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve()
    sys.exit()

import pytest
import torch
from conftest import QUICK, metrics, same_weights, write_dots
from test_train import load_weights

import papo
import train_small as ts
from program import report, runs


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """.run(argv, **job): a job's exit status; .log: the file of all that they print."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path_factory.mktemp("log") / "log"
    with subprocess.Popen([sys.executable, __file__], **pipes) as process:

        def run(argv=None, **job):
            job = json.dumps({"argv": argv, "log": str(log), **job})
            print(job, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield SimpleNamespace(run=run, log=log)


@pytest.fixture(scope="module")
def world(one_folder, tmp_path_factory):
    """Arguments of a run that takes a second: 16 drawn questions, 3 steps with a checkpoint
    each."""
    data = write_dots(tmp_path_factory.mktemp("data") / "d.parquet", [n % 9 + 1 for n in range(16)])
    sizes = "--prompts-per-batch 2 --max-new-tokens 4 --eval-size 2 --steps 3 --save-every 1"
    return ["--model", one_folder, "--dataset", data, *QUICK, *sizes.split()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Most of the time of a run this small."""
    monkeypatch.setattr(report, "plot_curves", lambda *_: None)
    monkeypatch.setattr(report, "look_closely", lambda *_: [])


@pytest.fixture(scope="module")
def whole(programs, world, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert programs.run([*world, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it, in a folder that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(ts, "load", lambda run: pytest.fail("something was loaded"))


def strict(text):
    """Read JSON as its standard has it: Python's NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- killed at any moment ----


def test_killed_before_each_file_operation_of_a_save(programs, tmp_path):
    """SIGKILL before the first one, before the second, ... : there is a whole checkpoint, the last
    one or the new one, and the next save is none the worse. The very first save leaves a whole one
    or none."""
    for first in (True, False):
        for n in range(1, 200):
            out = tmp_path / f"{first}{n}"
            out.mkdir()
            if not first:
                save(out, 1)
            status = programs.run(save=str(out), step=2, files=[[n, signal.SIGKILL]])
            found = runs.whole_checkpoint(out)
            if found.exists() or not first:
                steps = {path.read_text() for path in found.iterdir() if path.suffix != ".pt"}
                state = torch.load(found / "trainer_state.pt")
                assert len(list(found.iterdir())) == 4 and steps == {str(state)} <= {"1", "2"}
            if status == 0:
                break
            assert status == -signal.SIGKILL, programs.log.read_text()[-3000:]
            save(out, 3)
            assert [path.name for path in out.iterdir()] == ["checkpoint"]
            assert (out / "checkpoint" / "model").read_text() == "3"
        assert state == 2 and n > 10


@pytest.mark.parametrize("operation", [3, 11, 24, 36, 47])
def test_a_killed_run_goes_on_as_if_nothing_had_been(operation, programs, world, whole, tmp_path):
    """Killed in its beginning, in its saves, and between them: its log is that of a run that nobody
    disturbed up to there, its checkpoint at most one save behind, and it ends with the same metrics
    and weights."""
    out, expected = tmp_path / "run", metrics(whole)
    argv = [*world, "--out", str(out)]
    status = programs.run(argv, files=[[operation, signal.SIGKILL]])
    assert status == -signal.SIGKILL, programs.log.read_text()[-3000:]
    logged = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    lines = [json.loads(x) for x in logged.splitlines(keepends=True) if x.endswith("\n")]
    assert lines == expected[: len(lines)]
    assert len(runs.read_record(out)["history"]) >= len(lines) - 1 or len(lines) < 3
    ts.main([*argv, "--resume"])
    assert metrics(out) == expected
    assert same_weights(*(load_weights(folder / "checkpoint") for folder in (out, whole)))


# The suffixes that a kill leaves; the last one is of the first save, cut short: there is none.
LEFT = [(("", ".new"), ""), (("", ".old"), ""), ((".new", ".old"), ".new"), ((".old",), ".old")]


@pytest.mark.parametrize("left, newest", [*LEFT, ((".new",), "")])
def test_the_newest_whole_checkpoint_is_found(left, newest, tmp_path):
    for suffix in left:
        (tmp_path / f"checkpoint{suffix}").mkdir()
    assert runs.whole_checkpoint(tmp_path).name == f"checkpoint{newest}"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_files_beside_the_checkpoint_do_no_harm(damage, world, copied, whole):
    """The checkpoint has its settings and metrics inside; the "before" row is never measured with
    the trained model."""
    log, config = copied / "metrics.jsonl", copied / "config.json"
    if damage == "cut":
        log.write_text(log.read_text()[:-30])
        config.write_text('{"gamma": 0.0')
    else:
        log.unlink()
        config.unlink()
    ts.main([*world, "--out", str(copied), "--resume"])
    assert metrics(copied) == metrics(whole) and json.loads(config.read_text())["gamma"] == 0.02


def test_killed_before_the_first_checkpoint(world, whole, tmp_path):
    """--resume then begins anew, also where only an empty config.json is left of it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").touch()
    ts.main([*world, "--out", str(tmp_path / "a"), "--resume"])
    assert metrics(tmp_path / "a") == metrics(whole)
    shutil.rmtree(tmp_path / "a" / "checkpoint")  # and now the settings are known
    ts.main(["--out", str(tmp_path / "a"), "--resume"])
    assert metrics(tmp_path / "a") == metrics(whole)


@pytest.mark.parametrize(
    "number, second", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number, second, programs, world, whole, tmp_path
):
    """In the first of step 2's two updates: the second follows, then a checkpoint. A second signal
    stops at once. The command that is printed goes on without the other flags."""
    out, before = tmp_path / "a blank", len(programs.log.read_text())
    argv = [*world, "--out", str(out), "--save-every", "100"]
    assert programs.run(argv, updates=[[3, number]]) == 128 + number
    assert metrics(out) == metrics(whole)[:3] and len(runs.read_record(out)["history"]) == 3
    said = programs.log.read_text()[before:]
    assert "once more stops at once" in said
    command = next(line for line in said.splitlines() if "train_small.py --resume" in line)
    ts.main(shlex.split(command.split("train_small.py ")[1]))
    assert metrics(out) == metrics(whole)
    again = [*world, "--out", str(tmp_path / "twice")]
    assert programs.run(again, updates=[[3, number], [4, number]]) == second
    assert metrics(tmp_path / "twice") == metrics(whole)[:2]


# ---- one folder, one run ----


def test_a_resumed_run_is_refused_in_words(world, copied, refused, nothing_is_loaded):
    """As is a new one in the folder of another; nothing is loaded or changed."""
    before, argv = contents(copied), [*world, "--gamma", "0.05", "--out", str(copied)]
    assert "--resume" in refused(argv)
    assert "gamma 0.02 -> 0.05" in refused([*argv, "--resume"])
    assert contents(copied) == before
    for name in ("config.json", "metrics.jsonl"):  # a checkpoint alone is a run, too
        (copied / name).unlink()
    refused(argv)


def test_default_names_never_meet(world, whole, tmp_path, monkeypatch, refused):
    """A name that is taken is refused, with the flag that gives another; --resume finds it. An
    evaluation has a name of its own."""
    monkeypatch.chdir(tmp_path)
    name = Path("runs/papo-g-gamma0.02-seed0")
    ts.main([*world, "--steps", "2"])
    before = contents(name)
    assert f"{name} holds config.json: name another by --out" in refused(world)
    assert contents(name) == before
    ts.main([*world, "--resume"])
    assert metrics(name) == metrics(whole)
    before, evaluate = contents(tmp_path), [*world, "--eval-only", "--max-samples", "2"]
    ts.main(evaluate)
    made = contents(tmp_path).keys() - before.keys()
    assert made == {tmp_path / "runs" / "eval" / "eval.jsonl"}
    assert "eval.jsonl" in refused(evaluate)


def test_two_processes_never_take_one_folder(tmp_path, monkeypatch):
    """The second looks while the first one is still loading, and when both looked before either
    wrote."""
    with runs.claimed_folder(tmp_path / "a"), monkeypatch.context() as patch:
        for _ in range(2):
            with pytest.raises(ts.UserError), runs.claimed_folder(tmp_path / "a"):
                pass
            patch.setattr(Path, "exists", lambda self: False)
    assert (tmp_path / "a" / "config.json").exists()
    with contextlib.suppress(ZeroDivisionError), runs.claimed_folder(tmp_path / "b" / "c"):
        raise ZeroDivisionError  # what failed is taken back
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_says_itself_what_it_was_made_with(world, copied, refused):
    """Not config.json beside it, which may be another run's. Versions and device are written and
    are no settings; nor is what has come since, or gone."""
    config = json.loads((copied / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__ and config["on"]
    changes = {"gamma": 0.5, "versions": {"torch": "0.1"}, "on": "abacus"}
    (copied / "config.json").write_text(json.dumps(config | changes))
    record = json.loads((copied / "checkpoint" / "run.json").read_text())
    del record["settings"]["freeze_vision"]
    record["settings"]["gone"] = 1
    (copied / "checkpoint" / "run.json").write_text(json.dumps(record))
    argv = ["--out", str(copied), "--resume"]
    ts.main(argv)
    expected = config | dict(resume=True, out=str(copied))
    assert json.loads((copied / "config.json").read_text()) == expected
    assert "clip_dual 3.0 -> 4.0" in refused([*argv, "--clip-dual", "4"])


def test_an_unwritable_folder_is_refused_before_any_work(
    world, copied, tmp_path, refused, nothing_is_loaded
):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    assert "too long" in refused([*world, "--out", "a" * 300])
    for special in (os.devnull, tmp_path / "link", tmp_path / "file", tmp_path / "file" / "run"):
        assert str(special) in refused([*world, "--out", str(special)])
        assert str(special) in refused([*world, "--eval-only", "--out", str(special)])
    if os.path.isdir("/proc"):
        assert "/proc/run" in refused([*world, "--out", "/proc/run"])
    assert contents(tmp_path) == before
    (copied / "config.json").unlink()
    (copied / "config.json").mkdir()  # stands in for a file system that is read-only
    assert "directory" in refused([*world, "--out", str(copied), "--resume"]).lower()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    world, whole, tmp_path, refused, monkeypatch
):
    """A limit on file sizes stands in for the disk: the second save hits it, then metrics.jsonl."""
    resource = pytest.importorskip("resource")
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    save, step = ts.Trainer.save, ts.Trainer.step
    tight = lambda self, *args: (limit(20_000) if self.steps_done == 2 else None, save(self, *args))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        monkeypatch.setattr(ts.Trainer, "save", tight)
        assert "the last one is whole" in refused([*world, "--out", str(out)])
        assert len(runs.read_record(out)["history"]) == 2
        limit(limits[0])
        monkeypatch.setattr(ts.Trainer, "save", save)
        size = len(runs.as_lines(runs.read_record(out)["history"]))
        monkeypatch.setattr(ts.Trainer, "step", lambda self: (step(self), limit(size + 9))[0])
        resume = ["--out", str(out), "--resume"]
        assert "the last checkpoint is whole" in refused(resume)
    finally:
        limit(limits[0])
        signal.signal(signal.SIGXFSZ, before)
    monkeypatch.setattr(ts.Trainer, "step", step)
    ts.main(resume)
    assert metrics(out) == metrics(whole)


# ---- what is logged ----


def test_metrics_are_strict_json_and_hold_only_what_was_measured(world, tmp_path, monkeypatch):
    """A loss that is not finite, settings that are infinite, terms that no update measured, or only
    some: those are averaged over the others. A response whose last token is the end token is whole,
    also one of exactly max_new_tokens."""
    step, roll_out, calls = papo.papo_step, papo.roll_out, []

    def strange(*args):
        calls.append(float(len(calls)))
        metrics = step(*args) | dict(loss=float("nan"), grad_norm=float("inf"))
        del metrics["kl_ref"]
        return metrics | ({"rare": calls[-1]} if len(calls) % 2 == 0 else {})

    def short_ones(model, processor, *args):
        groups, redraws = roll_out(model, processor, *args)
        end, tensor = processor.tokenizer.eos_token_id, torch.tensor
        groups[0].responses = [tensor([70, 71, 72, end]), tensor([70, 71, end])]
        groups[1].responses = [tensor([70, 71, 72, 73]), tensor([70, 71, 72, end])]
        return groups, redraws

    monkeypatch.setattr(papo, "papo_step", strange)
    monkeypatch.setattr(papo, "roll_out", short_ones)
    out = tmp_path / "a"
    ts.main([*world, "--out", str(out), "--steps", "2", "--clip-dual", "inf"])
    lines = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any({"loss", "grad_norm", "kl_ref"} & set(line) for line in lines)
    assert [line.get("rare") for line in lines] == [None, 1.0, 3.0] and "policy_loss" in lines[1]
    assert [line.get("cut_fraction") for line in lines] == [None, 0.25, 0.25]
    assert strict((out / "config.json").read_text())["clip_dual"] == "inf"
    ts.main(["--out", str(out), "--steps", "3", "--resume"])
    assert len(metrics(out)) == 4


def test_a_tracker_gets_every_line(world, tmp_path, monkeypatch):
    begun, lines, out = [], [], tmp_path / "a"
    log = lambda line, step: lines.append((step, line))
    tracker = SimpleNamespace(init=lambda **settings: begun.append(settings), log=log)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    ts.main([*world, "--out", str(out), "--steps", "2", "--report-to", "wandb"])
    assert [line for _, line in lines] == metrics(out)
    assert begun[0]["name"] == "a" and begun[0]["config"]["gamma"] == 0.02
    ts.main(["--out", str(out), "--steps", "3", "--resume"])
    assert [step for step, _ in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named_before_any_work(
    name, world, tmp_path, monkeypatch, refused, nothing_is_loaded
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = [*world, "--report-to", name, "--out", str(tmp_path / "a")]
    assert f"pip install {name}" in refused(argv)
    assert not (tmp_path / "a").exists()
