"""DPO and its relatives: by hand, masked exactly, the reference untouched, closed forms, equal to TRL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minillm.alignment.dpo import dpo_loss, implicit_reward, ipo_loss, kto_loss, kto_reference, simpo_loss
from minillm.alignment.log_probs import span_mask
from minillm.alignment.reward_model import bradley_terry_loss

LN2 = math.log(2)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs(b=4, t=6, seed=0, dtype=torch.float64):
    """Log-probabilities of policy and reference, and masks of responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(1, 3, (2 * b,), generator=generator)
    mask = span_mask(start, start + torch.randint(1, t - 2, (2 * b,), generator=generator), t).view(2, b, t)
    policy, reference = (-randn(2, b, t, seed=seed + i, dtype=dtype).abs() for i in (1, 2))
    return policy.requires_grad_(), reference, mask


def lists(*tensors):
    return [x.tolist() for x in tensors]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


LOSSES = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "simpo": lambda policy, reference, mask: simpo_loss(policy, mask),
    "kto": lambda policy, reference, mask: kto_loss(
        policy.flatten(0, 1),
        reference.flatten(0, 1),
        mask.flatten(0, 1),
        torch.arange(mask[..., 0].numel()) < mask.shape[1],
        torch.tensor(0.3, dtype=policy.dtype),
    ),
}


# By hand


def test_dpo_by_hand():
    # One pair, beta 0.5. Chosen: log ratios 1.0 and 1.0 (and a masked 50), so the reward is 0.5 * 2 = 1.
    # Rejected: log ratio -1, reward -0.5. Loss: -log sigmoid(1.5).
    policy = torch.tensor([[[-1.0, -1.0, -50.0]], [[-3.0, -50.0, -50.0]]])
    reference = torch.tensor([[[-2.0, -2.0, -100.0]], [[-2.0, -100.0, -100.0]]])
    mask = torch.tensor([[[True, True, False]], [[True, False, False]]])
    assert implicit_reward(policy, reference, mask, beta=0.5).tolist() == [[1.0], [-0.5]]
    assert dpo_loss(policy, reference, mask, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    # IPO: means 1 and -1, so h = 2; the target 1 / (2 * 0.5) is 1: (2 - 1)^2
    assert ipo_loss(policy, reference, mask, beta=0.5).item() == pytest.approx(1.0)
    # SimPO: means of the policy alone -1 and -3: 0.5 * 2 - 0.25 = 0.75
    assert simpo_loss(policy, mask, beta=0.5, gamma=0.25).item() == pytest.approx(math.log1p(math.exp(-0.75)))


def test_kto_by_hand():
    # log ratios 2 (good) and -1 (bad), point of reference 0.5, beta 1: 1 - sigmoid(1.5) and 1 - sigmoid(0.5 + 1)
    policy, reference = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[-3.0], [-2.0]])
    mask, good = torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False])
    loss = kto_loss(policy, reference, mask, good, torch.tensor(0.5), beta=1.0)
    assert loss.item() == pytest.approx(1 - sigmoid(1.5))
    weighed = kto_loss(policy, reference, mask, good, torch.tensor(0.5), beta=1.0, gain=3.0, loss=5.0)
    assert weighed.item() == pytest.approx(4 * (1 - sigmoid(1.5)))  # (3 + 5) / 2 times


