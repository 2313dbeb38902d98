"""The three terms against numbers worked out by hand, and their gradients."""

import math

import pytest
import torch

from longlive_rag.training.losses import (
    Losses,
    autoencoder_losses,
    reconstruction_loss,
    smoothing_loss,
    temporal_delta_loss,
)

TURN = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])  # cosines: 1, 0 one apart; 0 two apart


def test_reconstruction_is_the_mean_over_every_number():
    assert reconstruction_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == 2.5


def test_delta_weighs_each_offset_the_same_and_ignores_lengths():
    # k = 1: (max(0, 1 - .5) + max(0, 0 - .5)) / 2 = .25 over two pairs; k = 2: 0 over one.
    assert temporal_delta_loss(TURN, window=2, margin=0.5).item() == pytest.approx(0.125)
    assert temporal_delta_loss(100 * TURN, window=2, margin=0.5).item() == pytest.approx(0.125)


def test_delta_counts_offsets_beyond_the_chunk_neither_in_the_sum_nor_in_the_mean():
    assert temporal_delta_loss(TURN, window=9, margin=0.5).item() == pytest.approx(0.125)
    assert temporal_delta_loss(TURN[:, :1]).item() == 0


def test_delta_leaves_neighbours_below_the_margin_alone():
    embeddings = TURN.clone().requires_grad_()
    temporal_delta_loss(embeddings, window=2, margin=1.0).backward()
    assert temporal_delta_loss(TURN, window=2, margin=1.0).item() == 0
    assert embeddings.grad is not None and not embeddings.grad.any()


def test_smoothing_is_the_length_of_the_acceleration_of_raw_embeddings():
    # (0, 3) - 2 (2, 0) + (1, 0) = (-3, 3)
    assert smoothing_loss(TURN).item() == pytest.approx(math.sqrt(18 + 1e-8))
    assert smoothing_loss(10 * TURN).item() == pytest.approx(10 * math.sqrt(18), rel=1e-6)
    assert smoothing_loss(TURN[:, :2]).item() == 0


def test_smoothing_has_a_finite_gradient_on_a_straight_line():
    line = torch.tensor([[[0.0], [1.0], [2.0]]], requires_grad=True)
    loss = smoothing_loss(line)
    loss.backward()
    assert loss.item() == pytest.approx(1e-4)
    assert line.grad is not None and line.grad.isfinite().all()


@pytest.mark.parametrize("loss", [temporal_delta_loss, smoothing_loss])
def test_gradients(loss):
    torch.manual_seed(0)
    embeddings = (torch.randn(2, 6, 5, dtype=torch.float64) + 1.5).requires_grad_()
    assert loss(embeddings) > 0.01
    assert torch.autograd.gradcheck(loss, embeddings)


def test_half_precision_embeddings_are_judged_in_float32():
    embeddings = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).half() * 200
    assert smoothing_loss(embeddings).isfinite() and smoothing_loss(embeddings).dtype == torch.float32
    torch.testing.assert_close(temporal_delta_loss(embeddings, 3, 0.0), temporal_delta_loss(embeddings.float(), 3, 0.0))


def test_all_terms_keep_videos_apart_and_are_weighted_in_the_total():
    chunks = torch.randn(2, 3, 1, 2, 2)
    embeddings = torch.cat([TURN[0], torch.zeros(3, 2)])  # a second video that does not move
    losses = autoencoder_losses(chunks.flatten(0, 1) + 1, embeddings, chunks, window=2, margin=0.5)
    assert losses.reconstruction.item() == pytest.approx(1)
    assert losses.delta.item() == pytest.approx(0.125 / 2)
    assert losses.smooth.item() == pytest.approx((math.sqrt(18) + 1e-4) / 2)
    assert Losses(*map(torch.tensor, (1.0, 2.0, 3.0))).total(10, 100).item() == 321
