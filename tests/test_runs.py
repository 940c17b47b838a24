"""The life of a run: its folder, its checkpoints, signals and kills, with real processes, real signals and real folders.

`python tests/test_runs.py` is the other side of the fixture `programs`: it imports the program once and runs it in forks of
itself, so that a test can start and kill many of them.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# A process that runs train_small.main in forks of itself
# ---------------------------------------------------------------------------------------------------------------------


def serve():
    """For each line {argv, log, files, updates, after} on stdin: fork, run, and answer with its exit status.

    files: [[n, number], ...]: the child sends itself a signal right before the nth time that it touches a path under its
    --out (Python reports each such operation to an audit hook). updates: the same before its nth optimizer update.
    after: seconds to SIGKILL. The status is negative for a signal."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor  # noqa: F401

    import train_small as ts

    ts.plot_curves = lambda *_: None  # as no_pictures
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run_job(ts, job)
        if job.get("after") is not None:
            time.sleep(job["after"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def run_job(ts, job):
    """In the fork: run the program and leave without a return."""
    log = open(job["log"], "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    folder, update = job["argv"][job["argv"].index("--out") + 1], ts.papo_step
    counts = {"files": 0, "updates": 0}

    def count(what):
        counts[what] += 1
        for n, number in job.get(what, ()):
            if n == counts[what]:
                os.kill(os.getpid(), number)

    def hook(event, arguments):
        if (
            arguments
            and isinstance(arguments[0], (str, os.PathLike))
            and str(arguments[0]).startswith(folder)
        ):
            count("files")

    sys.addaudithook(hook)
    ts.papo_step = lambda *args: (count("updates"), update(*args))[1]
    code = 0
    try:
        ts.main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 99
    log.flush()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve()
    sys.exit()

import pytest
import torch
from test_train import dots, make_folder, metrics
from transformers import AutoModelForImageTextToText

import train_small as ts


class Programs:
    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, argv, **job):
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(self.log), **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("log") / "log")
    yield programs
    programs.process.stdin.close()
    programs.process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Arguments of a run that takes a second: a tiny model, 16 drawn questions, 3 steps with a checkpoint each."""
    import datasets

    rows = [
        {"images": [dots(n % 9 + 1)], "problem": "How many?", "answer": str(n % 9 + 1)} for n in range(16)
    ]
    columns = {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string")}
    features = datasets.Features({**columns, "answer": datasets.Value("string")})
    path = tmp_path_factory.mktemp("data") / "dots.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    sizes = (
        "--group-size 2 --prompts-per-batch 2 --updates-per-batch 2 --max-new-tokens 4 --eval-size 2 --eval-every 2 --steps 3 "
        "--save-every 1 --learning-rate 1e-3 --min-pixels 4704 --max-pixels 15680"
    ).split()
    return ["--model", make_folder("qwen2_5_vl", tmp_path_factory), "--dataset", str(path), *sizes]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Half of the time of a run this small."""
    monkeypatch.setattr(ts, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def whole(programs, world, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert programs.run([*world, "--out", str(out)]) == 0
    return out


def strict(text):
    """Read JSON as its standard has it: Python's NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(argv, capsys):
    """The one line that the program ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ts.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("train_small.py: error:")
    return lines[-1]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- killed at any moment --------------------------------------------------------------------------------------------


def test_killed_at_20_random_moments(programs, world, tmp_path):
    """SIGKILL by the clock and right before file operations, most of which are a save's; go on; kill again. After each, a
    whole checkpoint at most --save-every steps behind the log; in the end the very metrics of a run that nobody disturbed."""
    world = [*world, "--steps", "10", "--save-every", "2"]
    assert programs.run([*world, "--out", str(tmp_path / "whole")]) == 0
    expected, moments = metrics(tmp_path / "whole"), random.Random(0)
    out, kills, finished = tmp_path / "0", 0, 0
    while kills < 20 or finished == 0:
        resume = ["--resume"] if out.exists() else []
        if kills >= 20:
            moment = {}
        elif kills % 2:
            moment = {"after": moments.uniform(0.1, 2)}
        else:
            moment = {"files": [[moments.randint(1, 90), signal.SIGKILL]]}
        status = programs.run([*world, "--out", str(out), *resume], **moment)
        assert status in (0, -signal.SIGKILL), programs.log.read_text()[-3000:]
        logged = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
        lines = [json.loads(line) for line in logged.splitlines(keepends=True) if line.endswith("\n")]
        assert lines == expected[: len(lines)]
        if status == 0:
            assert metrics(out) == expected
            finished, out = finished + 1, tmp_path / str(kills)
            continue
        kills += 1
        if len(lines) > 3:  # some save is over
            record = ts.read_record(out)
            checkpoint = ts.whole_checkpoint(out)
            done = torch.load(checkpoint / "trainer_state.pt", weights_only=True)["step"]
            assert record["history"] == expected[: done + 1] and done >= len(lines) - 1 - 2
            AutoModelForImageTextToText.from_pretrained(checkpoint)


@pytest.mark.parametrize("left", [(".new", ".old"), (".old",), ("", ".new"), ("", ".old")])
def test_whatever_a_killed_save_leaves_is_gone_on_from(left, whole, programs, world, tmp_path):
    """Between the two renames of a save, before it, after it: the next run finds the whole one, newest first."""
    assert programs.run([*world, "--out", str(tmp_path / "a"), "--steps", "2"]) == 0
    shutil.copytree(whole, tmp_path / "b")  # its checkpoint is of step 3
    shutil.rmtree(tmp_path / "b" / "checkpoint")
    sources = {"": tmp_path / "a" / "checkpoint", ".old": tmp_path / "a" / "checkpoint"}
    for suffix in left:
        target = tmp_path / "b" / f"checkpoint{suffix}"
        shutil.copytree(sources.get(suffix, whole / "checkpoint"), target)
    if "" in left:  # what lies beside a checkpoint may be half there
        (tmp_path / "b" / f"checkpoint{left[1]}" / "trainer_state.pt").write_bytes(b"PK")
    config, run = ts.parse_args([*world, "--out", str(tmp_path / "b"), "--resume"])
    record = ts.find_run(config, run)
    assert len(record["history"]) - 1 == (3 if left == (".new", ".old") else 2)
    assert (tmp_path / "b" / "checkpoint" / "trainer_state.pt").stat().st_size > 1000


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "config.json").write_text('{"gamma": 0.0'),
        lambda out: (out / "metrics.jsonl").write_text(""),
        lambda out: (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text()[:-30]),
        lambda out: (out / "metrics.jsonl").unlink(),
    ],
)
def test_damaged_files_beside_the_checkpoint_do_no_harm(damage, whole, world, programs, tmp_path):
    """The checkpoint has its settings and metrics inside; the "before" row is never measured with the trained model."""
    out = tmp_path / "run"
    assert programs.run([*world, "--out", str(out), "--steps", "2"]) == 0
    damage(out)
    ts.main([*world, "--out", str(out), "--resume"])
    assert metrics(out) == metrics(whole)
    assert json.loads((out / "config.json").read_text())["gamma"] == 0.02