def test_the_point_of_reference_of_kto_by_hand():
    # sums of log ratios over the mask 3 and -1: mean 1; the other way round it is -1, so 0
    policy, reference = torch.tensor([[2.0, 1.0], [-1.0, 9.0]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    assert kto_reference(policy, reference, mask).item() == 1.0
    assert kto_reference(reference, policy, mask).item() == 0.0


# Closed forms


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_while_policy_and_reference_agree_nothing_is_known(beta):
    policy, _, mask = pairs()
    assert dpo_loss(policy, policy.detach(), mask, beta=beta).item() == pytest.approx(LN2)
    assert ipo_loss(policy, policy.detach(), mask, beta=beta).item() == pytest.approx((1 / (2 * beta)) ** 2)
    good = torch.tensor([True, False, True, False])
    kto = kto_loss(policy[0], policy[0].detach(), mask[0], good, torch.zeros((), dtype=torch.float64), beta=beta)
    assert kto.item() == pytest.approx(0.5)


def test_dpo_is_the_loss_of_the_reward_model_that_the_policy_is():
    policy, reference, mask = pairs()
    chosen, rejected = implicit_reward(policy, reference, mask, beta=0.3)
    torch.testing.assert_close(dpo_loss(policy, reference, mask, beta=0.3), bradley_terry_loss(chosen, rejected))


def test_a_term_of_the_prompt_cancels():
    policy, reference, mask = pairs()
    prompt = randn(4, seed=9)
    # the same amount for both responses to a prompt, put on their first token
    first = mask & (mask.cumsum(-1) == 1)
    shifted = policy + torch.where(first, prompt[None, :, None], 0)
    torch.testing.assert_close(dpo_loss(shifted, reference, mask), dpo_loss(policy, reference, mask))


def test_the_optimum_is_the_policy_that_maximises_reward_minus_kl():
    # Four responses of one token, every pair compared, preferences by Bradley and Terry with rewards r. The optimum
    # must be the closed form: reference * exp(r / beta), normalised.
    beta, r = 0.5, torch.tensor([0.0, 0.2, -0.3, 0.4], dtype=torch.float64)
    reference = randn(4).log_softmax(0)
    first, second = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    weight = (r[first] - r[second]).sigmoid()  # how often `first` is chosen
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)
    mask = torch.ones(2, 1, 1, dtype=torch.bool)

    def closure():
        optimizer.zero_grad()
        log_p = logits.log_softmax(0)
        losses = [
            w * dpo_loss(log_p[[i, j]].view(2, 1, 1), reference[[i, j]].view(2, 1, 1), mask, beta=beta)
            for i, j, w in zip(first.tolist(), second.tolist(), weight, strict=True)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (reference + r / beta).softmax(0)
    # 200 iterations of LBFGS leave less than 1e-6
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=0, atol=1e-6)


# Gradients


def test_the_gradient_of_dpo_is_beta_times_the_probability_of_the_wrong_order():
    policy, reference, mask = pairs()
    dpo_loss(policy, reference, mask, beta=0.3).backward()
    chosen, rejected = implicit_reward(policy.detach(), reference, mask, beta=0.3)
    pull = 0.3 * (rejected - chosen).sigmoid() / 4  # a mean over 4 pairs
    torch.testing.assert_close(policy.grad[0], torch.where(mask[0], -pull[:, None], 0))
    torch.testing.assert_close(policy.grad[1], torch.where(mask[1], pull[:, None], 0))


def test_ipo_pulls_back_behind_its_target_and_dpo_does_not():
    mask = torch.ones(2, 1, 1, dtype=torch.bool)
    reference = torch.zeros(2, 1, 1, dtype=torch.float64)
    for h, sign in [(4.0, -1), (6.0, 1)]:  # the target is 1 / (2 * 0.1) = 5
        policy = torch.tensor([h, 0.0], dtype=torch.float64).view(2, 1, 1).requires_grad_()
        (pull,) = torch.autograd.grad(ipo_loss(policy, reference, mask, beta=0.1), policy)
        assert pull[0].sign().item() == sign
        (pull,) = torch.autograd.grad(dpo_loss(policy, reference, mask, beta=0.1), policy)
        assert pull[0].item() < 0


def test_kto_raises_good_responses_and_lowers_bad_ones():
    policy, reference, mask = pairs()
    good = torch.tensor([True, False, True, False])
    kto_loss(policy[0], reference[0], mask[0], good, torch.tensor(0.2).double()).backward()
    expected = torch.where(good, -1.0, 1.0)[:, None] * mask[0]
    assert policy.grad[0].sign().equal(expected.double())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_masked_tokens_have_no_gradient_even_if_they_are_no_numbers(loss):
    policy, reference, mask = pairs()
    clean = loss(policy, reference, mask)
    dirty = policy.detach().masked_fill(~mask, -torch.inf).requires_grad_()
    value = loss(dirty, reference.masked_fill(~mask, -torch.inf), mask)
    torch.testing.assert_close(value, clean)
    value.backward()
    assert (dirty.grad == 0).equal(~mask)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_gradient_flows_into_the_reference(loss):
    policy, reference, mask = pairs()
    reference.requires_grad_()
    loss(policy, reference, mask).backward()
    assert reference.grad is None
    assert policy.grad is not None


def test_no_gradient_flows_into_the_point_of_reference():
    policy, reference, mask = pairs()
    kl = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    kto_loss(policy[0], reference[0], mask[0], torch.tensor([True] * 4), kl).backward()
    assert kl.grad is None
    assert not kto_reference(policy[0], reference[0], mask[0]).requires_grad


# Length


def test_dpo_sums_and_the_others_average_over_tokens():
    # both responses twice over, token by token
    policy, reference, mask = (x.detach() for x in pairs())
    twice = [torch.cat([x, x], dim=-1) for x in (policy, reference, mask)]
    torch.testing.assert_close(
        implicit_reward(*twice, beta=0.1), 2 * implicit_reward(policy, reference, mask, beta=0.1)
    )
    torch.testing.assert_close(ipo_loss(*twice), ipo_loss(policy, reference, mask))
    torch.testing.assert_close(simpo_loss(twice[0], twice[2]), simpo_loss(policy, mask))


# Loops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_losses_equal_loops(seed, device):
    policy, reference, mask = (x.to(device) for x in pairs(seed=10 * seed))
    beta, gamma = 0.3, 0.4
    p, q, m = lists(policy, reference, mask)
    dpo = ipo = simpo = 0.0
    for row in range(4):
        total, mean, own = [], [], []
        for side in (0, 1):
            kept = [i for i in range(6) if m[side][row][i]]
            ratio = sum(p[side][row][i] - q[side][row][i] for i in kept)
            total.append(ratio)
            mean.append(ratio / len(kept))
            own.append(sum(p[side][row][i] for i in kept) / len(kept))
        dpo -= math.log(sigmoid(beta * (total[0] - total[1]))) / 4
        ipo += (mean[0] - mean[1] - 1 / (2 * beta)) ** 2 / 4
        simpo -= math.log(sigmoid(beta * (own[0] - own[1]) - gamma)) / 4
    assert dpo_loss(policy, reference, mask, beta=beta).item() == pytest.approx(dpo)
    assert ipo_loss(policy, reference, mask, beta=beta).item() == pytest.approx(ipo)
    assert simpo_loss(policy, mask, beta=beta, gamma=gamma).item() == pytest.approx(simpo)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_kto_equals_a_loop(seed, device):
    policy, reference, mask = (x[0].to(device) for x in pairs(seed=10 * seed))
    p, q, m = lists(policy, reference, mask)
    good, expected = [True, False, False, True], 0.0
    for row in range(4):
        ratio = sum(p[row][i] - q[row][i] for i in range(6) if m[row][i])
        expected += 2.0 * (1 - sigmoid(0.3 * (ratio - 0.7))) if good[row] else 1 - sigmoid(0.3 * (0.7 - ratio))
    kl = torch.tensor(0.7, dtype=torch.float64, device=device)
    loss = kto_loss(policy, reference, mask, torch.tensor(good, device=device), kl, beta=0.3, gain=2.0)
    assert loss.item() == pytest.approx(expected / 4)


# Production

REASON = "TRL comes with the extra parity, for its tests alone"


def model(log_probs):
    """What TRL asks of a model: the log-probabilities that its labels leave, and numbers that it only reports."""
    zero = torch.zeros_like(log_probs)
    out = SimpleNamespace(log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero.bool(), aux_loss=None)
    return lambda **_: out


def trainer(**more):
    """A trainer's settings without the trainer, so that its own loss can be called."""
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        aux_loss_enabled=False,
        beta=0.3,
        **more,
    )


