"""GRPO and its variants: advantages of groups, what each loss divides by and cuts, and equality with TRL."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minillm.alignment.grpo import (
    centred_advantages,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    each_token,
    group_advantages,
    grpo_loss,
    gspo_loss,
    informative,
    loss_of_groups,
    overlong_penalty,
    reference_kl,
)
from minillm.alignment.kl import k3_weighted
from minillm.alignment.log_probs import sequence_mean, span_mask

LIMIT = 20
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOSSES = {
    "grpo": grpo_loss,
    "dapo": dapo_loss,
    "dr_grpo": lambda *args: dr_grpo_loss(*args, limit=LIMIT),
    "gspo": lambda *args: gspo_loss(*args, low=0.1, high=0.15),
    "cispo": lambda *args: cispo_loss(*args, most=1.2),
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rollout(b=6, t=9, seed=0, dtype=torch.float64):
    """Log-probabilities of policy and old policy, one advantage a response, and masks of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = span_mask(torch.zeros(b, dtype=torch.long), torch.randint(1, t + 1, (b,), generator=generator), t)
    mask[0, 2:] = False
    old = -randn(b, t, seed=seed + 1, dtype=dtype).abs()
    policy = (old + 0.4 * randn(b, t, seed=seed + 2, dtype=dtype)).requires_grad_()
    return policy, old, randn(b, seed=seed + 3, dtype=dtype), mask


def two_lengths(advantage):
    """A response of 1 token and one of 4, ratios 1, the same advantage: what differs is only what a loss divides by."""
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    old = -randn(2, 4).abs()
    return old.clone().requires_grad_(), old, torch.tensor([advantage, advantage], dtype=torch.float64), mask


def gradient(loss, policy, *rest):
    return torch.autograd.grad(loss(policy, *rest), policy)[0]


# Advantages


def test_advantages_by_hand():
    # mean 2, squares 4 + 0 + 4 over g - 1 = 2 is 4, deviation 2: advantages -1, 0, 1
    rewards = torch.tensor([[0.0, 2.0, 4.0]])
    torch.testing.assert_close(group_advantages(rewards, eps=0.0), torch.tensor([[-1.0, 0.0, 1.0]]))
    torch.testing.assert_close(group_advantages(rewards, eps=2.0), torch.tensor([[-0.5, 0.0, 0.5]]))
    torch.testing.assert_close(centred_advantages(rewards), torch.tensor([[-2.0, 0.0, 2.0]]))


def test_a_group_knows_nothing_of_the_others():
    rewards = randn(3, 4)
    other = rewards.clone()
    other[1:] = 100 * randn(2, 4, seed=1)
    for advantages in (group_advantages, centred_advantages):
        assert advantages(rewards)[0].equal(advantages(other)[0])
        torch.testing.assert_close(advantages(rewards).sum(1), torch.zeros(3, dtype=torch.float64))


def test_scale_and_zero_of_rewards_do_not_matter_to_grpo_and_the_scale_does_to_dr_grpo():
    rewards = randn(3, 4)
    torch.testing.assert_close(group_advantages(10 * rewards + 5, eps=0.0), group_advantages(rewards, eps=0.0))
    torch.testing.assert_close(centred_advantages(10 * rewards + 5), 10 * centred_advantages(rewards))


@pytest.mark.parametrize(("reward", "g"), [(0.3, 6), (1.7, 7), (0.7, 8)])
def test_equal_rewards_have_no_advantage_because_of_eps(reward, g):
    # the mean of equal float32 numbers may be one rounding off; divided by a deviation of the same size that is 1
    rewards = torch.full((1, g), reward)
    assert group_advantages(rewards).abs().max() < 2e-3  # rounding of 1.2e-7 over 1e-4
    assert not informative(rewards).any()


