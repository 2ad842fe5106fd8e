"""Kernel regression against its sums, one task at a time; against ridge and logistic heads; and against Bayes."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.kernel import Kernel
from metatrain.meta.logistic import Logistic
from metatrain.meta.ridge import Ridge
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=0.4).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def by_hand(meta: Kernel, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Scores of one task's query, its kernel entry by entry."""
    learner, is_click = meta.learner, meta.loss == "binary_cross_entropy"
    learned = {name: log.exp() for name, log in meta.logs.items()}

    def entry(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = learner.represent(a), learner.represent(b)
        near = torch.exp(-(a - b).square().sum() / (2 * learned["lengthscale"] ** 2))
        if meta.kind == "smoother":
            return near
        return learned["linear"] * (a @ b) + learned["bias"] + learned["rbf"] * near

    def matrix(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([entry(a, b) for a in rows for b in x]).view(len(rows), len(x))

    if not len(x):
        return learner(query)
    offset, k = learner(x), matrix(query)
    if meta.kind == "smoother":
        change = k @ (y - (torch.sigmoid(offset) if is_click else offset)) / (learned["nothing_known"] + k.sum(1))
        return learner(query) + (learned["gain"] * change if is_click else change)
    gram, eye = matrix(x), torch.eye(len(x), dtype=x.dtype)
    if not is_click:
        return learner(query) + k @ torch.linalg.inv(gram + learned["noise"] * eye) @ (y - offset)
    # The most probable logits beside the offset, by Newton in the form with W and without its root, halved by Armijo.
    f = torch.zeros_like(offset)
    inverse = torch.linalg.inv(gram)

    def objective(f: torch.Tensor) -> float:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(offset + f, y, reduction="sum")
        return float((losses + 0.5 * f @ inverse @ f).detach())

    for _ in range(meta.newton_steps):
        p = torch.sigmoid(offset + f)
        w = p * (1 - p)
        d = gram @ torch.linalg.inv(eye + w.unsqueeze(1) * gram) @ (w * f + y - p) - f
        t, slope = 1.0, float(((p - y + inverse @ f) * d).sum().detach())
        while objective(f + t * d) > objective(f) + 1e-4 * t * slope + 1e-12:
            t /= 2
        f = f + t * d
    return learner(query) + k @ inverse @ f


SMOOTHER = {"kind": "smoother", "lengthscale": 2.0, "nothing_known": 0.7}
PROCESS = {"kind": "gaussian_process", "lengthscale": 1.5, "linear": 0.3, "bias": 0.4, "rbf": 0.8}


@pytest.mark.parametrize(
    "settings",
    [
        {**SMOOTHER, "loss": "squared"},
        {**SMOOTHER, "loss": "binary_cross_entropy"},
        {**PROCESS, "loss": "huber", "noise": 0.6},
        {**PROCESS, "loss": "binary_cross_entropy", "newton_steps": 4},
    ],
    ids=["smoother", "smoother, clicks", "process", "process, clicks"],
)
def test_meta_gradient_is_that_of_a_loop_over_tasks(settings: dict):
    click = settings["loss"] == "binary_cross_entropy"
    meta = Kernel(factorisation(), **settings).double()
    episodes = made_up(support=5, click=click)
    losses = []
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        events = int(episodes.support.mask[task].sum())
        scores = by_hand(meta, alone.support.x[0, :events], alone.support.labels[0, :events], alone.query.x[0])
        losses.append(meta.event_loss(scores, alone.query.labels[0]).mean())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = Kernel(factorisation(), **settings).float()
    single.load_state_dict(meta.state_dict())
    narrow = single(made_up(support=5, click=click, dtype=torch.float32))
    assert_close(meta_gradient(single, narrow.total), expected)


@pytest.mark.parametrize("support", [4, 20], ids=["fewer events than regressors", "more"])
@pytest.mark.parametrize("click", [False, True])
def test_a_linear_kernel_alone_is_a_ridge_or_a_logistic_head(support: int, click: bool):
    linear, bias, noise = 0.4, 1.7, 1.0 if click else 0.6
    settings = {"strength": noise / linear, "bias_strength": noise / bias}
    if click:
        process = Kernel(factorisation(), loss="binary_cross_entropy", linear=linear, bias=bias, rbf=0)
        head = Logistic(factorisation(), **settings)
    else:
        process = Kernel(factorisation(), linear=linear, bias=bias, rbf=0, noise=noise)
        head = Ridge(factorisation(), **settings)
    process, head, episodes = process.double(), head.double(), made_up(support=support, click=click)
    with torch.no_grad():
        process.logs["linear"].fill_(linear).log_()
        for log, value in ((head.log_strength, noise / linear), (head.log_bias_strength, noise / bias)):
            log.fill_(value).log_()
        process.logs["bias"].fill_(bias).log_()
        if not click:
            process.logs["noise"].fill_(noise).log_()
    one, other = process(episodes), head(episodes)
    torch.testing.assert_close(one.after, other.after, rtol=1e-9, atol=1e-9)
    of_process, of_head = meta_gradient(process, one.total), meta_gradient(head, other.total)
    shared = [name for name in of_process if name.startswith("learner.")]
    assert_close({n: of_process[n] for n in shared}, {n: of_head[n] for n in shared}, 1e-6)
    torch.testing.assert_close(of_process["logs.linear"], -of_head["log_strength"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(of_process["logs.bias"], -of_head["log_bias_strength"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["smoother", "gaussian_process"])
@pytest.mark.parametrize("click", [False, True])
def test_contract(kind: str, click: bool):
    loss = "binary_cross_entropy" if click else "squared"
    check_contract(lambda: Kernel(factorisation(), loss=loss, kind=kind), click=click)
    check_contract(lambda: Kernel(MLP(LAYOUT.width, (6,), "tanh", offset=0.3), loss=loss, kind=kind), click=click)


def bare(width: int) -> torch.nn.Module:
    """A base learner that represents an event by its inputs, and knows nothing."""
    learner = torch.nn.Identity()
    learner.represented = width
    learner.represent = lambda x: x
    learner.score = lambda h, x: torch.zeros_like(x[..., 0])
    return learner


def trained(meta: Kernel, x: torch.Tensor, y: torch.Tensor, support: int) -> tuple[float, Examples, Examples]:
    """Trains all parameters on half of the tasks. The mean query loss, support and query of the other half."""
    ones, half = torch.ones_like(y), len(x) // 2
    parts = [Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, support), slice(support, None))]
    training, held_out = (Episodes(*(part.tasks(*of) for part in parts), {}) for of in ((0, half), (half, len(x))))
    optimizer = torch.optim.LBFGS(meta.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean = meta(training).total / half
        mean.backward()
        return mean

    optimizer.step(loss)
    return float(meta(held_out).after.mean()), held_out.support, held_out.query


def test_functions_of_a_process_are_learned_as_bayes_would():
    """Functions are drawn from a Gaussian process of known kernel and noise: no predictor beats its posterior mean. The
    meta-gradient must lead to its lengthscale and to its ratios of amplitude to noise."""
    lengthscale, linear, bias, rbf, noise, tasks = 0.7, 0.5, 0.3, 1.0, 0.4, 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(tasks, 24, 1, generator=generator, dtype=torch.float64) * 4 - 2
    near = torch.exp(-(x - x.mT).square() / (2 * lengthscale**2))
    k = linear * x @ x.mT + bias + rbf * near + noise * torch.eye(24, dtype=torch.float64)
    draw = torch.randn(tasks, 24, 1, generator=generator, dtype=torch.float64)
    y = (torch.linalg.cholesky(k) @ draw).squeeze(-1)
    meta = Kernel(bare(1), kind="gaussian_process").double()
    after, support, query = trained(meta, x, y, 10)
    k = k[tasks // 2 :]
    mean = (k[:, 10:, :10] @ torch.linalg.solve(k[:, :10, :10], support.labels.unsqueeze(-1))).squeeze(-1)
    best = float((mean - query.labels).square().mean())
    assert best < after < 1.005 * best
    learned = {name: float(log.detach().exp()) for name, log in meta.logs.items()}
    assert learned["lengthscale"] == pytest.approx(lengthscale, rel=0.1)
    assert learned["rbf"] / learned["noise"] == pytest.approx(rbf / noise, rel=0.3)


def test_far_kinds_of_items_are_smoothed_as_bayes_would():
    """Items are of two kinds far apart; of each a task has a level of its own, normal with known variance, and labels
    are noisy levels: no predictor beats the posterior mean, which is the smoother's where κ is noise / prior."""
    noise, prior, tasks = 0.5, 0.4, 4000
    generator = torch.Generator().manual_seed(0)
    level = prior**0.5 * torch.randn(tasks, 2, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 2, (tasks, 16), generator=generator)
    y = level.gather(1, kind) + noise**0.5 * torch.randn(tasks, 16, generator=generator, dtype=torch.float64)
    x = kind.unsqueeze(-1) * 8.0
    meta = Kernel(bare(1), kind="smoother").double()
    after, support, query = trained(meta, x.double(), y, 6)
    same = (support.x.mT == query.x).double()
    mean = (same @ support.labels.unsqueeze(-1)).squeeze(-1) / (same.sum(-1) + noise / prior)
    best = float((mean - query.labels).square().mean())
    assert best < after < 1.002 * best
    assert float(meta.logs["nothing_known"].detach().exp()) == pytest.approx(noise / prior, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "smoothed"}, "unknown kind 'smoothed'"),
        ({"kind": "smoother", "noise": 1.0}, "a smoother under the loss 'squared' has no noise"),
        ({"newton_steps": 3}, "has no newton_steps"),
        ({"kind": "smoother", "loss": "binary_cross_entropy", "newton_steps": 3}, "has no newton_steps"),
        ({"nothing_known": 1.0}, "a gaussian_process under the loss 'squared' has no nothing_known"),
        ({"loss": "binary_cross_entropy", "noise": 1.0}, "under the loss 'binary_cross_entropy' has no noise"),
        ({"loss": "binary_cross_entropy", "newton_steps": 0}, "newton_steps must be at least 1, got 0"),
        ({"noise": 0.0}, "noise must be above 0, got 0"),
        ({"linear": -1.0}, "linear must be at least 0, got -1"),
        ({"linear": 0.0, "bias": 0.0, "rbf": 0.0}, "all 0"),
        ({"rbf": 0.0, "lengthscale": 1.0}, "lengthscale is of the term"),
    ],
)
def test_refusals(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Kernel(factorisation(), **settings)


def test_a_base_learner_must_represent():
    with pytest.raises(ValueError, match="no `represent`"):
        Kernel(torch.nn.Linear(3, 1))
