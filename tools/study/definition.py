"""A study as its YAML file defines it, checked against one form before anything uses it."""

import difflib
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path

from diracparams import DATASETS
from lab.errors import OptionError, UserError
from lab.files import size_of
from lab.training.options import OPTIONS

LARGEST = 2**17  # bytes of a file, and characters of its values with what aliases repeat
MOST = 10_000  # runs, with their seeds


@dataclass
class Study:
    """The content of a YAML file; `python -m tools.study --help` says what each part means."""

    path: Path
    title: str
    seeds: list
    dataset: str
    runs: list
    table: list
    note: str = ''
    options: dict = field(default_factory=dict)
    recipes: dict = field(default_factory=dict)
    keep: list = field(default_factory=list)
    reported: str = 'reported'
    figure: dict | None = None

    @property
    def name(self):
        return self.path.stem


# --- the form of a file, as a JSON schema ----------------------------------------------------

# Options that the study or its command line sets, and how.
OWN = {
    'save': 'each run has a folder of its own',
    'resume': 'the same command resumes its runs',
    'evaluate': 'it trains',
    'device': 'give --device to tools.study',
    'seed': 'they are in seeds',
    'dataset': 'it is a key of the file, next to options',
}
ALIASES = {flag[2:]: option for option in OPTIONS.values() for flag in option.option_strings[1:]}
FLAGS = {name: option for name, option in {**OPTIONS, **ALIASES}.items() if name not in OWN}
FIGURES = ({'x'}, {'x', 'lines'}, {'x', 'y', 'panels'}, {'signal'})  # keys of each kind

TEXT = {'type': 'string'}


def list_of(form, least=1, unique=True):
    return {
        'type': 'array',
        'items': form,
        'minItems': least,
        'maxItems': MOST,
        'uniqueItems': unique,
    }


def mapping(properties, required=()):
    return {
        'type': 'object',
        'properties': properties,
        'required': list(required),
        'additionalProperties': False,
    }


def one_value(option):
    """The form of an option's value; train.py's parser checks it further, as a text."""
    if option.nargs == 0:  # a flag
        return {'type': ['boolean']}
    return {'type': ['string', 'number'], 'pattern': '^(?!-)'}  # not another flag


def or_list(form, items):
    """The form of one value or of a list of them."""
    return {**form, 'type': [*form['type'], 'array'], 'items': items}


COMMON = {name: or_list(one_value(option), {'type': 'number'}) for name, option in FLAGS.items()}
GRID = {name: or_list(one_value(option), one_value(option)) for name, option in FLAGS.items()}
COMMON_OPTIONS = mapping(COMMON)  # a list is one value, such as that of epoch_step
RUN = mapping(
    {**GRID, 'seeds': list_of({'type': 'integer'}), 'reported': {'type': ['number', 'string']}}
)
FORM = mapping(
    {
        'title': TEXT,
        'note': TEXT,
        'reported': TEXT,
        'dataset': TEXT,
        'seeds': list_of({'type': 'integer'}),
        'keep': list_of({'type': 'integer', 'minimum': 1}, least=0),
        'options': COMMON_OPTIONS,
        'recipes': mapping(dict.fromkeys(DATASETS, COMMON_OPTIONS)),
        'runs': list_of(RUN, unique=False),  # all_runs finds those that are equal
        'table': list_of({'enum': list(OPTIONS)}),
        'figure': mapping(
            {
                'x': TEXT,
                'y': TEXT,
                'panels': TEXT,
                'lines': or_list({'type': ['string']}, TEXT),
                'signal': {'const': True},
            }
        ),
    },
    required=('title', 'seeds', 'dataset', 'runs', 'table'),
)


# --- checking --------------------------------------------------------------------------------


def read(path):
    """The Study in a YAML file.

    Raises:
        UserError: the file is not a study.
        OptionError: it has an option that train.py does not have, or that the study sets itself.
    """
    content = read_yaml(path)
    try:
        check_form(content)
        study = Study(path=Path(path), **content)
        check_runs(study)
        check_figure(study)
    except UserError as error:
        raise type(error)(f'{path} is not a study: {error}') from None
    return study