def test_dividing_by_the_deviation_favours_prompts_that_are_nearly_always_solved():
    # 1 wrong of 8, and 4 of 8: advantages over the group, in absolute value, 2 * 7/8 and 4. The deviations are
    # sqrt(7/8 / 7) = 0.354 and sqrt(2 / 7) = 0.535, so the ratio shrinks from 2.29 to 1.51
    easy, middling = torch.ones(8), torch.tensor([1.0, 0.0] * 4)
    easy[0] = 0
    rewards = torch.stack([middling, easy])
    plain, scaled = (x.abs().sum(1) for x in (centred_advantages(rewards), group_advantages(rewards, eps=0.0)))
    assert plain[0] / plain[1] == pytest.approx(4 / 1.75)
    assert scaled[0] / scaled[1] == pytest.approx(4 / 1.75 * math.sqrt((1 / 8) / (2 / 7)))


def test_centred_rewards_are_a_leave_one_out_baseline_but_for_a_factor():
    rewards = randn(3, 5)
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    torch.testing.assert_close(centred_advantages(rewards), (1 - 1 / 5) * (rewards - others))


def test_informative_groups_are_those_with_a_difference():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert informative(rewards).tolist() == [False, False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_the_penalty_for_length_by_hand(device):
    # limit 100, buffer 20: from 80 on (80 - length) / 20, never below -1
    length = torch.tensor([1, 80, 85, 100, 101, 999])
    expected = torch.tensor([0, 0, -0.25, -1, -1, -1])
    torch.testing.assert_close(overlong_penalty(length.to(device), limit=100, buffer=20).cpu(), expected)


# What each loss divides by


def test_the_losses_by_hand():
    # Response 1: a token of ratio 1.5 and A = 2, cut at 1.2: 2.4. Response 2: ratios 1 and 0.5 and A = -1: -1 and
    # min(-0.5, -0.8) = -0.8.
    ratio = torch.tensor([[1.5, 7.0], [1.0, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    old = torch.tensor([[-1.0, -1.0], [-2.0, -3.0]], dtype=torch.float64)
    args = (old + ratio.log(), old, advantages, mask)
    assert grpo_loss(*args).item() == pytest.approx(-(2.4 - 0.9) / 2)  # means 2.4 and -0.9, then their mean
    # room up to 1.28: 2.56 - 1 - 0.8 over 3 tokens
    assert dapo_loss(*args).item() == pytest.approx(-(2.56 - 1.8) / 3)
    assert dr_grpo_loss(*args, limit=10).item() == pytest.approx(-(2.4 - 1.8) / 2 / 10)
    # ratios of responses 1.5 and sqrt(0.5) = 0.707; cut at 1.2 above: 2.4; below: min(-0.707, -0.8)
    assert gspo_loss(*args, low=0.2, high=0.2).item() == pytest.approx(-(2.4 - 0.8) / 2)
    # weights min(1.5, 1.2), 1 and 0.5 times advantage times log p: over 3 tokens
    logs = (args[0][0, 0].item(), args[0][1, 0].item(), args[0][1, 1].item())
    by_hand = -(1.2 * 2 * logs[0] - 1 * logs[1] - 0.5 * logs[2]) / 3
    assert cispo_loss(*args, most=1.2).item() == pytest.approx(by_hand)


def test_grpo_punishes_the_token_of_a_long_wrong_response_less():
    pull = gradient(grpo_loss, *two_lengths(-1.0))
    torch.testing.assert_close(pull[0, 0], 4 * pull[1, 0])
    torch.testing.assert_close(pull[0].sum(), pull[1].sum())  # each response weighs the same


@pytest.mark.parametrize("loss", [dapo_loss, lambda *a: dr_grpo_loss(*a, limit=LIMIT), cispo_loss])
def test_with_the_others_every_token_weighs_the_same(loss):
    pull = gradient(loss, *two_lengths(-1.0))
    torch.testing.assert_close(pull[0, 0].expand(4), pull[1])


def test_the_token_of_dr_grpo_weighs_the_same_in_any_batch_and_that_of_dapo_does_not():
    # beside longer responses
    policy, old, advantages, mask = two_lengths(1.0)
    longer = mask.clone()
    longer[0] = True
    assert gradient(dr_grpo_short, policy, old, advantages, mask)[1].equal(
        gradient(dr_grpo_short, policy, old, advantages, longer)[1]
    )
    before, after = (gradient(dapo_loss, policy, old, advantages, m)[1] for m in (mask, longer))
    torch.testing.assert_close(before / after, torch.full((4,), 8 / 5, dtype=torch.float64))  # tokens of the batch


def dr_grpo_short(*args):
    return dr_grpo_loss(*args, limit=4)


def test_in_the_first_step_all_are_reinforce_with_their_own_weights():
    policy, _, advantages, mask = rollout()
    old = policy.detach()
    lengths = mask.sum(1, keepdim=True)
    direction = torch.where(mask, -advantages[:, None], 0)
    weights = {
        "grpo": 1 / lengths / 6,
        "dapo": 1 / mask.sum(),
        "dr_grpo": torch.tensor(1 / LIMIT / 6),
        "gspo": 1 / lengths / 6,
        "cispo": 1 / mask.sum(),
    }
    for name, loss in LOSSES.items():
        torch.testing.assert_close(gradient(loss, policy, old, advantages, mask), direction * weights[name])


# What each one cuts


@pytest.mark.parametrize(
    ("name", "advantage", "ratio", "slope"),
    [
        ("grpo", 1.0, 1.25, 0.0),
        ("dapo", 1.0, 1.25, -1.25),  # clip-higher
        ("dapo", 1.0, 1.3, 0.0),
        ("dapo", -1.0, 0.75, 0.0),
        ("dr_grpo", -1.0, 0.75, 0.0),
        ("grpo", -1.0, 1.5, 1.5),
        ("cispo", 1.0, 1.5, -1.2),  # the weight is cut, the gradient stays
        ("cispo", 1.0, 0.5, -0.5),
        ("cispo", -1.0, 0.5, 0.5),
        ("gspo", 1.0, 1.2, 0.0),
        ("gspo", 1.0, 1.1, -1.1),
        ("gspo", -1.0, 0.85, 0.0),
    ],
)
def test_the_gradient_of_a_single_token(name, advantage, ratio, slope):
    log_p = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    rest = (torch.zeros_like(log_p), torch.tensor([advantage], dtype=torch.float64), torch.tensor([[True]]))
    size = LIMIT if name == "dr_grpo" else 1
    assert size * gradient(LOSSES[name], log_p, *rest).item() == pytest.approx(slope)


def test_gspo_cuts_whole_responses_by_their_mean_log_ratio():
    # ratios 2 and 1/2 give 1: nothing is cut, though grpo cuts the first token
    ratio = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    policy = ratio.log().requires_grad_()
    rest = (torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(gradient(gspo_loss, policy, *rest), torch.tensor([[-0.5, -0.5]]).double())
    assert gradient(grpo_loss, policy, *rest)[0, 0] == 0
    # four tokens of ratio 1.1: 1.1 for the mean, 1.46 for the product
    policy = torch.full((1, 4), math.log(1.1), dtype=torch.float64, requires_grad=True)
    rest = (torch.zeros(1, 4).double(), torch.ones(1).double(), torch.ones(1, 4, dtype=torch.bool))
    assert gspo_loss(policy, *rest, low=0.2, high=0.2).item() == pytest.approx(-1.1)


# KL


def test_the_kl_term_by_hand():
    # k3 for log ratios ln 2 and -ln 2 and 0: 1/2 - 1 + ln 2, 2 - 1 - ln 2 and 0; means 0.25 and 0
    policy = torch.tensor([[math.log(2), -math.log(2)], [0.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert reference_kl(policy, torch.zeros(2, 2), mask).item() == pytest.approx(0.125)


# As a whole


def test_the_whole_loss_by_hand():
    # rewards 1 and 0: deviation 0.7071, advantages +-0.5 / 0.7072. Response 1: ratios 1.5, cut at 1.2, and 1: mean
    # 1.1; response 2: ratio 1 (its second token is padding). k3 of log ratios ln 2 and 0: 1/2 - 1 + ln 2 and 0, mean
    # of response 1 half of that, mean over both a quarter.
    old = torch.full((1, 2, 2), -1.0, dtype=torch.float64)
    policy = old + torch.tensor([[[1.5, 1.0], [1.0, 9.0]]], dtype=torch.float64).log()
    reference = policy - torch.tensor([[[2.0, 1.0], [1.0, 7.0]]], dtype=torch.float64).log()
    mask = torch.tensor([[[True, True], [True, False]]])
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = -(1.1 - 1.0) * advantage / 2 + 0.3 * (math.log(2) - 0.5) / 4
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert loss_of_groups(policy, old, reference, rewards, mask, beta=0.3).item() == pytest.approx(expected)


def test_the_whole_loss_equals_the_textbook_group_by_group():
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(7) < torch.randint(1, 8, (3, 4, 1), generator=generator)
    old, reference = -randn(3, 4, 7).abs(), -randn(3, 4, 7, seed=1).abs()
    policy = (old + 0.4 * randn(3, 4, 7, seed=2)).requires_grad_()
    rewards = randn(3, 4, seed=3)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(3):
        for i in range(4):
            gain = (rewards[n, i] - rewards[n].mean()) / (rewards[n].var().sqrt() + 1e-4)
            kept = mask[n, i]
            new, before, start = policy[n, i][kept], old[n, i][kept], reference[n, i][kept]
            ratio, back = new.exp() / before.exp(), start.exp() / new.exp()
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.7, 1.3) * gain)
            total = total + (surrogate - 0.2 * (back - back.log() - 1)).mean() / 12
    loss = loss_of_groups(policy, old, reference, rewards, mask, clip=0.3, beta=0.2)
    torch.testing.assert_close(loss, -total)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (loss, -total)))


def test_the_whole_loss_of_equal_rewards_pulls_towards_the_reference_only():
    old, mask = -randn(2, 3, 5).abs(), torch.ones(2, 3, 5, dtype=torch.bool)
    policy, equal = old.clone().requires_grad_(), torch.ones(2, 3, dtype=torch.float64)
    assert (torch.autograd.grad(loss_of_groups(policy, old, old - 1, equal, mask, beta=0.0), policy)[0] == 0).all()
    pull = torch.autograd.grad(loss_of_groups(policy, old, old - 1, equal, mask, beta=0.5), policy)[0]
    torch.testing.assert_close(pull, torch.full_like(pull, 0.5 * (1 - math.exp(-1)) / 30))


# Loops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_losses_equal_loops(seed, device):
    policy, old, advantages, mask = (x.to(device) for x in rollout(seed=10 * seed))
    p, o, a, m = (x.tolist() for x in (policy, old, advantages, mask))
    total = dict.fromkeys(LOSSES, 0.0)

    def cut(ratio, advantage, low, high):
        return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)

    for i in range(6):
        kept = [j for j in range(9) if m[i][j]]
        logs = [p[i][j] - o[i][j] for j in kept]
        gains = [cut(math.exp(x), a[i], 0.2, 0.2) for x in logs]
        total["grpo"] += sum(gains) / len(kept) / 6
        total["dr_grpo"] += sum(gains) / LIMIT / 6
        total["dapo"] += sum(cut(math.exp(x), a[i], 0.2, 0.28) for x in logs) / mask.sum().item()
        total["gspo"] += cut(math.exp(sum(logs) / len(kept)), a[i], 0.1, 0.15) / 6
        weighed = [min(math.exp(x), 1.2) * a[i] * p[i][j] for x, j in zip(logs, kept, strict=True)]
        total["cispo"] += sum(weighed) / mask.sum().item()
    for name, loss in LOSSES.items():
        assert loss(policy, old, advantages, mask).item() == pytest.approx(-total[name]), name


# Where gradients go

ALL = {**LOSSES, "kl": lambda policy, old, advantages, mask: reference_kl(policy, old, mask)}


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_masked_tokens_have_no_gradient_even_if_they_are_no_numbers(loss):
    policy, old, advantages, mask = rollout()
    clean = loss(policy, old, advantages, mask)
    pull = torch.autograd.grad(clean, policy)[0]
    assert (pull[~mask] == 0).all()
    assert (pull[mask] != 0).any()
    dirty = policy.detach().masked_fill(~mask, -torch.inf).requires_grad_()
    value = loss(dirty, old.masked_fill(~mask, -torch.inf), advantages, mask)
    torch.testing.assert_close(value, clean)
    torch.testing.assert_close(torch.autograd.grad(value, dirty)[0], pull)


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_no_gradient_flows_into_old_reference_and_advantages(loss):
    policy, old, advantages, mask = rollout()
    old.requires_grad_()
    advantages.requires_grad_()
    loss(policy, old, advantages, mask).backward()
    assert policy.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_no_gradient_flows_into_rewards():
    rewards = randn(2, 4).requires_grad_()
    assert not group_advantages(rewards).requires_grad
    assert not centred_advantages(rewards).requires_grad


# Production

REASON = "TRL comes with the extra parity, for its tests alone"
KINDS = {
    "grpo": ({"loss_type": "grpo"}, grpo_loss),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, dapo_loss),
    "dr_grpo": ({"loss_type": "dr_grpo"}, LOSSES["dr_grpo"]),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
        LOSSES["gspo"],
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, LOSSES["cispo"]),
}


@pytest.mark.parametrize(
    ("kind", "beta", "weighted"),
    [*((kind, 0.0, False) for kind in KINDS), ("grpo", 0.04, False), ("gspo", 0.04, False), ("grpo", 0.04, True)],
)
def test_equals_trl(kind, beta, weighted):
    trl = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON)
    settings, ours = KINDS[kind]
    policy, old, advantages, mask = rollout(dtype=torch.float32)
    reference = (old + 0.3 * randn(6, 9, seed=9)).float()
    args = SimpleNamespace(use_bias_correction_kl=weighted, delta=None, steps_per_generation=1)
    fake = SimpleNamespace(
        **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, **settings},
        args=args,
        beta=beta,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **more: (policy, torch.zeros(6, 9), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long),
        "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trl.GRPOTrainer._compute_loss(fake, None, inputs)
    kl = reference_kl(policy, reference, mask)
    if weighted:  # TRL's default: k3 times the ratio
        kl = sequence_mean(k3_weighted(policy, reference, old).masked_fill(~mask, 0), mask).mean()
    loss = ours(policy, old, advantages, mask) + beta * kl
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (loss, theirs)))


