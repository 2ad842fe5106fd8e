"""TaNP against a loop over tasks and events written from its formulas; its noise; and families with a known optimum."""

from __future__ import annotations

import math

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task, padded
from torch import Tensor, nn

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.noise import label_noise
from metatrain.meta.tanp import TaNP, gaussian_divergence
from metatrain.model.learners.mlp import MLP

SMALL = {"encoder": (7, 6), "width": 5, "decoder": (6, 4), "clusters": 3, "shrinkage": 1.5}


def tanp(loss: str = "squared", **options) -> TaNP:
    torch.manual_seed(1)
    meta = TaNP(
        MLP(LAYOUT.width, (5,), "tanh", offset=3.0 if loss != "binary_cross_entropy" else 0.0),
        layout=LAYOUT,
        loss=loss,
        **{**SMALL, **options},
    ).double()
    # Far from the start, where the correction is small.
    nn.init.normal_(meta.head.weight, std=0.7)
    nn.init.normal_(meta.head.bias)
    return meta


# --- the formulas, one task and one event at a time ----------------------------------------------------------------


def encoded(meta: TaNP, x: Tensor, y: Tensor) -> Tensor:
    """What the encoder says of one event."""
    score = meta.learner(x)
    left = y - (1 / (1 + torch.exp(-score)) if meta.loss == "binary_cross_entropy" else score)
    h = meta.encode_x.weight @ x + meta.encode_x.bias + meta.encode_label.weight[:, 0] * left
    for layer in meta.encoder:
        h = layer.weight @ h.clamp(min=0) + layer.bias
    return h


def summary(meta: TaNP, said: list[Tensor]) -> Tensor:
    n, kappa = len(said), meta.log_shrinkage.exp()
    mean = sum(said) / n if n else torch.zeros(meta.decode_task.in_features - 1, dtype=torch.float64)
    return torch.cat([mean, (n / (n + kappa)).reshape(1)])


def assigned(meta: TaNP, r: Tensor) -> Tensor:
    if meta.pool is None:
        return r
    a = meta.freedom
    kernel = [(1 + ((r - centre) ** 2).sum() / a) ** (-(a + 1) / 2) for centre in meta.pool]
    return r + sum(k / sum(kernel) * centre for k, centre in zip(kernel, meta.pool, strict=True))


def modulation(matrix: Tensor, o: Tensor, width: int, gated: bool) -> tuple[Tensor, Tensor]:
    gamma, beta = torch.tanh(matrix[:width] @ o), torch.tanh(matrix[width : 2 * width] @ o)
    if gated:
        eta, delta = torch.tanh(matrix[2 * width : 3 * width] @ o), torch.sigmoid(matrix[3 * width :] @ o)
        gamma, beta = delta * gamma + (1 - delta) * eta, delta * beta + (1 - delta) * eta
    return 1 + gamma, beta


def scored(meta: TaNP, x: Tensor, r: Tensor, z: Tensor) -> Tensor:
    """Score of one event of a task that the support sums up by r."""
    o, gated = assigned(meta, r), meta.film[0].out_features == 4 * meta.decode_x.out_features
    before = meta.decode_x.weight @ x + meta.decode_x.bias + meta.decode_task.weight @ z
    for number, film in enumerate(meta.film):
        if number:
            layer = meta.decoder[number - 1]
            before = layer.weight @ h + layer.bias  # noqa: F821
        gamma, beta = modulation(film.weight, o, len(before), gated)
        h = (gamma * before + beta).clamp(min=0)
    return meta.learner(x) + r[-1] * (meta.head.weight[0] @ h + meta.head.bias[0])


def gauss(meta: TaNP, r: Tensor) -> tuple[Tensor, Tensor]:
    both = meta.gaussian.weight @ r + meta.gaussian.bias
    return both[: len(r)], 0.1 + 0.9 / (1 + torch.exp(-both[len(r) :]))