def check_form(content):
    """Raise UserError, or OptionError for an unknown option, if a file has another form."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    errors = list(Draft202012Validator(FORM).iter_errors(content))
    if not errors:
        return
    # A misspelt key explains why another one is missing.
    unknown = [error for error in errors if error.validator == 'additionalProperties']
    error = unknown[0] if unknown else best_match(errors)
    place = ''.join(
        f'number {part + 1}: ' if isinstance(part, int) else f'{part}: '
        for part in error.absolute_path
    )
    kind, message = explain(error)
    raise kind(place + message)


def explain(error):
    """The exception for an error of jsonschema, and its message."""
    if error.validator == 'pattern':
        return UserError, f'{error.instance!r} must not begin with -'
    if error.validator == 'enum':
        key, known = error.instance, error.validator_value
    elif error.validator == 'additionalProperties':
        known = error.schema['properties']
        key = next(key for key in error.instance if key not in known)
    elif error.instance is None:
        return UserError, 'it is empty'
    else:
        return UserError, error.message
    kind = OptionError if 'depth' in known and error.validator != 'enum' else UserError
    if kind is OptionError and key in OWN:
        return kind, f'{key} is set by the study itself: {OWN[key]}'
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(known)}'
    return kind, f'{key!r} does not exist; {hint}'


def check_runs(study):
    """Raise UserError if a run has an empty list or a seed that the study does not have, or if
    there are too many runs."""
    n = 0
    for run in study.runs:
        seeds = run.get('seeds', study.seeds)
        others = set(seeds) - set(study.seeds)
        if others:
            raise UserError(f'a run has the seed {min(others)}, which is not one of its seeds')
        if not all(choices(run).values()):
            raise UserError('a run has an empty list of values')
        n += len(seeds) * math.prod(len(values) for values in choices(run).values())
    if n > MOST:
        raise UserError(f'it has {n} runs; the most is {MOST}')


def check_figure(study):
    """Raise UserError if the figure has other keys than one of FIGURES, or an option that is not
    in the table."""
    figure = study.figure
    if figure is None or figure.keys() == {'signal'}:
        return
    if figure.keys() not in FIGURES:
        kinds = '; or '.join(', '.join(sorted(keys)) for keys in FIGURES)
        raise UserError(f'its figure has {", ".join(figure)}, but must have {kinds}')
    possible = ['epoch', 'seconds', *study.table] if figure.keys() == {'x'} else study.table
    for part, names in figure.items():
        for name in names if isinstance(names, list) else [names]:
            if name not in possible:
                raise UserError(
                    f'{part} of its figure is {name!r}, but must be one of {", ".join(possible)}'
                )


def read_yaml(path):
    """The content of a YAML file. Raises UserError if it is broken or too large."""
    import yaml

    try:
        size_of(path)
        with open(path, 'rb') as file:
            text = file.read(LARGEST + 1)
        # Aliases may repeat others many times, and are expanded when the values are made.
        if len(text) > LARGEST or expanded_size(yaml.compose(text, yaml.SafeLoader), {}) > LARGEST:
            raise UserError(f'{path} is not a study: it has more than {LARGEST} characters')
        return yaml.safe_load(text)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f'{path} is not a study: {error}') from None
    except (LookupError, AttributeError, TypeError):  # from the conversion of !!bool x
        raise UserError(f'{path} is not a study: a value does not fit its tag') from None
    except RecursionError:
        raise UserError(f'{path} is not a study: it is nested too deeply') from None


def expanded_size(node, sizes):
    """The characters of the values below a node of YAML's tree, with what aliases repeat.

    Args:
        sizes: the results so far, by id. A node that contains itself is infinitely large.

    Raises:
        ValueError: a mapping has a key twice.
    """
    content = getattr(node, 'value', '')  # a text, a list of nodes, or pairs of nodes
    if isinstance(content, str):
        return 1 + len(content)
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        pairs = [child for child in content if isinstance(child, tuple)]
        keys = Counter(key.value for key, _ in pairs if isinstance(key.value, str))
        if keys and keys.most_common(1)[0][1] > 1:
            raise ValueError(f'it has {keys.most_common(1)[0][0]} twice')
        children = chain.from_iterable(pairs) if pairs else content
        sizes[id(node)] = 1 + sum(expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def choices(options):
    """{name: its values}: one for each run that these options of an element of `runs` describe.

    epoch_step is an exception: its value for a single run is a list already.
    """
    return {
        name: value if isinstance(value, list) and name != 'epoch_step' else [value]
        for name, value in options.items()
        if name != 'seeds'
    }


def expand(options):
    """One dict for each combination of the elements of all values that are lists."""
    found = choices(options)
    return [dict(zip(found, values)) for values in product(*found.values())]