def test_killed_before_the_first_checkpoint(programs, world, whole, tmp_path):
    """--resume then begins anew, also where only an empty config.json is left of it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").touch()
    ts.main([*world, "--out", str(tmp_path / "a"), "--resume"])
    assert metrics(tmp_path / "a") == metrics(whole)


@pytest.mark.parametrize("number, second", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_step_saves_and_prints_what_goes_on(
    number, second, programs, world, whole, tmp_path
):
    """In the first of step 2's two updates: the second follows, then a checkpoint. A second signal stops at once."""
    out, before = tmp_path / "a blank", len(programs.log.read_text())
    argv = [*world, "--out", str(out), "--save-every", "100"]
    assert programs.run(argv, updates=[[3, number]]) == 128 + number
    assert metrics(out) == metrics(whole)[:3]
    said = programs.log.read_text()[before:]
    command = shlex.split(said.split("this goes on:\n")[1].splitlines()[0])
    assert command[:2] == ["python", "train_small.py"]
    ts.main(command[2:])
    assert metrics(out) == metrics(whole)

    again = [*world, "--out", str(tmp_path / "twice")]
    assert programs.run(again, updates=[[3, number], [4, number]]) == second
    assert metrics(tmp_path / "twice") == metrics(whole)[:2]
    ts.main([*again, "--resume"])
    assert metrics(tmp_path / "twice") == metrics(whole)


