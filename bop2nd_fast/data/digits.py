"""scikit-learn's handwritten digits: 1797 real grey images of 8x8 pixels that ship with the package."""

from __future__ import annotations

import operator

import torch

from .dataset import Dataset


def digits(test_share: float = 0.25, seed: int = 0) -> Dataset:
    """The digits, split at random with every class in proportion.

    Args:
        test_share: share of the images held out for testing, in (0, 1).
        seed: of the split; the same seed always gives the same images.

    Raises:
        ValueError: for a ``test_share`` outside (0, 1).
        ModuleNotFoundError: when scikit-learn (extra ``[cli]``) is not installed.
    """
    if not 0.0 < test_share < 1.0:
        raise ValueError(f"digits: test_share is {test_share}, it must lie between 0 and 1")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # pixels are 0..16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    test = _stratified(labels, float(test_share), operator.index(seed))
    return Dataset(
        "digits", tuple(str(i) for i in range(10)), images[~test], labels[~test], images[test], labels[test]
    )


def _stratified(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Booleans ``[N]``: of every class a random ``share`` (rounded) is True."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[: round(share * len(members))]]] = True
    return chosen
