"""Contract of LAAC's mathematics (methods.md section 8, item 11): the gap is 0 where policy and reference agree; gap
and grounding do not see a constant added to the critic while the temporal difference shifts by what it must; the actor
does not see the reference; a bandit's critic has a closed form with an L2 term, is unbounded below without one, and
bounded again by the norm projection. Chunked expectations equal the dense ones, gradients included.

Not checked: that anything is learned (test_laac_training.py).
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.laac_losses import (
    Grounding,
    actor_loss,
    backup_error,
    bounded_target,
    critic_loss,
    follow,
    gap,
    grounding,
    project_norms,
)
from trainer.policy_expectation import FixedPolicy, best_items, entropy, expectation

ROWS, ITEMS, ANSWERS = 5, 9, 3
ITEM = st.integers(0, ITEMS - 1)


def world(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f(s, .), pi(.|s), logged actions, and the reference as items and weights; one row has no reference."""
    random = torch.Generator().manual_seed(seed)
    value_BN = torch.randn(ROWS, ITEMS, generator=random, dtype=torch.float64)
    policy_BN = torch.rand(ROWS, ITEMS, generator=random, dtype=torch.float64).softmax(1)
    action_B = torch.randint(ITEMS, (ROWS,), generator=random)
    answer_BR = torch.stack([torch.randperm(ITEMS, generator=random)[:ANSWERS] for _ in range(ROWS)])
    weight_BR = torch.full((ROWS, ANSWERS), 1 / ANSWERS, dtype=torch.float64)
    weight_BR[-1] = 0
    return value_BN, policy_BN, action_B, answer_BR, weight_BR


def dense(answer_BR: Tensor, weight_BR: Tensor) -> Tensor:
    return torch.zeros(ROWS, ITEMS, dtype=torch.float64).scatter_add(1, answer_BR, weight_BR)


def terms(value_BN: Tensor, seed: int, form: Grounding) -> tuple[Tensor, Tensor]:
    """Gap and grounding of the rows with a reference."""
    _, policy_BN, action_B, answer_BR, weight_BR = world(seed)
    has_B = weight_BR.sum(1) > 0
    answer_value_BR = value_BN.gather(1, answer_BR)
    gap_B = gap((policy_BN * value_BN).sum(1), (weight_BR * answer_value_BR).sum(1))
    data_B = value_BN.gather(1, action_B[:, None])[:, 0]
    return gap_B[has_B], grounding(data_B, answer_value_BR, weight_BR, form)[has_B]


def test_the_gap_is_zero_where_the_policy_is_the_reference() -> None:
    value_BN, _, _, answer_BR, weight_BR = world(0)
    policy_BN = dense(answer_BR, weight_BR)
    found_B = gap((policy_BN * value_BN).sum(1), (weight_BR * value_BN.gather(1, answer_BR)).sum(1))
    assert float(found_B.abs().max()) < 1e-15
    other_BN = policy_BN.roll(1, 1)
    moved_B = gap((other_BN * value_BN).sum(1), (weight_BR * value_BN.gather(1, answer_BR)).sum(1))
    assert float(moved_B[:-1].abs().min()) > 1e-6


@pytest.mark.parametrize("form", Grounding)
@given(seed=st.integers(0, 1000), constant=st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_gap_and_grounding_do_not_see_a_constant(form: Grounding, seed: int, constant: float) -> None:
    value_BN = world(seed)[0]
    before, after = terms(value_BN, seed, form), terms(value_BN + constant, seed, form)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 1000), constant=st.floats(-0.2, 0.2), discount=st.floats(0, 0.95))
@settings(max_examples=20, deadline=None)
def test_the_temporal_difference_shifts_by_what_is_not_discounted(seed: int, constant: float, discount: float) -> None:
    """With the target shifted too: (1 - discount) * c where the session goes on, c where it ended."""
    random = torch.Generator().manual_seed(seed)
    data_B, next_B = torch.rand(2, ROWS, generator=random, dtype=torch.float64) * 0.2 + 0.4
    reward_B = torch.full((ROWS,), 0.5, dtype=torch.float64)
    done_B = torch.rand(ROWS, generator=random) < 0.5

    def residual(shift: float) -> Tensor:
        return data_B + shift - bounded_target(reward_B, done_B, next_B + shift, discount)

    moved_B = residual(constant) - residual(0.0)
    wanted_B = constant * torch.where(done_B, 1.0, 1 - torch.full((ROWS,), discount, dtype=torch.float64))
    torch.testing.assert_close(moved_B, wanted_B, rtol=0, atol=1e-12)


