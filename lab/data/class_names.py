"""Names of ImageNet's classes for people."""

import re


def readable(classes, n):
    """The names of n classes. torchvision's names of ImageNet's classes replace WordNet's, such as
    n01440764, and those of 1,000 classes without names.

    Args:
        classes: a list, or None.
    """
    has_ids = bool(classes) and all(re.fullmatch(r'n\d{8}', name) for name in classes)
    if n != 1000 or (classes and not has_ids):
        return classes
    from torchvision.models import ResNet18_Weights  # imports for seconds

    return list(ResNet18_Weights.DEFAULT.meta['categories'])
