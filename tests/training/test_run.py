"""The training program: several processes by torchrun equal one, runs go on from checkpoints, DeepSpeed's config."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from minillm.architecture.transformer import Transformer
from minillm.training.job import FLOOR, Job, config, deepspeed_config
from minillm.training.run import Learner, main, parallel, update
from minillm.training.schedule import cosine

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
STEPS, HALF = 6, 3
SIZE = f"--layers 2 --width 32 --length 16 --steps {STEPS} --batch 8 --lr 0.02 --warmup 2 --save-every {HALF}".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two documents, and room for runs."""
    found = tmp_path_factory.mktemp("run")
    (found / "text").mkdir()
    for i, word in enumerate(("sense", "sensibility")):
        text = " ".join(f"{word} and number {k * k % 97}." for k in range(120))
        (found / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    return found


def flags(folder, out, *more):
    return [*SIZE, "--data", str(folder / "text"), "--out", str(folder / out), *more]


def torchrun(arguments, world=2):
    """Exit code, output and errors of the program in `world` processes. What does not end is killed, children too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    if sys.platform in LOOPBACK:
        environment["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"  # torch for Windows is built without it
    process = subprocess.Popen(
        [*command, "-m", "minillm.training.run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on to its workers, which are in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
    return process.returncode, said, errors


def records(folder, out):
    lines = (folder / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def half_of(folder, out, new):
    """A copy of a run as it was after its first checkpoint, and one more step that was not saved."""
    shutil.copytree(folder / out, folder / new)
    shutil.rmtree(folder / new / f"step-{STEPS:08d}")
    lines = (folder / new / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / new / "log.jsonl").write_text("".join(lines[: HALF + 1]), encoding="utf-8")


@pytest.fixture(scope="module")
def alone(folder):
    """One process with the whole batch: what it logged."""
    assert main(flags(folder, "alone")) == 0
    return records(folder, "alone")


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def engine(request, folder):
    """A run on two processes; the name of the engine and of its folder."""
    run_of(folder, request.param)
    return request.param


def assert_quiet(code, errors):
    """The connections of torch note it when the machine is slow, which is no warning of ours."""
    assert code == 0, errors
    assert "Warning" not in errors


@cache
def run_of(folder, engine):
    code, said, errors = torchrun(flags(folder, engine, "--parallel", engine, "--accumulate", "2"))
    assert_quiet(code, errors)
    assert [line.split()[1] for line in said.splitlines()] == [str(i + 1) for i in range(STEPS)], "rank 0 alone speaks"


def assert_close(found, expected):
    """float32: sums of halves in another order, 1e-7 relative, which Adam's division enlarges from step to step."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert one["norm"] == pytest.approx(other["norm"], rel=2e-4)
        assert one["lr"] == other["lr"]


# One process


def test_it_learns(alone):
    assert len(alone) == STEPS
    assert alone[0]["loss"] == pytest.approx(math.log(2048), rel=0.02)  # knows nothing: all tokens equally likely
    assert alone[-1]["loss"] < alone[0]["loss"] - 1
    factors = [cosine(step, warmup=2, total=STEPS, floor=FLOOR) for step in range(STEPS)]
    assert [record["lr"] for record in alone] == [0.02 * factor for factor in factors]


def test_one_process_goes_on_bit_for_bit(folder, alone):
    half_of(folder, "alone", "alone again")
    assert main(flags(folder, "alone again", "--resume")) == 0
    assert records(folder, "alone again") == alone


def test_a_finished_run_has_nothing_to_do(folder, alone):
    assert main(flags(folder, "alone", "--resume")) == 0
    assert records(folder, "alone") == alone


def test_micro_batches_are_one_batch(folder, alone):
    assert main(flags(folder, "micro", "--accumulate", "4")) == 0
    assert_close(records(folder, "micro"), alone)


def test_bfloat16_is_near(folder, alone):
    assert main(flags(folder, "half", "--precision", "bf16")) == 0
    found = [record["loss"] for record in records(folder, "half")]
    assert found == pytest.approx([record["loss"] for record in alone], rel=0.02)  # products have 8 bits
    assert found != [record["loss"] for record in alone]


def test_without_a_folder_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SIZE[:-2], "--steps", "2", "--data", str(folder / "text")]) == 0
    assert list(tmp_path.iterdir()) == []
    assert [line.split()[:3:2] for line in capsys.readouterr().out.splitlines()] == [["step", "loss"]] * 2


def test_the_text_that_ships_is_the_default(capsys):
    assert main(["--layers", "1", "--width", "32", "--length", "32", "--batch", "2", "--steps", "2"]) == 0
    assert float(capsys.readouterr().out.split()[3]) == pytest.approx(math.log(2048), rel=0.02)


def test_refuses_a_loss_that_is_not_finite(folder, capsys):
    assert main(flags(folder, "infinite", "--lr", "1e30", "--clip", "1e9")) == 2
    assert re.search(r"the loss is (nan|inf) at step \d: begin with a lower --lr", capsys.readouterr().err)
    assert list((folder / "infinite").glob("step-*")) in ([], [folder / "infinite" / f"step-{HALF:08d}"])


# Two processes


