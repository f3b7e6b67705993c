"""The exercise of training/checkpoint: a run that goes on bit for bit from its saved state, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: training/checkpoint
import torch

from minillm.training.resume import order, rate, update_


def resume(state, x, y, *, steps, batch=4):
    """Go on with an interrupted run, and give back what the next checkpoint needs.

    state = (weight, momentum, step, position, generator), tensors as they were saved:
    step is the number of updates done; position is [epoch, taken], and taken rows of that
    epoch are used up; generator is the state of the torch.Generator that dropout draws from.

    Make `steps` updates. Each takes the next `batch` rows of order(len(x), epoch); where fewer
    than that are left, the next epoch begins. After n updates in all the learning rate is
    rate(n). update_(weight, momentum, x_rows, y_rows, lr=..., generator=...) makes one update in
    place and returns the loss. The state given must stay as it is: it may be used again.

    Return (losses [steps], weight, momentum, step, position, generator), the last five as above.
    """
    raise NotImplementedError
'''


def oracle(state, x, y, *, steps, batch=4):  # type: ignore[no-untyped-def]
    """In float64, all batches listed beforehand, the gradient row by row."""
    weight, momentum = (part.double().numpy().copy() for part in state[:2])
    done, (epoch, taken) = int(state[2]), state[3].tolist()
    dice = torch.Generator()
    dice.set_state(state[4])
    whole = len(x) // batch * batch
    first = epoch * whole + taken  # rows used up since the beginning of the run
    losses = []
    for used in range(first, first + steps * batch, batch):
        epoch = used // whole if used != first or taken < whole else epoch + 1
        shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).tolist()
        taken = used - epoch * whole + batch
        rows = shuffled[taken - batch : taken]
        kept = (torch.rand(batch, x.shape[1], generator=dice) < 0.8).double().numpy() / 0.8
        errors, gradient = [], np.zeros_like(weight)
        for row, mask in zip(rows, kept, strict=True):
            seen = x[row].double().numpy() * mask
            errors.append(float(seen @ weight) - float(y[row]))
            gradient += errors[-1] * seen / batch
        losses.append(sum(e * e for e in errors) / (2 * batch))
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.1 / (1 + done / 20) * momentum
        done += 1
    floats = (torch.from_numpy(np.asarray(part)).float() for part in (losses, weight, momentum))
    return *floats, torch.tensor(done), torch.tensor([epoch, taken]), dice.get_state()


def make_cases() -> list[Case]:
    dice = torch.Generator().manual_seed(0)
    saved = torch.Generator().manual_seed(71)
    torch.rand(5, generator=saved)

    def data(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, columns, generator=dice)
        return x, x @ torch.randn(columns, generator=dice)

    def state(columns: int, step: int, epoch: int, taken: int) -> tuple[Tensor, ...]:
        weight, momentum = torch.randn(2, columns, generator=dice)
        return weight, momentum, torch.tensor(step), torch.tensor([epoch, taken]), saved.get_state()

    begin = (torch.randn(4, generator=dice), torch.zeros(4), torch.tensor(0), torch.tensor([0, 0]), saved.get_state())
    return [
        Case("in the first epoch", (state(4, 2, 0, 8), *data(20, 4)), {"steps": 2}, "step 2: momentum, rate, position"),
        Case("into the next epoch", (state(4, 8, 1, 12), *data(20, 4)), {"steps": 4}, "an epoch ends on the way"),
        Case("at the end of an epoch", (state(4, 10, 1, 20), *data(20, 4)), {"steps": 1}, "all rows are used up"),
        Case("rows left over", (state(5, 6, 2, 8), *data(10, 5)), {"steps": 3}, "10 rows in batches of 4: 2 are left"),
        Case("other batches", (state(3, 40, 4, 3), *data(9, 3)), {"steps": 5, "batch": 3}, "batch=3, step 40"),
        Case("no steps", (state(4, 7, 1, 4), *data(12, 4)), {"steps": 0}, "steps=0: the state as it was, no losses"),
        Case("a run that begins", (begin, *data(12, 4)), {"steps": 4}, "step 0: nothing to restore"),
    ]


def two_halves(function: Callable[..., Any]) -> str | None:
    """Bit for bit: three steps and then four are seven."""
    _, x, y = make_cases()[0].args
    start = make_cases()[-1].args[0]
    whole = function(start, x, y, steps=7)
    first, *state = function(start, x, y, steps=3)
    last = function(state, x, y, steps=4)
    if not (
        torch.cat([first, last[0]]).equal(whole[0])
        and all(a.equal(b) for a, b in zip(last[1:], whole[1:], strict=True))
    ):
        return "Three steps and then four are not bit for bit the same as seven: something is lost at the resume."
    return None


def state_is_its_own(function: Callable[..., Any]) -> str | None:
    """A returned state that is the given one's tensors would change with it."""
    given, x, y = make_cases()[0].args
    result = function(given, x, y, steps=0)
    if any(a.data_ptr() == b.data_ptr() for a, b in zip(given[:2], result[1:3], strict=True)):
        return "With steps=0 the new state shares its tensors with the old one: whoever changes one changes both."
    return None