def task_loss(meta: TaNP, alone: Episodes, noise: Tensor | None = None) -> Tensor:
    """Loss of one task. With `noise`: of a z drawn from the posterior by it, and the divergence."""
    events = int(alone.support.mask.sum())
    said = [encoded(meta, alone.support.x[0, i], alone.support.labels[0, i]) for i in range(events)]
    r = summary(meta, said)
    z = r if meta.gaussian is None else gauss(meta, r)[0]
    x, y = alone.query.x[0], alone.query.labels[0]
    divergence = torch.zeros((), dtype=torch.float64)
    if noise is not None:
        prior = torch.distributions.Normal(*gauss(meta, r))
        seen = [encoded(meta, x[i], y[i]) for i in range(len(y))]
        posterior = torch.distributions.Normal(*gauss(meta, summary(meta, said + seen)))
        z = posterior.mean + posterior.stddev * noise
        divergence = torch.distributions.kl_divergence(posterior, prior).sum() / len(y)
    scores = torch.stack([scored(meta, x[i], r, z) for i in range(len(y))])
    return meta.event_loss(scores, y).mean() + meta.kl * divergence


@pytest.mark.parametrize("modulated", ["film", "gated"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("squared", {}),
        ("huber", {"clusters": 0}),
        ("binary_cross_entropy", {"freedom": 3.0}),
        ("squared", {"latent": True}),
    ],
    ids=str,
)
def test_meta_gradient_is_that_of_a_loop_over_tasks_and_events(modulated: str, loss: str, options: dict):
    meta = tanp(loss, modulation=modulated, kl=0.3, **options)
    click = loss == "binary_cross_entropy"
    episodes = made_up(click=click)
    noise = label_noise(episodes.support, episodes.query, meta.decode_task.in_features) if meta.latent else None
    losses = [
        task_loss(meta, one_task(episodes, task), None if noise is None else noise[task])
        for task in range(episodes.size)
    ]
    found = meta(episodes)
    torch.testing.assert_close(found.total, torch.stack(losses).sum())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert all(gradient.any() for gradient in expected.values())
    assert_close(meta_gradient(meta, found.total), expected)
    # What is reported is what use will give: z at the prior's mean.
    at_mean = [task_loss(meta, one_task(episodes, task)).detach() for task in range(episodes.size)]
    torch.testing.assert_close(found.after, torch.stack(at_mean))
    # In float32, where training runs.
    single = tanp(loss, modulation=modulated, kl=0.3, **options).float()
    single.load_state_dict(meta.state_dict())
    narrow = made_up(click=click, dtype=torch.float32)
    assert_close(meta_gradient(single, single(narrow).total), expected)


@pytest.mark.parametrize(
    "options", [{}, {"modulation": "film", "clusters": 0, "decoder": (5,)}, {"latent": True}], ids=str
)
def test_contract(options: dict):
    # `eval`: in training, the total of a latent z is another than the sum of what is reported.
    check_contract(lambda: tanp(**options).eval())
    check_contract(lambda: tanp("binary_cross_entropy", **options).eval(), click=True)


def test_the_latent_loss_of_a_task_depends_on_nothing_but_the_task():
    meta, episodes = tanp(latent=True), made_up()
    whole = meta(episodes)
    more = meta(padded(episodes))
    torch.testing.assert_close(more.total, whole.total)
    assert_close(meta_gradient(meta, more.total), meta_gradient(meta, meta(episodes).total), 1e-9)
    alone = [meta(one_task(episodes, task)).total for task in range(episodes.size)]
    torch.testing.assert_close(torch.stack(alone).sum(), whole.total)
    # The same again, bit for bit: nothing draws from a generator.
    assert torch.equal(meta(episodes).total, whole.total)
    # In training z is not the prior's mean, and the divergence counts.
    assert (whole.total.detach() - whole.after.sum()).abs() > 1e-3
    heavier = tanp(latent=True, kl=5.0)
    heavier.load_state_dict(meta.state_dict())
    assert float((heavier(episodes).total - whole.total).detach()) > 1e-3


