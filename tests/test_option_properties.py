"""Whatever an option or a study is given: it is refused in one line, or it has a valid value.

HYPOTHESIS_PROFILE=full tries 2,000 examples of each.
"""

from hypothesis_profiles import places  # noqa: I001
import copy
import json
import math
from itertools import product
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from diracparams import DATASETS
from lab.errors import LONGEST, OptionError, UserError, one_line
from lab.models.registry import MODELS
from lab.training.option_table import OPTIONS
from lab.training.options import check_combination, complete, parse
from test_options import EXAMPLES
from test_study import TINY
from tools.study.definition import read
from tools.study.runs import all_runs

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


# --- studies ---------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.dates(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.one_of(
    st.sampled_from([*OPTIONS, *yaml.safe_load(TINY), 'x', 'lines', 'y', 'panels', 'signal']),
    st.text(max_size=8),
)


@st.composite
def changed_studies(draw):
    """A valid study with up to three values replaced, removed, added or repeated."""
    study = copy.deepcopy(yaml.safe_load(TINY))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(study))[1:]))
        parent = study
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(['replace', 'remove', 'add', 'repeat']))
        if change == 'remove':
            del parent[path[-1]]
        elif change == 'add' and isinstance(parent, dict):
            parent[draw(KEYS)] = draw(VALUES)
        elif change == 'repeat' and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = draw(VALUES)
    return study


def read_runs(path, text):
    """The study in a file with this text, and its runs; None if it is refused in one line."""
    path.write_bytes(text)
    try:
        study = read(path)
        return study, all_runs(study, study.seeds, study.dataset, Path('never'))
    except UserError as error:
        assert is_one_line(error) and path.name in str(error)
        return None


def check_study(path, text):
    found = read_runs(path, text)
    if found is None:
        return
    study, runs = found
    assert runs and set(study.table) <= set(OPTIONS)
    commands = [json.dumps(one.all_options, sort_keys=True) for one in runs]
    assert len(set(commands)) == len(commands)
    assert len({one.folder for one in runs}) == len(runs)
    assert all(one.folder.parent.parent == Path('never') for one in runs)
    assert all(is_valid(name, value) for one in runs for name, value in one.options.items())


@given(changed_studies())
def test_changed_studies(tmp_path_factory, study):
    check_study(tmp_path_factory.getbasetemp() / 'changed.yaml', yaml.safe_dump(study).encode())


@given(st.data())
def test_damaged_studies(tmp_path_factory, data):
    """Bytes of a file are removed, replaced or added."""
    text = TINY.encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    added = data.draw(st.one_of(st.binary(max_size=8), st.text(':-[]{}&*!|# \n', max_size=4)))
    added = added if isinstance(added, bytes) else added.encode()
    path = tmp_path_factory.getbasetemp() / 'damaged.yaml'
    check_study(path, text[:start] + added + text[end:])
