"""Data sets that need no download, and batches made from them."""

from .batches import Batches, augment_crop_flip
from .cifar10 import cifar10
from .dataset import Dataset
from .digits import digits
from .images import read_images

__all__ = ["Batches", "Dataset", "augment_crop_flip", "cifar10", "digits", "read_images"]
