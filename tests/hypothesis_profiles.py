"""How many examples property tests try: 100 that are always the same, or 2,000 random ones with
HYPOTHESIS_PROFILE=full. Import this before hypothesis's decorators."""

import os

from hypothesis import settings

settings.register_profile('ci', derandomize=True, max_examples=100, deadline=None, database=None)
settings.register_profile('full', max_examples=2000, deadline=None, database=None)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))


def places(value, path=()):
    """The paths to all values within nested dicts and lists."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