@pytest.mark.parametrize(("kind", "ours"), [("sigmoid", dpo_loss), ("ipo", ipo_loss)])
def test_equals_trl_dpo(kind, ours):
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason=REASON)
    policy, reference, mask = pairs(dtype=torch.float32)
    # TRL's masks are of the tokens read, one more than are predicted
    of_tokens = torch.cat([torch.zeros(8, 1, dtype=torch.long), mask.flatten(0, 1).long()], dim=1)
    ref_chosen, ref_rejected = (reference * mask).sum(-1)
    fake = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros(8, 7, dtype=torch.long),
        "completion_mask": of_tokens,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    theirs = trl.DPOTrainer._compute_loss(fake, model((policy * mask).flatten(0, 1)), inputs, False)
    loss = ours(policy, reference, mask, beta=0.3)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (loss, theirs)))


def test_equals_trl_kto():
    trl = pytest.importorskip("trl.trainer.kto_trainer", reason=REASON)
    policy, reference, mask = pairs(dtype=torch.float32)
    other, other_reference = reference[1] + 0.2, reference[1]
    good = torch.tensor([True, False, False, True])
    of_tokens = torch.cat([torch.zeros(4, 1, dtype=torch.long), mask[0].long()], dim=1)
    fake = trainer(
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: (other * mask[1]).sum(-1),
    )
    inputs = {
        "input_ids": torch.zeros(4, 7, dtype=torch.long),
        "completion_mask": of_tokens,
        "label": good,
        "ref_logps": (reference[0] * mask[0]).sum(-1),
        "ref_KL_logps": (other_reference * mask[1]).sum(-1),
    }
    theirs = trl.KTOTrainer._compute_loss(fake, model(policy[0] * mask[0]), inputs, False)
    kl = kto_reference(other, other_reference, mask[1])
    assert kl > 0  # the case says something about it
    ours = kto_loss(policy[0], reference[0], mask[0], good, kl, beta=0.3, gain=1.5, loss=0.5)
    torch.testing.assert_close(ours, theirs)