WEIGHT = "weight, momentum = state[0].clone(), state[1].clone()"
DONE = "    done = int(state[2])\n"
POSITION = "    epoch, taken = state[3].tolist()\n"
SET = "    generator.set_state(state[4])\n"
NEXT = "        if taken + batch > len(x):\n            epoch, taken = epoch + 1, 0\n"
ROWS = "rows = order(len(x), epoch)[taken : taken + batch]"
RETURN = "return losses, weight, momentum, torch.tensor(done), torch.tensor([epoch, taken]), generator.get_state()"
CHECKPOINT, LOOP = "training/checkpoint", "training/loop"
TORCH = 'torch.load(path, map_location="cpu", weights_only=True), said'

EXERCISE = Exercise(
    question="training/checkpoint",
    module="training/resume",
    function="resume",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("losses", "weight", "momentum", "step", "position", "generator"),
    rtol=1e-4,  # float32 after up to five steps, against float64
    atol=1e-5,
    wrong=(
        Wrong(
            "weights start anew",
            WEIGHT,
            "weight, momentum = torch.zeros_like(state[0]), state[1].clone()",
            "The weights are not those of the state: begin with state[0].",
        ),
        Wrong(
            "momentum forgotten",
            WEIGHT,
            "weight, momentum = state[0].clone(), torch.zeros_like(state[1])",
            "The momentum starts at zero: the optimizer's memory is part of the state. The first loss is still right, "
            "the second is not.",
        ),
        Wrong(
            "weights rounded to 16 bits",
            WEIGHT,
            "weight, momentum = state[0].half().float(), state[1].clone()",
            "The weights were rounded to float16 on the way: close, but the run is another one.",
        ),
        Wrong(
            "schedule starts anew",
            DONE,
            "    done = 0\n",
            "The step counts from 0 again, so the learning rate is that of the beginning: restore the schedule.",
        ),
        Wrong(
            "schedule one step ahead",
            "lr=rate(done)",
            "lr=rate(done + 1)",
            "The learning rate is one step ahead: after n updates the next one uses rate(n).",
        ),
        Wrong(
            "learning rate stands still",
            "        done += 1\n",
            "        done += 0\n",
            "The step does not move on: the learning rate falls with each update, and the new state needs its number.",
        ),
        Wrong(
            "rate of the resume",
            "lr=rate(done)",
            "lr=rate(i)",
            "The learning rate counts updates since this resume: rate(n) takes those since the beginning of the run.",
        ),
        Wrong(
            "rate of the first step",
            "lr=rate(done)",
            "lr=rate(int(state[2]))",
            "All updates use the learning rate of the first one: it falls with each update.",
        ),
        Wrong(
            "data from the beginning",
            POSITION,
            "    epoch, taken = 0, 0\n",
            "The data starts again at the first row of epoch 0: restore the position.",
        ),
        Wrong(
            "epoch from its beginning",
            POSITION,
            "    epoch, taken = int(state[3][0]), 0\n",
            "The epoch is right but starts again: rows that it had used up are read twice.",
        ),
        Wrong(
            "one order for all epochs",
            ROWS,
            "rows = order(len(x), 0)[taken : taken + batch]",
            "Every epoch reads in the order of epoch 0: its number decides the order.",
        ),
        Wrong(
            "no shuffling",
            ROWS,
            "rows = torch.arange(len(x))[taken : taken + batch]",
            "The rows are read as they stand: an epoch has an order of its own, order(len(x), epoch).",
        ),
        Wrong(
            "epoch ends too early",
            NEXT,
            "        if taken + batch >= len(x):\n            epoch, taken = epoch + 1, 0\n",
            "The last whole batch of an epoch is skipped: a new one begins only if fewer than `batch` rows are left.",
        ),
        Wrong(
            "epoch begins after the batch",
            "        taken += batch\n",
            "        taken += batch\n        if taken + batch > len(x):\n            epoch, taken = epoch + 1, 0\n",
            "The new position is already in the next epoch: a new one begins when the next batch is taken. Saved like "
            "this it reads the same rows, but it is not the position asked for.",
        ),
        Wrong(
            "dropout starts anew",
            SET,
            "",
            "The generator is a new one without the saved state: dropout draws other masks than the run would have "
            "drawn. Set its state.",
        ),
        Wrong(
            "dropout seeded anew",
            SET,
            "    generator.manual_seed(0)\n",
            "The generator is seeded anew: dropout draws other masks than the run would have drawn. Set its state.",
        ),
        Wrong(
            "the same masks at each step",
            "        losses[i] = update_(",
            "        generator.set_state(state[4])\n        losses[i] = update_(",
            "Every step draws the same dropout mask: set the generator's state once, before the loop.",
        ),
        Wrong(
            "old generator saved",
            RETURN,
            RETURN.replace("generator.get_state()", "state[4].clone()"),
            "The generator's state that you return is the old one: the next resume draws the same masks again.",
        ),
        Wrong(
            "steps since the resume",
            RETURN,
            RETURN.replace("torch.tensor(done)", "torch.tensor(steps)"),
            "The step returned counts from this resume on: the next one needs all updates since the beginning.",
        ),
        Wrong(
            "old position saved",
            RETURN,
            RETURN.replace("torch.tensor([epoch, taken])", "state[3].clone()"),
            "The position returned is the old one: the next resume reads these batches again.",
        ),
    ),
    also_wrong=(
        Wrong(
            "the state itself is trained",
            WEIGHT,
            "weight, momentum = state[0], state[1]",
            "The update changes the saved tensors in place: a second resume from them starts somewhere else.",
        ),
        Wrong(
            "momentum is trained in place",
            WEIGHT,
            "weight, momentum = state[0].clone(), state[1]",
            "The saved momentum changes with the run.",
        ),
        Wrong(
            "copied instead of renamed",
            "        os.replace(temporary, path)\n",
            "        path.write_bytes(temporary.read_bytes())\n",
            "A run that dies while it writes under the final name leaves a file that is cut off.",
            CHECKPOINT,
        ),
        Wrong(
            "no fsync",
            "            os.fsync(file.fileno())  # the data, before the name says that it is there\n",
            "",
            "The name may be on the disk before the data: after a power cut the file is empty.",
            CHECKPOINT,
        ),
        Wrong(
            "folder not synced",
            "        os.replace(temporary, path)\n        sync_folder(folder)\n",
            "        os.replace(temporary, path)\n",
            "Without a sync of the folder the rename itself is only in memory.",
            CHECKPOINT,
        ),
        Wrong(
            "no copy before the background save",
            "self.writer.submit(self._write, snapshot(state), step)",
            "self.writer.submit(self._write, state, step)",
            "state_dict() is the live tensors: the file mixes the weights of several steps.",
            CHECKPOINT,
        ),
        Wrong(
            "no copy on a CPU",
            'return state.detach().to("cpu", copy=True)',
            "return state.detach().cpu()",
            "cpu() of a tensor on the CPU is the tensor itself, no snapshot.",
            CHECKPOINT,
        ),
        Wrong(
            "errors of the writer are lost",
            "            pending.result()\n",
            "            pending.exception()\n",
            "A save that fails in the background must be heard of at the next call.",
            CHECKPOINT,
        ),
        Wrong(
            "checksum not compared",
            "if sha.hexdigest().encode() != digest:",
            "if len(digest) != 64:",
            "torch.load takes a flipped bit for a weight: the checksum refuses it.",
            CHECKPOINT,
        ),
        Wrong(
            "pickle runs",
            TORCH,
            TORCH.replace("True", "False"),
            "A file from elsewhere may hold code: weights_only=True refuses it.",
            CHECKPOINT,
        ),
        Wrong(
            "newest taken, good or not",
            "    for path in reversed(checkpoints(folder)):\n",
            "    for path in checkpoints(folder)[-1:]:\n",
            "If the newest file is damaged the one before it is used.",
            CHECKPOINT,
        ),
        Wrong(
            "only damaged ones are a fresh start",
            "    if skipped:\n        raise",
            "    if False:\n        raise",
            "A run that finds only damaged files must not silently begin anew.",
            CHECKPOINT,
        ),
        Wrong(
            "interval without the 2",
            "return math.sqrt(2 * save_seconds * between_failures)",
            "return math.sqrt(save_seconds * between_failures)",
            "A failure costs half an interval on average: sqrt(2 C M).",
            CHECKPOINT,
        ),
        Wrong(
            "live state",
            "return copy.deepcopy(state)  # state_dict() of a module or optimizer is the live tensors",
            "return state",
            "state_dict() gives the live tensors: they move on with the run.",
            LOOP,
        ),
        Wrong(
            "snapshot used up",
            "zip(self.optimizers, copy.deepcopy(saved), strict=True)",
            "zip(self.optimizers, saved, strict=True)",
            "An optimizer keeps the tensors that load_state_dict gives it: the snapshot then moves with the run.",
            LOOP,
        ),
        Wrong(
            "random numbers not restored",
            '        set_random_state(state["random"])\n',
            "",
            "Dropout draws other numbers after the resume.",
            LOOP,
        ),
        Wrong(
            "position in the data not restored",
            '        self.loader.load_state_dict(state["loader"])\n',
            "",
            "The resumed run reads the first batches again.",
            LOOP,
        ),
    ),
    probes=(Probe("two halves", two_halves, wrong_too=True), Probe("a state of its own", state_is_its_own)),
    hints=(
        "Five things come out of `state` before the loop. Clone the weights and the momentum: update_ works in place.",
        "generator = torch.Generator(); generator.set_state(state[4]). And position is [epoch, taken], two numbers.",
        "Before a batch: if taken + batch > len(x), the next epoch begins with taken = 0. After it, taken += batch.",
        "The returned step counts from the beginning of the run; the returned generator is generator.get_state().",
    ),
)