def test_ctrl_c_saves_also_where_it_ends_the_reader_of_the_output(world, tmp_path):
    """`python train_small.py ... 2>&1 | tee log`: the terminal sends SIGINT to both."""
    root, out = Path(__file__).resolve().parent.parent, tmp_path / "run"
    argv = [*world, "--out", str(out), "--steps", "1000", "--save_every", "1000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(root / "train_small.py"), *argv], env=one_thread, **pipes)
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(ts.read_record(out)["history"]) == len(metrics(out)) >= 3


# --- one folder, one run ---------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(world, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ts, "load", lambda run: pytest.fail("something was loaded"))
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path)
    assert "--resume" in refused([*world, "--gamma", "0.05", "--out", str(tmp_path / "run")], capsys)
    assert "gamma 0.02 -> 0.05" in refused(
        [*world, "--gamma", "0.05", "--out", str(tmp_path / "run"), "--resume"], capsys
    )
    assert contents(tmp_path) == before
    for name in ("config.json", "metrics.jsonl"):  # a checkpoint alone is a run, too
        (tmp_path / "run" / name).unlink()
    refused([*world, "--out", str(tmp_path / "run")], capsys)


@pytest.mark.parametrize("said", (["--resume"], ["--resume", "True"], ["--resume=True"], []))
def test_the_command_that_goes_on_can_be_given_again(said):
    command = ts.going_on(["--gamma", "3", *said, "--steps", "5"], ts.RunConfig(out="a b"))
    assert command == "python train_small.py --gamma 3 --steps 5 --out 'a b' --resume"
    ts.parse_args(shlex.split(command)[2:])


def test_default_names_never_meet(world, tmp_path, monkeypatch, capsys):
    """Same gamma and seed, other settings: a number behind the name; --resume finds the newest of its own settings."""
    monkeypatch.chdir(tmp_path)
    other = [*world, "--mask-ratio", "0.8"]
    first, second = tmp_path / "runs/papo-g-gamma0.02-seed0", tmp_path / "runs/papo-g-gamma0.02-seed0-2"
    ts.main([*world, "--steps", "1"])
    before = contents(first)
    ts.main([*other, "--steps", "1"])
    assert contents(first) == before and json.loads((second / "config.json").read_text())["mask_ratio"] == 0.8
    ts.main([*world, "--steps", "2", "--resume"])
    assert len(metrics(first)) == 3 and len(metrics(second)) == 2
    ts.main([*other, "--steps", "2", "--resume"])
    assert len(metrics(first)) == 3 and len(metrics(second)) == 3
    assert "mask_ratio 0.8 -> 0.5" in refused([*world, "--mask-ratio", "0.5", "--resume"], capsys)
    before = contents(tmp_path)
    ts.main([*world, "--eval-only", "--max-samples", "2"])  # of a model that is none of these runs'
    third = first.with_name(f"{first.name}-3")
    assert contents(tmp_path).keys() - before.keys() == {third / "eval.jsonl"}
    ts.main([*world, "--steps", "1"])
    assert [path.name for path in third.iterdir()] == ["eval.jsonl"]
    said = refused([*world, "--eval-only", "--max-samples", "2", "--out", str(third)], capsys)
    assert "eval.jsonl" in said


def test_two_processes_never_take_one_folder(tmp_path, monkeypatch):
    """The second looks while the first one is still loading, and when both want the name at the same time."""
    monkeypatch.chdir(tmp_path)
    config, runs = ts.PAPOConfig(), [ts.RunConfig() for _ in range(3)]
    with ts.claimed_folder(config, runs[0], ts.RUN_FILES), ts.claimed_folder(config, runs[1], ts.RUN_FILES):
        monkeypatch.setattr(Path, "exists", lambda self: False)  # both looked before either wrote
        with ts.claimed_folder(config, runs[2], ts.RUN_FILES):
            assert len({run.out for run in runs}) == 3
        with (
            pytest.raises(ts.UserError),
            ts.claimed_folder(config, ts.RunConfig(out=runs[0].out), ts.RUN_FILES),
        ):
            pass


