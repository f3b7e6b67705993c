"""A training job as flags: its fields, what does not fit together, its model, and the same job in DeepSpeed's words.

Idea:        One list of fields makes the command line and its help, says what a checkpoint is one of, and is translated
             to the configuration of another engine. What engines disagree on is what a batch is: rows of all processes
             and all micro-batches here; DeepSpeed wants three numbers, batch = micro-batch x accumulation x processes,
             and refuses others.
Cost:        Nothing.
Paper:       DeepSpeed's stages: Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, section 5.
Production:  DeepSpeed's configuration (train_batch_size, zero_optimization, WarmupCosineLR); transformers
             TrainingArguments, which are made from a dataclass in the same way.
Leaves out:  offloading and the sizes of DeepSpeed's buckets; `run` trains.
"""

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any

from minillm.architecture.transformer import Config

HEAD = 32  # channels of a head
BETAS, EPS, FLOOR = (0.9, 0.95), 1e-8, 0.1  # of AdamW; the learning rate at the end, as a share
# what does not decide the weights
PROCESS = ("parallel", "accumulate", "data", "out", "save_every", "resume", "deepspeed_config", "zero_stage", "world")


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of `Job` that is a flag."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Job:
    """What to train and how: one field a flag."""

    parallel: str = option("ddp", "engine for several processes", choices=["ddp", "fsdp2"])
    layers: int = option(2, "blocks of the model")
    width: int = option(64, f"channels of the stream, a multiple of {HEAD}")
    length: int = option(64, "tokens of a row")
    steps: int = option(20, "updates of the weights")
    batch: int = option(16, "rows an update, over all processes")
    accumulate: int = option(1, "micro-batches a process and update")
    lr: float = option(3e-3, "highest learning rate, of AdamW")
    warmup: int = option(2, "updates in which the learning rate rises; then half a cosine")
    weight_decay: float = option(0.1, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of weights and data order")
    precision: str = option("fp32", "of matrix products; fp16 for DeepSpeed only", choices=["fp32", "bf16", "fp16"])
    data: str = option("", "folder of .txt files, a document each (default: the text that ships)")
    out: str = option("", "folder for log and checkpoints (default: none are written)")
    save_every: int = option(0, "updates between two checkpoints (default: one at the end)")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    deepspeed_config: str = option("", "write DeepSpeed's configuration of this job to this file and end")
    zero_stage: int = option(-1, "ZeRO stage in that file (default: 0 for ddp, 3 for fsdp2)", choices=[0, 1, 2, 3])
    world: int = option(0, "processes in that file (default: those of this run)")


def parser() -> argparse.ArgumentParser:
    """The flags of `Job`."""
    found = argparse.ArgumentParser("minillm.training.run", description="Train a small model on one or many processes.")
    for one in fields(Job):
        name, more = "--" + one.name.replace("_", "-"), dict(one.metadata)
        if one.type is bool:
            found.add_argument(name, action="store_true", **more)
        else:
            found.add_argument(name, type=one.type, default=one.default, **more)
    return found


def check(job: Job, world: int) -> None:
    """ValueError: flags that do not fit together, or to this number of processes."""
    for name in ("layers", "length", "steps", "batch", "accumulate"):
        if getattr(job, name) < (2 if name == "length" else 1):
            raise ValueError(f"--{name} is too small, got {getattr(job, name)}: give at least {1 + (name == 'length')}")
    if world < 1 or job.save_every < 0:
        raise ValueError(f"--world and --save-every must not be negative, got {world} and {job.save_every}: give more")
    if job.width < HEAD or job.width % HEAD:
        raise ValueError(f"--width must be a multiple of {HEAD}, the size of a head, got {job.width}: try {HEAD * 2}")
    if not 0 <= job.warmup <= job.steps or not job.clip > 0:
        given = f"--warmup {job.warmup}, --steps {job.steps}, --clip {job.clip}"
        raise ValueError(f"--warmup must be 0 to --steps and --clip above 0, got {given}: change one")
    if job.batch % (world * job.accumulate):
        of = f"{world} processes x {job.accumulate} micro-batches"
        raise ValueError(
            f"--batch must divide among {of}, got {job.batch}: choose a multiple of {world * job.accumulate}"
        )
    for name, needed in (("save_every", "out"), ("resume", "out"), ("world", "deepspeed_config")):
        if getattr(job, name) and not getattr(job, needed):
            raise ValueError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}, got none: add it")
    if job.zero_stage >= 0 and not job.deepspeed_config:
        raise ValueError("--zero-stage is DeepSpeed's, got no --deepspeed-config: add it, or choose --parallel")
    if job.precision == "fp16" and not job.deepspeed_config:
        raise ValueError("fp16 needs a loss scaler, which DeepSpeed brings, got --precision fp16: choose bf16 or fp32")
    if job.deepspeed_config and job.warmup < 2:
        raise ValueError(f"DeepSpeed's schedule needs a warm-up of 2 updates or more, got {job.warmup}: raise --warmup")


# Translations


def config(job: Job, vocabulary: int) -> Config:
    """The model's shape: one key/value head for two query heads where that divides, 8/3 hidden channels."""
    heads, hidden = job.width // HEAD, math.ceil(job.width * 8 / 3 / HEAD) * HEAD
    kv_heads = heads // 2 if heads % 2 == 0 else heads
    return Config(
        vocabulary=vocabulary,
        width=job.width,
        layers=job.layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=HEAD,
        hidden=hidden,
        context=job.length,
    )


def identity(job: Job) -> dict[str, Any]:
    """What a checkpoint is one of: all that decides the weights besides the text, which processes and engine do not."""
    return {one.name: getattr(job, one.name) for one in fields(Job) if one.name not in PROCESS}


def deepspeed_config(job: Job, world: int) -> dict[str, Any]:
    """The same job in DeepSpeed's words: batch, optimizer, schedule, clipping, precision, ZeRO stage.

    Its schedule is ours, but one update late in the warm-up.

    >>> found = deepspeed_config(Job(batch=32, accumulate=2), world=4)
    >>> [found[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    [32, 4, 2]
    """
    stage = job.zero_stage if job.zero_stage >= 0 else {"ddp": 0, "fsdp2": 3}[job.parallel]
    adamw = {"lr": job.lr, "betas": list(BETAS), "eps": EPS, "weight_decay": job.weight_decay}
    schedule = {"total_num_steps": job.steps, "warmup_num_steps": job.warmup, "warmup_type": "linear"}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    return {
        "train_batch_size": job.batch,
        "train_micro_batch_size_per_gpu": job.batch // (world * job.accumulate),
        "gradient_accumulation_steps": job.accumulate,
        "gradient_clipping": job.clip,
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": schedule | {"warmup_min_ratio": 0.0, "cos_min_ratio": FLOOR},
        },
        "zero_optimization": zero | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
        "bf16": {"enabled": job.precision == "bf16"},
        "fp16": {"enabled": job.precision == "fp16"} | ({"loss_scale": 0} if job.precision == "fp16" else {}),
        "steps_per_print": 1,
    }