@pytest.mark.slow
def test_two_processes_do_the_steps_of_one(engine, folder, alone):
    assert_close(records(folder, engine), alone)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(engine, folder):
    half_of(folder, engine, f"{engine} again")
    code, _, errors = torchrun(flags(folder, f"{engine} again", "--parallel", engine, "--accumulate", "2", "--resume"))
    assert_quiet(code, errors)
    uninterrupted, found = records(folder, engine), records(folder, f"{engine} again")
    assert found[:HALF] == uninterrupted[:HALF]
    assert_close(found, uninterrupted)  # two processes may add in another order in another run


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(engine, folder):
    half_of(folder, engine, f"{engine} alone")
    assert main(flags(folder, f"{engine} alone", "--resume")) == 0
    assert_close(records(folder, f"{engine} alone"), records(folder, engine))


# One sentence


def refused(capsys, *arguments):
    """What the program says, with exit code 2."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("minillm.training.run: ").strip()


def test_refuses_a_batch_that_does_not_divide(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = "--batch must divide among 3 processes x 2 micro-batches, got 8: choose a multiple of 6"
    assert refused(capsys, "--batch", "8", "--accumulate", "2") == said
    monkeypatch.setenv("RANK", "1")
    assert main(["--batch", "8", "--accumulate", "2"]) == 2
    assert capsys.readouterr().err == "", "rank 0 alone speaks"


def test_refuses_to_resume_from_nothing(capsys, tmp_path):
    said = f"--resume needs a checkpoint, got {tmp_path} with none: leave it out to begin"
    assert refused(capsys, "--out", str(tmp_path), "--resume") == said


def test_refuses_to_write_over_a_run(capsys, folder, alone):
    said = f"{folder / 'alone'} holds a run, got no --resume: add it to go on, or choose another folder"
    assert refused(capsys, *flags(folder, "alone")) == said
    assert records(folder, "alone") == alone


@pytest.mark.parametrize(
    ("change", "differs"),
    [(["--seed", "1"], "seed is 0 there, 1 here"), (["--layers", "3"], "layers is 2 there, 3 here")],
)
def test_refuses_a_checkpoint_of_another_run(capsys, folder, alone, change, differs):
    assert differs in refused(capsys, *flags(folder, "alone", "--resume"), *change)


def test_refuses_a_checkpoint_of_another_text(capsys, folder, alone, tmp_path):
    (tmp_path / "a.txt").write_text("another text " * 300, encoding="utf-8")
    assert "text is" in refused(capsys, *flags(folder, "alone", "--resume"), "--data", str(tmp_path))


def test_refuses_a_damaged_checkpoint(capsys, folder, alone):
    shutil.copytree(folder / "alone", folder / "damaged")
    file = next((folder / "damaged" / f"step-{STEPS:08d}").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged or missing" in refused(capsys, *flags(folder, "damaged", "--resume"))


def test_refuses_a_folder_without_text(capsys, tmp_path):
    said = f"--data must be a folder with .txt files, got {tmp_path} with none: give another"
    assert refused(capsys, "--data", str(tmp_path)) == said


def test_refuses_what_is_no_text(capsys, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    said = f"{tmp_path / 'a.txt'} must be UTF-8, got invalid continuation byte at byte 3: convert it"
    assert refused(capsys, "--data", str(tmp_path)) == said


def test_refuses_a_path_that_cannot_be_written(capsys, tmp_path):
    file = tmp_path / "missing" / "deepspeed.json"
    assert refused(capsys, "--deepspeed-config", str(file)) == f"{file} cannot be used (No such file or directory)"


def test_refuses_an_unknown_engine(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--parallel", "zero"])
    assert "invalid choice: 'zero'" in capsys.readouterr().err


# DeepSpeed's configuration


@pytest.mark.parametrize(("world", "given"), [(None, 2), ("8", 2), ("8", None)])
def test_the_configuration_is_written_and_nothing_trained(tmp_path, capsys, monkeypatch, world, given):
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)  # of this run; --world is that of the job
    file = tmp_path / "deepspeed.json"
    more = ["--world", str(given)] if given else []
    assert main(["--batch", "32", "--accumulate", "2", "--deepspeed-config", str(file), *more]) == 0
    expected = deepspeed_config(Job(batch=32, accumulate=2), given or int(world))
    assert json.loads(file.read_text(encoding="utf-8")) == expected
    assert capsys.readouterr().out == ""


def test_refuses_a_batch_that_deepspeed_would(capsys, tmp_path):
    file = tmp_path / "deepspeed.json"
    said = refused(capsys, "--batch", "30", "--world", "4", "--deepspeed-config", str(file))
    assert said == "--batch must divide among 4 processes x 1 micro-batches, got 30: choose a multiple of 4"
    assert not file.exists()


# Parts


def test_one_process_is_not_wrapped():
    torch.manual_seed(0)
    learner = Learner(Transformer(config(Job(width=32, length=8), 16)))
    trained = parallel(learner, Job(parallel="fsdp2"), 1, torch.device("cpu"))
    assert trained is learner
    before = [p.detach().clone() for p in learner.parameters()]
    ids = torch.arange(16).view(2, 8)
    loss, norm = update(trained, torch.optim.SGD(trained.parameters(), 1.0), ids, Job(clip=0.25), 0, 1)
    assert loss == pytest.approx(math.log(16), rel=0.05)
    moved = math.sqrt(
        sum((p.detach() - b).square().sum().item() for p, b in zip(trained.parameters(), before, strict=True))
    )
    assert norm > 0.25
    assert moved == pytest.approx(0.25, rel=1e-4)  # clipped, with a rate of 1; 1e-6 is added to the norm