def test_a_checkpoint_says_itself_what_it_was_made_with(world, whole, tmp_path, capsys):
    """Not config.json beside it, which may be another run's; a setting that it lacks was not there: the default."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "gamma": 0.5}))
    ts.main([*world, "--out", str(out), "--resume"])
    record = json.loads((out / "checkpoint" / "run.json").read_text())
    for name in ("clip_dual", "freeze_vision", "report_to"):
        del record["settings"][name]
    (out / "checkpoint" / "run.json").write_text(json.dumps(record))
    ts.main([*world, "--out", str(out), "--resume"])
    assert "clip_dual 3.0 -> 4.0" in refused(
        [*world, "--clip-dual", "4", "--out", str(out), "--resume"], capsys
    )


def test_versions_are_written_and_are_no_settings(world, whole, tmp_path):
    """config.json says with what code a run was made; a run goes on without that, and with other versions."""
    config = json.loads((whole / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__ and config["device"]
    for change in ({"versions": {"torch": "0.1"}, "device": "abacus"}, {}):
        out = tmp_path / str(len(change))
        shutil.copytree(whole, out)
        (out / "checkpoint" / "run.json").unlink()  # so that config.json is read
        rest = {name: value for name, value in config.items() if name not in ("versions", "device")}
        (out / "config.json").write_text(json.dumps(rest | change))
        ts.main([*world, "--out", str(out), "--resume"])
        assert json.loads((out / "config.json").read_text()) == config | {"resume": True, "out": str(out)}


def test_a_run_that_kept_settings_and_metrics_only_outside_goes_on(world, whole, programs, tmp_path, capsys):
    """A checkpoint without run.json: config.json and metrics.jsonl stand in; without the metrics it is refused."""
    out = tmp_path / "run"
    assert programs.run([*world, "--out", str(out), "--steps", "2"]) == 0
    (out / "checkpoint" / "run.json").unlink()
    shutil.copytree(out, tmp_path / "empty")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    ts.main([*world, "--out", str(out), "--resume"])
    assert metrics(out) == metrics(whole)
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert "lacks" in refused([*world, "--out", str(tmp_path / "empty"), "--resume"], capsys)


@pytest.mark.parametrize("below", ["file/run", "file"])
def test_an_unwritable_folder_is_refused_before_any_work(below, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ts, "load", lambda run: pytest.fail("something was loaded"))
    (tmp_path / "file").touch()
    assert "too long" in refused([*world, "--out", "a" * 300], capsys)
    (tmp_path / "link").symlink_to("nowhere")
    for special in (os.devnull, tmp_path / "link"):
        assert "is a file" in refused([*world, "--out", str(special)], capsys)
    (tmp_path / "link").unlink()
    refused([*world, "--out", str(tmp_path / below)], capsys)
    refused([*world, "--eval-only", "--out", str(tmp_path / below)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if os.path.isdir("/proc"):
        assert "/proc/run" in refused([*world, "--out", "/proc/run"], capsys)


def test_a_run_that_cannot_be_written_to_is_refused_before_any_work(
    world, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ts, "load", lambda run: pytest.fail("something was loaded"))
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "config.json").mkdir()  # stands in for a file system that is read-only
    assert "directory" in refused([*world, "--out", str(tmp_path / "run"), "--resume"], capsys).lower()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(world, tmp_path, capsys, monkeypatch):
    """A limit on file sizes stands in for the disk: the second save hits it."""
    resource = pytest.importorskip("resource")
    out, limits, save, saves = (
        tmp_path / "run",
        resource.getrlimit(resource.RLIMIT_FSIZE),
        ts.Trainer.save,
        [],
    )

    def tight(self, *args):
        saves.append(1)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(self, *args)

    monkeypatch.setattr(ts.Trainer, "save", tight)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert "the last one is whole" in refused([*world, "--out", str(out)], capsys)
        assert len(ts.read_record(out)["history"]) == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        ts.main([*world, "--out", str(out), "--resume", "--steps", "2"])
        size = (out / "metrics.jsonl").stat().st_size
        step, tighter = ts.Trainer.step, (resource.RLIMIT_FSIZE, (size + 9, limits[1]))  # and metrics.jsonl
        monkeypatch.setattr(ts.Trainer, "step", lambda self: (step(self), resource.setrlimit(*tighter))[0])
        assert "the last checkpoint is whole" in refused([*world, "--out", str(out), "--resume"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    monkeypatch.undo()
    ts.main([*world, "--out", str(out), "--resume"])


# --- what is logged --------------------------------------------------------------------------------------------------


def test_metrics_are_strict_json_and_hold_only_what_was_measured(world, tmp_path, monkeypatch):
    """A loss and gradient that are not finite, settings that are infinite, terms that no update measured."""
    step = ts.papo_step

    def strange(model, optimizer, config, groups, objective):
        metrics = step(model, optimizer, config, groups)
        return {
            **{k: v for k, v in metrics.items() if k != "kl_ref"},
            "loss": float("nan"),
            "grad_norm": float("inf"),
        }

    monkeypatch.setattr(ts, "papo_step", strange)
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "2", "--clip-dual", "inf"])
    for line in strict("[" + ",".join((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) + "]"):
        assert not {"loss", "grad_norm", "kl_ref"} & set(line) and (not line["step"] or "policy_loss" in line)
    assert strict((tmp_path / "a" / "config.json").read_text())["clip_dual"] == "inf"
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "3", "--clip-dual", "inf", "--resume"])


def test_a_metric_of_some_updates_is_averaged_over_those(world, tmp_path, monkeypatch):
    step, calls = ts.papo_step, []

    def sometimes(*args):
        calls.append(float(len(calls)))
        return {**step(*args), **({"rare": calls[-1]} if len(calls) % 2 == 0 else {})}

    monkeypatch.setattr(ts, "papo_step", sometimes)
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "2"])
    assert [line.get("rare") for line in metrics(tmp_path / "a")] == [None, 1.0, 3.0]


def test_the_share_of_cut_responses(world, tmp_path, monkeypatch):
    """A response whose last token is the end token is whole, also one of exactly max_new_tokens."""
    roll_out, drawn = ts.roll_out, []

    def short_ones(model, processor, config, rows, generator):
        groups, redraws = roll_out(model, processor, config, rows, generator)
        end = processor.tokenizer.eos_token_id
        groups[0].responses = [torch.tensor([70, 71, 72, end]), torch.tensor([70, 71, end])]
        groups[1].responses = [torch.tensor([70, 71, 72, 73]), torch.tensor([70, 71, 72, end])]
        drawn.append(groups)
        return groups, redraws

    monkeypatch.setattr(ts, "roll_out", short_ones)
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "1"])
    assert metrics(tmp_path / "a")[1]["cut_fraction"] == 0.25


class FakeTracker:
    def __init__(self):
        self.begun, self.lines = [], []

    def init(self, **settings):
        self.begun.append(settings)

    def log(self, line, step):
        self.lines.append((step, line))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_line(name, world, tmp_path, monkeypatch):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "2", "--report-to", name])
    assert [line for _, line in tracker.lines] == metrics(tmp_path / "a")
    assert [step for step, _ in tracker.lines] == [0, 1, 2]
    assert tracker.begun[0]["name"] == "a" and tracker.begun[0]["config"]["gamma"] == 0.02
    ts.main([*world, "--out", str(tmp_path / "a"), "--steps", "3", "--report-to", name, "--resume"])
    assert [step for step, _ in tracker.lines] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named_before_any_work(name, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(ts, "load", lambda run: pytest.fail("something was loaded"))
    assert f"pip install {name}" in refused(
        [*world, "--report-to", name, "--out", str(tmp_path / "a")], capsys
    )
    assert not (tmp_path / "a").exists()


# --- where it starts -------------------------------------------------------------------------------------------------


def test_the_program_starts_where_unix_modules_are_missing():
    """Windows has none of these; peak memory is then psutil's."""
    code = (
        "import sys, train_small\n"  # libraries look for their system themselves; what counts is this project
        "[sys.modules.pop(name) for name in ('train_small', 'papo', 'toy', 'report')]\n"
        "sys.modules.update(dict.fromkeys(('resource', 'fcntl', 'termios', 'pwd', 'grp')))\n"
        "import train_small as ts\n"
        "sys.platform = 'win32'\n"
        "ts.psutil.Process = lambda: type('P', (), {'memory_info': lambda self: type('M', (), {'peak_wset': 2**31})})()\n"
        "assert ts.peak_rss() == 2 and ts.parse_args([])[0].gamma == 0.02"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert 0.1 < ts.peak_rss() < 100