def test_noise_is_normal_and_a_function_of_the_labels():
    generator = torch.Generator().manual_seed(0)
    tasks, events = 20_000, 5
    labels = torch.randn(tasks, events, generator=generator)
    examples = Examples(torch.zeros(tasks, events, 1), {}, labels, torch.ones(tasks, events))
    noise = label_noise(examples, examples, 6)
    assert noise.dtype == torch.float32
    error = 4 / math.sqrt(tasks)
    assert noise.mean(0).abs().max() < error
    assert (noise.T @ noise / tasks - torch.eye(6)).abs().max() < 2 * error
    assert float(noise.pow(4).mean()) == pytest.approx(2.7, abs=0.1)  # of four uniform numbers; of a normal one 3
    # Neighbours in the labels are strangers in the noise.
    near = Examples(examples.x, {}, torch.nextafter(labels, labels + 1), examples.mask)
    assert float((label_noise(near, examples, 6) * noise).mean().abs()) < error
    # Support and query are told apart, and order and padding say nothing.
    fewer = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).expand(tasks, events)
    one, other = Examples(examples.x, {}, labels, fewer), Examples(examples.x, {}, labels, 1 - fewer)
    assert float((label_noise(one, other, 6) * label_noise(other, one, 6)).mean().abs()) < error
    flipped = Examples(examples.x, {}, labels.flip(1), fewer.flip(1))
    assert torch.equal(label_noise(flipped, other, 6), label_noise(one, other, 6))
    zero = Examples(examples.x, {}, -0.0 * labels.abs(), fewer)
    assert torch.equal(
        label_noise(zero, one, 6), label_noise(Examples(examples.x, {}, 0.0 * labels.abs(), fewer), one, 6)
    )


def test_divergence_is_torchs():
    draw = torch.Generator().manual_seed(0)
    mean, of_mean = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    deviation, of_deviation = torch.rand(2, 4, 3, generator=draw, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, deviation), normal(of_mean, of_deviation)).sum(-1)
    torch.testing.assert_close(gaussian_divergence(mean, deviation, of_mean, of_deviation), expected)


# --- families of tasks with a known optimum ------------------------------------------------------------------------


class Zero(nn.Module):
    """Scores everything 0: what is learned is the method's alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])


def biased_tasks(tasks: int, seed: int, prior: float, noise: float) -> Episodes:
    """Labels are a task's bias and noise; inputs say nothing. Support of 1 to 8 events, query of 4."""
    draw = torch.Generator().manual_seed(seed)
    bias = prior**0.5 * torch.randn(tasks, 1, generator=draw)

    def side(events: int, mask: Tensor) -> Examples:
        labels = bias + noise**0.5 * torch.randn(tasks, events, generator=draw)
        return Examples(torch.randn(tasks, events, 2, generator=draw), {}, labels, mask)

    lengths = torch.randint(1, 9, (tasks, 1), generator=draw)
    return Episodes(side(8, (torch.arange(8) < lengths).float()), side(4, torch.ones(tasks, 4)), {})


@pytest.mark.parametrize(("latent", "excess"), [(False, 0.01), (True, 0.03)])
def test_biased_tasks_are_learned_as_bayes_would(latent: bool, excess: float):
    """No predictor beats the posterior mean of the bias, which is the shrunken mean of the support: after a short
    training the error is within 1 % of its error, with a latent z within 3 % (the unadapted score's is 136 % above)."""
    prior, noise = 2.0, 1.0
    torch.manual_seed(0)
    layout = Layout((Columns("x", "item", 0, 2),))
    meta = TaNP(Zero(), layout=layout, encoder=(16,), width=8, decoder=(16,), clusters=2, latent=latent, kl=0.1)
    optimizer = torch.optim.Adam(meta.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 250)
    for step in range(250):
        optimizer.zero_grad()
        (meta(biased_tasks(128, step, prior, noise)).total / 128).backward()
        optimizer.step()
        schedule.step()
    test = biased_tasks(20_000, -1, prior, noise)
    with torch.no_grad():
        found = meta.eval()(test)
    n = test.support.mask.sum(-1, keepdim=True)
    best = (test.support.labels * test.support.mask).sum(-1, keepdim=True) / (n + noise / prior)
    least = (best - test.query.labels).square().mean()
    assert float(found.after.mean()) == pytest.approx(float(least), rel=excess)
    assert found.before.mean() > 2 * least


def test_refusals():
    for options, message in (
        ({"encoder": ()}, "encoder must have widths"),
        ({"decoder": (4, 0)}, "decoder must have widths"),
        ({"width": 0}, "width must have widths"),
        ({"freedom": 0.0}, "freedom must be above 0, got 0"),
        ({"shrinkage": -1.0}, "shrinkage must be above 0, got -1"),
        ({"clusters": -1}, "at least 0, got -1"),
        ({"modulation": "filmy"}, "unknown modulation 'filmy': film or gated"),
    ):
        with pytest.raises(ValueError, match=message):
            tanp(**options)
