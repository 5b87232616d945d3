"""Whatever text an option is given: it is refused in one line, or it has a valid value.

HYPOTHESIS_PROFILE=full tries 2,000 examples of each.
"""

import hypothesis_profiles  # noqa: F401, I001
import json
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from diracparams import DATASETS
from lab.errors import LONGEST, OptionError, one_line
from lab.models.registry import MODELS
from lab.training.options import OPTIONS, check_combination, complete, parse

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**64, 10**400]))
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text('0123456789.,-+einf[]_% ', max_size=12),
    NUMBERS.map(str),
    st.lists(NUMBERS, max_size=4).map(json.dumps),
    st.sampled_from(['cumulative', 'depth', 'shifted', 'ramp:3', '~nobody/x', 'a' * 300, '\0']),
    st.sampled_from([*MODELS, *DATASETS, 'adamw', 'half', 'auto', '[' * 5000, '0.5', '1', '20%']),
)
MODELS_AND_DATA = list(product(MODELS, DATASETS))


@given(
    st.dictionaries(st.sampled_from(list(OPTIONS)), TEXTS, max_size=4),
    st.sampled_from(MODELS_AND_DATA),
)
def test_options(texts, network):
    texts = {'model': network[0], 'dataset': network[1], **texts}
    arguments = [
        f'--{name}' if OPTIONS[name].nargs == 0 else f'--{name}={text}'
        for name, text in texts.items()
    ]
    try:
        given = parse(arguments)
        options = complete(given)
        check_combination(options)
    except OptionError as error:
        line = one_line(str(error))
        assert line.isprintable() and 0 < len(line) < 10 * LONGEST
        return
    assert given.keys() == texts.keys()
    assert options == {**options, **given, 'dataroot': options['dataroot']}
    json.dumps(options, allow_nan=False)
