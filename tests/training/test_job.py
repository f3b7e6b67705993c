"""A job as flags: what fits together, the model's shape, and DeepSpeed's reading of its configuration."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from minillm.training.job import FLOOR, PROCESS, Job, check, config, deepspeed_config, identity, parser
from minillm.training.schedule import cosine

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


# Flags


def test_every_field_is_a_flag_with_its_default():
    assert Job(**vars(parser().parse_args([]))) == Job()
    given = ["--lr", "0.5", "--save-every", "3", "--resume", "--out", "x", "--parallel", "fsdp2"]
    assert Job(**vars(parser().parse_args(given))) == Job(lr=0.5, save_every=3, resume=True, out="x", parallel="fsdp2")


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for one in dataclasses.fields(Job):
        assert " ".join(one.metadata["help"].split()) in said


def test_a_run_is_what_decides_its_weights():
    elsewhere = dict(parallel="fsdp2", accumulate=2, out="b", save_every=3, resume=True, data="copy", world=4)
    assert identity(Job(**elsewhere)) == identity(Job())
    assert identity(Job()).keys() | set(PROCESS) == {one.name for one in dataclasses.fields(Job)}
    for change in (dict(lr=0.1), dict(seed=1), dict(batch=32), dict(steps=21), dict(precision="bf16")):
        assert identity(Job(**change)) != identity(Job())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(width=48), "--width must be a multiple of 32, the size of a head, got 48: try 64"),
        (dict(layers=0), "--layers is too small, got 0: give at least 1"),
        (dict(length=1), "--length is too small, got 1: give at least 2"),
        (dict(warmup=21), "--warmup must be 0 to --steps and --clip above 0, got --warmup 21, --steps 20, --clip 1.0"),
        (dict(clip=0.0), "--warmup must be 0 to --steps and --clip above 0, got --warmup 2, --steps 20, --clip 0.0"),
        (dict(save_every=2), "--save-every needs --out, got none: add it"),
        (dict(resume=True), "--resume needs --out, got none: add it"),
        (dict(world=4), "--world needs --deepspeed-config, got none: add it"),
        (dict(zero_stage=0), "--zero-stage is DeepSpeed's, got no --deepspeed-config: add it, or choose --parallel"),
        (dict(precision="fp16"), "fp16 needs a loss scaler, which DeepSpeed brings, got --precision fp16: choose bf16"),
        (dict(warmup=1, deepspeed_config="x"), "DeepSpeed's schedule needs a warm-up of 2 updates or more, got 1"),
    ],
)
def test_refuses_flags_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match="^" + said.replace("+", r"\+")):
        check(dataclasses.replace(Job(), **change), world=1)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(8, 1, 1), (8, 2, 4), (12, 3, 2)])
def test_a_batch_that_divides(batch, accumulate, world):
    check(Job(batch=batch, accumulate=accumulate), world)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(6, 1, 4), (8, 3, 1), (12, 4, 2)])
def test_refuses_a_batch_that_does_not_divide(batch, accumulate, world):
    said = (
        f"--batch must divide among {world} processes x {accumulate} micro-batches, got {batch}: choose a multiple of"
    )
    with pytest.raises(ValueError, match=f"^{said} {world * accumulate}$"):
        check(Job(batch=batch, accumulate=accumulate), world)


@pytest.mark.parametrize(("world", "save_every"), [(-2, 0), (2, -1)])
def test_refuses_negative_numbers(world, save_every):
    said = f"^--world and --save-every must not be negative, got {world} and {save_every}: give more$"
    with pytest.raises(ValueError, match=said):
        check(Job(save_every=save_every, out="x"), world)


# The model


def test_the_model_has_the_shape_asked_for():
    found = config(Job(width=192, layers=4, length=100), 2048)
    assert (found.heads, found.kv_heads, found.head_size, found.hidden, found.context) == (6, 3, 32, 512, 100)
    assert config(Job(width=96), 2048).kv_heads == 3


# DeepSpeed


@pytest.mark.parametrize(
    ("job", "world", "micro", "stage"),
    [
        (Job(batch=32, accumulate=2, precision="bf16"), 4, 4, 0),
        (Job(batch=24, parallel="fsdp2", precision="fp16"), 8, 3, 3),
        (Job(batch=16, zero_stage=1, lr=0.01, clip=0.5, steps=50, warmup=5, weight_decay=0.2), 2, 8, 1),
        (Job(batch=16, accumulate=8, zero_stage=2), 1, 2, 2),
        (Job(batch=16, parallel="fsdp2", zero_stage=0), 1, 16, 0),
    ],
)
def test_the_keys_agree_with_each_other_and_with_the_job(job, world, micro, stage):
    found = deepspeed_config(job, world)
    accumulate = found["gradient_accumulation_steps"]
    assert found["train_micro_batch_size_per_gpu"] == micro
    assert found["train_batch_size"] == micro * accumulate * world == job.batch
    assert accumulate == job.accumulate
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_clipping"] == job.clip
    assert found["optimizer"]["type"] == "AdamW"
    adamw = {"lr": job.lr, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": job.weight_decay}
    assert found["optimizer"]["params"] == adamw
    schedule = found["scheduler"]["params"]
    assert (schedule["total_num_steps"], schedule["warmup_num_steps"]) == (job.steps, job.warmup)
    assert schedule["cos_min_ratio"] == 0.1
    assert found["bf16"]["enabled"] == (job.precision == "bf16")
    assert found["fp16"]["enabled"] == (job.precision == "fp16")
    assert json.loads(json.dumps(found)) == found


CHECKS = """
import json, sys, types, torch, deepspeed.runtime.config as c
from deepspeed.runtime.lr_schedules import WarmupCosineLR
found = []
for content, world in json.loads(sys.stdin.read()):
    c.dist = types.SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: world)
    try:
        read = c.DeepSpeedConfig(content)
    except Exception as error:
        found.append(type(error).__name__)
        continue
    optimizer = torch.optim.AdamW([torch.zeros(1)], **read.optimizer_params)
    schedule, rates = WarmupCosineLR(optimizer, **read.scheduler_params), []
    for step in range(content["scheduler"]["params"]["total_num_steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    half = "bf16" if read.bfloat16_config.enabled else "fp16" if read.float16_config.enabled else "fp32"
    found.append([read.train_batch_size, int(read.zero_optimization_stage), read.gradient_clipping, half, rates])
print(json.dumps(found))
"""


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed: its own reading of the file is not checked")
def test_deepspeed_reads_it():
    jobs = [
        (Job(batch=32, accumulate=2, precision="bf16", zero_stage=0), 4),
        (Job(batch=24, parallel="fsdp2", precision="fp16", clip=0.5), 8),
        (Job(batch=16, zero_stage=1, steps=30, warmup=6), 2),
    ]
    wrong = deepspeed_config(jobs[0][0], 4)
    wrong["zero_optimization"]["levels"] = 2
    given = [*((deepspeed_config(job, world), world) for job, world in jobs), (wrong, 4), (wrong | {"bf16": 1}, 4)]
    program = [sys.executable, "-c", CHECKS]
    run = subprocess.run(program, input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    *found, unknown, no_dict = json.loads(run.stdout.splitlines()[-1])
    assert unknown == "ValidationError", "its schema knows its keys"
    assert no_dict != found[0]
    for (job, _), one, half, stage in zip(jobs, found, ("bf16", "fp16", "fp32"), (0, 3, 1), strict=True):
        assert one[:4] == [job.batch, stage, job.clip, half]
        ours = [job.lr * cosine(step, warmup=job.warmup, total=job.steps, floor=FLOOR) for step in range(job.steps)]
        late = [0.0, *ours[: job.warmup]]  # one update late in the warm-up
        assert one[4] == pytest.approx(late + ours[job.warmup + 1 :], abs=1e-12)