def test_advantages_equal_trl():
    trl = pytest.importorskip("trl.trainer.utils", reason=REASON)
    rewards = randn(3, 5, dtype=torch.float32)
    # the lines of GRPOTrainer._generate_and_score_completions with scale_rewards "group", around TRL's own nanstd
    centred = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    torch.testing.assert_close(centred_advantages(rewards), centred)
    theirs = centred / (trl.nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), theirs)


# Refusals


@pytest.mark.parametrize("function", [group_advantages, centred_advantages])
def test_refuses_groups_of_one_and_what_is_no_groups(function):
    with pytest.raises(ValueError, match=r"with at least 2 responses, got \(3, 1\)"):
        function(randn(3, 1))
    with pytest.raises(ValueError, match=r"rewards are \[prompts, responses\] with at least 2 responses, got \(8,\)"):
        function(randn(8))


def test_refuses_advantages_that_are_not_one_a_response():
    policy, old, _, mask = rollout()
    for loss in (grpo_loss, dapo_loss, cispo_loss):
        with pytest.raises(
            ValueError, match=r"one advantage for each of 6 responses, got \(2, 3\): flatten the groups"
        ):
            loss(policy, old, randn(2, 3), mask)
    with pytest.raises(ValueError, match="one advantage for each of 6 responses"):
        each_token(randn(1), mask)
    with pytest.raises(ValueError, match="one advantage for each of 6 responses"):
        gspo_loss(policy, old, randn(1), mask)


def test_refuses_settings_without_sense():
    policy, old, advantages, mask = rollout()
    with pytest.raises(ValueError, match="at least 1 token at most, got a limit of 0"):
        dr_grpo_loss(policy, old, advantages, mask, limit=0)
    with pytest.raises(ValueError, match="the largest weight is greater than 0, got 0"):
        cispo_loss(policy, old, advantages, mask, most=0)
    with pytest.raises(ValueError, match="the buffer is from 1 token to the limit of 10, got 11"):
        overlong_penalty(torch.tensor([3]), limit=10, buffer=11)
