"""Whatever an option is given: it is refused in one line, or it has a valid value.

HYPOTHESIS_PROFILE=full tries 2,000 examples of each.
"""

import hypothesis_profiles  # noqa: F401, I001
import json
import math
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from diracnet import DATASETS
from lab.errors import LONGEST, OptionError, one_line
from lab.models.registry import MODELS
from lab.training.option_table import OPTIONS
from lab.training.options import check_combination, complete, parse
from test_options import EXAMPLES

KINDS = {name: type(value) for name, (_, value) in EXAMPLES.items()}
WORDS = {
    'alpha': ('depth',),
    'beta': ('depth',),
    'bn_momentum': ('cumulative',),
    'bn_init': ('paper', 'shifted'),
}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.integers(min_value=2**60), st.sampled_from([2**64, 10**400])
)
MODELS_AND_DATA = list(product(MODELS, DATASETS))
# Text that is not a flag, and what an option could be mistaken for.
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text('0123456789.,-+einf[]_ ', max_size=12),
    NUMBERS.map(str),
    st.lists(NUMBERS, max_size=4).map(json.dumps),
    st.sampled_from(['cumulative', 'depth', 'shifted', '~nobody/x', 'a' * 300, '[' * 5000, '\0']),
    st.sampled_from([*MODELS, *DATASETS, 'adamw', 'half', 'auto']),
)


def is_one_line(error):
    line = one_line(str(error))
    return line.isprintable() and 0 < len(line) < 10 * LONGEST


def is_valid(name, value):
    """Whether a value has the type and the range of its option."""
    option = OPTIONS[name]
    if option.type is bool:
        return value is True
    if option.choices:
        return value in option.choices
    if name == 'epoch_step':
        return all(type(epoch) is int for epoch in value) and value == sorted(set(value))
    if value in WORDS.get(name, ()):
        return True
    if name == 'bn_init':
        return len(value) == 2 and all(map(math.isfinite, value))
    if name == 'holdout' and isinstance(value, str):
        return value.endswith('%') and 0 < float(value[:-1]) < 100
    if name == 'warmup':
        steps = str(value).removeprefix('ramp:') if isinstance(value, str) else value
        return int(steps) >= 0
    if name in WORDS:
        return type(value) is float and 0 < value < math.inf
    return type(value) is KINDS[name] and (KINDS[name] is str or 0 <= value < math.inf)


@given(st.sampled_from(list(OPTIONS)), TEXTS)
def test_one_option(name, text):
    arguments = [f'--{name}'] if OPTIONS[name].type is bool else [f'--{name}={text}']
    try:
        found = parse(arguments)
    except OptionError as error:
        assert is_one_line(error)
        return
    assert list(found) == [name] and is_valid(name, found[name])


@given(st.sets(st.sampled_from(list(OPTIONS))), st.sampled_from(MODELS_AND_DATA), st.floats(0))
def test_options_together(names, network, rate):
    """Values that are valid alone."""
    model, dataset = network
    texts = {name: text for name, (text, _) in EXAMPLES.items() if name in names}
    texts.update(model=model, dataset=dataset, lr_decay_ratio=str(rate))
    arguments = [
        f'--{name}' if text is None else f'--{name}={text}' for name, text in texts.items()
    ]
    try:
        options = complete(parse(arguments))
        check_combination(options)
    except OptionError as error:
        assert is_one_line(error)
        return
    assert all(name in OPTIONS for name in options)
    json.dumps(options, allow_nan=False)
