"""Real steps counted: by hand where that can be done, and as PyTorch's own tracker counts them."""

from dataclasses import replace

import pytest
import torch

from minillm.architecture.transformer import Config
from minillm.finetuning.measured import build, loss_of, measure, mode, tracked
from minillm.finetuning.memory import Job, activations, estimate, last_norm

SMALL = Config(vocabulary=1024, width=128, layers=4, heads=4, kv_heads=2, head_size=32, hidden=352, context=512)
JOB = Job(SMALL, 2, 256, precision="fp32", rank=4, device="cpu")
CLOSE = 0.05  # of what is measured, as in test_memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "mixed"},
        {"precision": "bf16", "attention": "naive"},
        {"optimizer": "adam8bit", "chunk": 64},
        {"method": "lora", "checkpoint": True},
        {"method": "qlora", "precision": "mixed", "checkpoint": True, "chunk": 64},
    ],
)
def test_a_step_takes_what_was_estimated(options):
    job = replace(JOB, **options)
    (found, peak), expected = measure(job), estimate(job)
    for part in ("weights", "gradients", "master", "optimizer"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part), rel=CLOSE)
    assert found.activations == activations(job) + last_norm(job)
    assert peak == pytest.approx(expected.total, rel=CLOSE)


def test_states_by_hand():
    found, peak = measure(replace(JOB, precision="mixed"))
    count = sum(p.numel() for p in build(JOB).parameters())
    assert (found.weights, found.gradients, found.master) == (2 * count, 2 * count, 4 * count)
    assert 8 * count < found.optimizer < 8.01 * count  # and a step count a tensor
    assert peak > found.states + found.activations


@pytest.mark.parametrize("options", [{}, {"attention": "naive"}, {"checkpoint": True}, {"chunk": 64}])
def test_every_way_computes_the_same(options):
    ids = torch.randint(1024, (2, 256), generator=torch.Generator().manual_seed(0))
    job, losses = replace(JOB, **options), []
    torch.manual_seed(0)
    model = build(job)
    for way in (JOB, job):
        with mode(way, model):
            losses.append(loss_of(model, way, ids))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"precision": "bf16"}])
def test_pytorch_s_tracker_counts_what_is_measured(options):
    job = replace(JOB, **options)
    kinds, (found, peak) = tracked(job), measure(job)
    assert (kinds["param"], kinds["grad"]) == (found.weights, found.gradients)
    assert kinds["total"] == pytest.approx(peak, rel=CLOSE)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"zero": 1}, {"ranks": 2}, {"offload": "all"}])
def test_measures_one_process_on_the_cpu(options):
    with pytest.raises(ValueError, match="measured is one process without offload on the CPU, got zero="):
        measure(replace(JOB, **options))


@pytest.mark.parametrize("options", [{"method": "lora"}, {"optimizer": "adam8bit"}, {"precision": "mixed"}])
def test_tracks_full_fine_tuning(options):
    with pytest.raises(ValueError, match="tracked is full, adamw, bf16 or fp32, got"):
        tracked(replace(JOB, **options))