def test_targets_are_clipped_to_what_rewards_can_be_worth() -> None:
    reward_B, done_B = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([False, False, True])
    found_B = bounded_target(reward_B, done_B, torch.tensor([1e6, -1e6, 1e6]), 0.9)
    torch.testing.assert_close(found_B, torch.tensor([10.0, 0.0, 1.0]))


def test_the_forms_of_the_grounding() -> None:
    data_B = torch.tensor([1.0, 3.0, 7.0])
    answer_BR = torch.tensor([[2.0, 4.0], [1.0, 1.0], [9.0, 9.0]])
    weight_BR = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.0, 0.0]])
    found = {form: grounding(data_B, answer_BR, weight_BR, form).tolist() for form in Grounding}
    assert found == {
        Grounding.SQUARE: [4.0, 4.0, 0.0],
        Grounding.HINGE: [4.0, 0.0, 0.0],
        Grounding.PER_ACTION: [5.0, 4.0, 0.0],
    }


def test_the_residual_takes_half_of_each_backup_and_its_gradient() -> None:
    data_B = torch.tensor([2.0], requires_grad=True)
    own_B = torch.tensor([4.0], requires_grad=True)
    error_B = backup_error(data_B, torch.tensor([1.0]), own_B)
    assert error_B.tolist() == [0.5 * 1 + 0.5 * 4]
    error_B.sum().backward()  # type: ignore[no-untyped-call]
    assert data_B.grad is not None
    assert own_B.grad is not None
    assert (float(data_B.grad), float(own_B.grad)) == (1.0 - 2.0, 2.0)


def test_a_large_alpha_drives_the_reference_to_the_log() -> None:
    """The bandit's minimiser has f(reference) - f(a) = O(1/alpha)."""
    apart = [float(bandit_minimiser(alpha, ridge=1e-3) @ (reference() - logged())) for alpha in (1.0, 10, 1e3, 1e5)]
    assert all(abs(more) < abs(less) for less, more in itertools.pairwise(apart))
    assert abs(apart[-1]) < 1e-4