def test_equals_trl_simpo(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason=REASON)
    policy, _, mask = pairs(dtype=torch.float32)
    settings = {"alpha": 0.0, "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.5, "label_smoothing": 0.0}
    fake = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (policy * mask).sum(-1) / mask.sum(-1)  # get_batch_logps with average_log_prob
    theirs = trl.CPOTrainer.cpo_loss(fake, chosen, rejected)[0].mean()
    torch.testing.assert_close(simpo_loss(policy, mask, beta=2.0, gamma=1.5), theirs)


# Refusals


def test_refuses_a_beta_that_is_not_positive():
    policy, reference, mask = pairs()
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="beta is greater than 0, got 0"):
            loss(policy, reference, mask, beta=0)
    with pytest.raises(ValueError, match=r"beta is greater than 0, got -0\.1"):
        simpo_loss(policy, mask, beta=-0.1)


def test_refuses_what_is_not_pairs():
    policy, reference, mask = (x[0] for x in pairs())
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match=r"pairs are a tensor \[2, b, t\], .*, got \(4, 6\)"):
            loss(policy, reference, mask)
    with pytest.raises(ValueError, match="pairs are a tensor"):
        simpo_loss(policy, mask)


def test_refuses_a_mask_of_another_shape():
    policy, reference, mask = pairs()
    with pytest.raises(ValueError, match=r"one bool for each token of \(2, 4, 6\), got \(2, 4, 5\)"):
        dpo_loss(policy, reference, mask[..., :-1])
