"""scikit-learn's handwritten digits."""

import numpy as np
import torch

from lab.errors import UserError


def read_digits(name, root, download):
    """The 1,797 digits: the first 1,437 for training, the last 360 for testing.

    Most of the test digits are by writers who are not in the training set.

    scikit-learn contains the files, so `root` and `download` are unused.

    Returns:
        (images, targets) for training, the same for testing, class names. Images are uint8
        (N, 8, 8, 1), targets int64 (N,).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            f'the data set {name} is part of scikit-learn: pip install scikit-learn'
        ) from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 becomes 0..255
    images = torch.from_numpy(pixels)[..., None]
    targets = torch.from_numpy(digits.target.astype(np.int64))
    classes = [str(digit) for digit in digits.target_names]
    return (images[:1437], targets[:1437]), (images[1437:], targets[1437:]), classes