def test_the_actor_does_not_see_the_reference() -> None:
    value_BN, _, _, answer_BR, weight_BR = world(3)
    gradients = []
    for answers in (answer_BR, answer_BR.flip(0)):
        logit_BN = torch.zeros(ROWS, ITEMS, dtype=torch.float64, requires_grad=True)
        policy_B = (logit_BN.softmax(1) * value_BN).sum(1)
        # Maximising L(f1, pi) is maximising f1(s,pi): the reference's part has no gradient in pi.
        loss = -gap(policy_B, (weight_BR * value_BN.gather(1, answers)).sum(1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(logit_BN.grad)
        logit_BN.grad = None
        actor_loss((logit_BN.softmax(1) * value_BN).sum(1), None, 0.0).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(logit_BN.grad)
    assert all(one is not None and torch.equal(one, gradients[0]) for one in gradients)
    assert float(gradients[0].abs().max()) > 0  # type: ignore[union-attr]


def test_the_sum_is_divided_by_a_weight_above_one() -> None:
    parts = (torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))
    assert float(critic_loss(*parts, alpha=4.0, beta=2.0, normalized_sum=False)) == 15.0
    assert float(critic_loss(*parts, alpha=4.0, beta=2.0, normalized_sum=True)) == 15.0 / 4
    assert float(critic_loss(*parts, alpha=0.5, beta=0.5, normalized_sum=True)) == 3.5


# -- the bandit: one state, five items; the log has items 0 and 1, the reference answers 1 and 2, the policy likes 4


def logged() -> Tensor:
    return torch.tensor([0.7, 0.3, 0, 0, 0], dtype=torch.float64)


def reference() -> Tensor:
    return torch.tensor([0, 0.5, 0.5, 0, 0], dtype=torch.float64)


def policy() -> Tensor:
    return torch.tensor([0.1, 0.2, 0.1, 0.0, 0.6], dtype=torch.float64)


def bandit_minimiser(alpha: float, ridge: float) -> Tensor:
    """Of p.f - q.f + alpha * sum_a d_a (f_a - q.f)^2 + ridge * |f|^2, which is quadratic in f."""
    p, q, d = policy(), reference(), logged()
    deviation_NN = torch.eye(5, dtype=torch.float64) - q
    matrix_NN = alpha * deviation_NN.T @ torch.diag(d) @ deviation_NN + ridge * torch.eye(5, dtype=torch.float64)
    return torch.linalg.solve(2 * matrix_NN, q - p)


def bandit_loss(value_N: Tensor, alpha: float) -> Tensor:
    """The same without the ridge, through the losses: a row per logged item, weighted by its share of the log."""
    p, q, d = policy(), reference(), logged()
    rows = torch.arange(2)
    answer_R = torch.tensor([1, 2])
    answer_value_BR = value_N[answer_R].expand(2, 2)
    weight_BR = q[answer_R].expand(2, 2)
    gap_B = gap((p * value_N).sum().expand(2), (weight_BR * answer_value_BR).sum(1))
    grounding_B = grounding(value_N[rows], answer_value_BR, weight_BR, Grounding.SQUARE)
    share_B = d[rows]
    return critic_loss(
        (share_B * gap_B).sum(),
        (share_B * grounding_B).sum(),
        torch.zeros((), dtype=torch.float64),
        alpha=alpha,
        beta=0.0,
        normalized_sum=False,
    )


def test_the_bandits_critic_has_a_closed_form_with_an_l2_term() -> None:
    alpha, ridge = 2.0, 0.5
    value_N = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([value_N], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = bandit_loss(value_N, alpha) + ridge * value_N.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(value_N.detach(), bandit_minimiser(alpha, ridge), rtol=0, atol=1e-7)


def descended(limit: float | None) -> tuple[list[float], Tensor]:
    """Losses of plain gradient descent on the bandit's critic, and its last values."""
    value = torch.nn.ParameterList([torch.zeros(5, dtype=torch.float64)])
    losses = []
    for _ in range(400):
        loss = bandit_loss(value[0], 5.0)
        value.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            value[0] -= 0.05 * value[0].grad  # type: ignore[operator]
        if limit is not None:
            project_norms(list(value), limit)
        losses.append(float(bandit_loss(value[0], 5.0).detach()))
    return losses, value[0].detach()


def test_without_projection_the_loss_has_no_lower_bound_and_with_it_one() -> None:
    losses, value_N = descended(None)
    # Item 4 is in neither the log nor the reference: nothing quadratic holds it, its slope is the policy's share.
    far = torch.zeros(5, dtype=torch.float64)
    far[4] = -1.0
    for scale in (1e3, 1e6):
        assert float(bandit_loss(scale * far, 5.0)) == pytest.approx(-scale * float(policy()[4]))
    assert losses[-1] < losses[199] - 0.9 * 200 * 0.05 * 0.36
    assert float(value_N[4]) == pytest.approx(-400 * 0.05 * 0.6)
    bounded, value_N = descended(3.0)
    assert float(value_N.norm()) == pytest.approx(3.0)
    assert abs(bounded[-1] - bounded[199]) < 1e-6
    assert bounded[-1] > losses[-1]


def test_projection_scales_only_what_is_too_long_and_counts_it() -> None:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        module.bias.copy_(torch.tensor([0.5, 0.0]))
    assert project_norms(list(module.parameters()), 1.0) == 1
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    assert module.bias.tolist() == [0.5, 0.0]


def test_a_target_follows_its_network() -> None:
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = 0.75 * target.weight.detach() + 0.25 * source.weight.detach()
    follow(list(target.parameters()), list(source.parameters()), 0.25)
    torch.testing.assert_close(target.weight.detach(), wanted)


# -- expectations over the catalogue


@pytest.mark.parametrize("chunk", [4, 13, 100])
def test_chunked_expectations_and_gradients_are_the_dense_ones(chunk: int) -> None:
    random = torch.Generator().manual_seed(7)
    shapes = ((6, 5), (13, 5), (13, 5), (13, 2))
    leaves = [torch.randn(*shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mean_weight, lse_weight = torch.randn(6, 2, generator=random).double(), torch.randn(6, generator=random).double()

    def objective(lse_B: Tensor, first_BV: Tensor, second_BV: Tensor) -> Tensor:
        return (lse_weight * lse_B).sum() + first_BV.square().sum() + (mean_weight * second_BV).sum()

    query, key, first, second = leaves
    logits = query @ key.T
    policy_BN = logits.softmax(1)
    wanted = torch.autograd.grad(objective(logits.logsumexp(1), policy_BN @ first, policy_BN @ second), leaves)
    lse_B, means = expectation(query, key, (first, second), chunk=chunk)
    torch.testing.assert_close(lse_B, logits.logsumexp(1))
    torch.testing.assert_close(means[1], policy_BN @ second)
    found = torch.autograd.grad(objective(lse_B, *means), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    # The values alone: nothing else is asked for, and nothing else is computed.
    _, (only,) = expectation(query.detach(), key.detach(), (second,), chunk=chunk)
    (found_value,) = torch.autograd.grad(only.square().sum(), second)
    (wanted_value,) = torch.autograd.grad((policy_BN.detach() @ second).square().sum(), second)
    torch.testing.assert_close(found_value, wanted_value)
    wanted_entropy = -(policy_BN * policy_BN.log()).sum(1)
    torch.testing.assert_close(entropy(query, *_with_keys(query, key, chunk)), wanted_entropy)
    assert best_items(query, key, chunk=chunk).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("chunk", [4, 13, 100])
def test_what_players_see_of_one_policy_is_the_dense_expectation(chunk: int) -> None:
    random = torch.Generator().manual_seed(8)
    shapes = ((6, 5), (13, 5), (13, 5), (13, 2))
    query, key, first, second = (
        torch.randn(*shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    state = torch.randn(6, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(6, generator=random, dtype=torch.float64)
    policy, dense_BN = FixedPolicy(query, key, chunk=chunk), (query @ key.T).softmax(1)
    torch.testing.assert_close(torch.cat([part for _, part in policy.chunks()], 1), dense_BN.detach())
    # A critic: gradients to its rows alone, and only to those that want them.
    found, other = policy.means(first, second.detach())
    wanted = dense_BN.detach() @ first
    torch.testing.assert_close((found, other), (wanted, dense_BN.detach() @ second.detach()))
    for one, dense in ((found, wanted), (policy.means(second)[0], dense_BN.detach() @ second)):
        leaf = first if one is found else second
        (gradient,) = torch.autograd.grad(one.square().sum(), leaf)
        torch.testing.assert_close(gradient, torch.autograd.grad(dense.square().sum(), leaf)[0])
    # The actor: gradients to its states and items, none to the critic.
    value_B = policy.value(query, key, state, first)
    dense_B = (dense_BN * (state @ first.detach().T)).sum(1)
    torch.testing.assert_close(value_B, dense_B)
    gradients = torch.autograd.grad((weight * value_B).sum(), (query, key), retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad((weight * dense_B).sum(), (query, key)))
    assert torch.autograd.grad(value_B.sum(), first, allow_unused=True) == (None,)


def test_one_value_of_both_critics_is_their_mean() -> None:
    from reward.laac import LaacShape
    from trainer.laac_modules import Critics
    from trainer.laac_settings import LaacSettings

    with torch.random.fork_rng():
        torch.manual_seed(3)
        critics = Critics(LaacShape(n_items=11, width=8, history=3), LaacSettings())
        policy = FixedPolicy(torch.randn(4, 8), torch.randn(11, 8))
        state = torch.randn(4, 8)
    both = torch.stack(critics.policy_values(state, policy))
    joint = critics.mean_policy_value(state, policy)
    torch.testing.assert_close(joint, both.mean(0))
    items = [network.item_ND for network in critics.twins]
    wanted = torch.autograd.grad(both.mean(0).square().sum(), items)
    torch.testing.assert_close(torch.autograd.grad(joint.square().sum(), items), wanted)


def _with_keys(query: Tensor, key: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    lse_B, means = expectation(query, key, (key,), chunk=chunk)
    return lse_B, means[0]


def test_large_logits_do_not_overflow() -> None:
    query, key = torch.tensor([[300.0]]), torch.tensor([[1.0], [2.0], [-5.0]])
    lse_B, (mean_BV,) = expectation(query, key, (key,), chunk=2)
    assert (float(lse_B[0]), float(mean_BV[0, 0])) == (600.0, 2.0)


MEMORY = """
import resource, torch
from trainer.policy_expectation import expectation
torch.set_num_threads(1)
query = torch.randn(64, 8, requires_grad=True)
key, value = (torch.randn(500_000, 8, requires_grad=True) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lse, (mean,) = expectation(query, key, (value,))
(lse.sum() + mean.square().sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, float(key.grad.abs().sum()))
"""


def test_half_a_million_items_need_no_matrix_of_the_batch() -> None:
    """One matrix of 64 rows and so many items has 122 MiB; both gradients together have 31 MiB."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=os.environ)
    mib, gradient = found.stdout.split()
    assert int(mib) < 100
    assert math.isfinite(float(gradient))
