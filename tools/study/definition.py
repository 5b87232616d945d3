"""A study as its YAML file defines it. The options of its runs are checked by train.py's parser."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from lab.errors import OptionError, UserError
from lab.training.options import parse

# Options that the study or its command line sets.
OWN = {'dataset', 'device', 'evaluate', 'resume', 'save', 'seed'}
FIGURES = ({'x'}, {'x', 'lines'}, {'x', 'y', 'panels'}, {'signal'})  # keys of each kind
KINDS = {str: 'a text', list: 'a list', dict: 'a mapping'}


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
    figure: dict = field(default_factory=dict)

    @property
    def name(self):
        return self.path.stem

    @property
    def tested(self):
        """Which images its errors come from: 'test' or 'held-out'."""
        return 'held-out' if 'holdout' in self.options else 'test'


class Loader(yaml.SafeLoader):
    """A loader that refuses a key that is twice in a mapping: PyYAML would take the last one."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f'line {node.start_mark.line + 1}: {key} is there twice')
        return node


def read(path):
    """The Study in a YAML file.

    Raises:
        UserError: the file is not a study.
        OptionError: it has an option that train.py does not have, or that the study sets itself.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), Loader)
        check_keys(content)
        study = Study(path=Path(path), **content)
        check_types(study)
        check_options(study)
        check_figure(study)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: our own, or text that is not UTF-8
        raise UserError(f'{path} is not a study: {error}') from None
    except OptionError as error:
        raise OptionError(f'{path} is not a study: {error}') from None
    return study


def check_keys(content):
    """Raise ValueError for what is not a mapping, an unknown key, or a missing one."""
    possible = {one.name: one for one in fields(Study) if one.name != 'path'}
    if not isinstance(content, dict):
        raise ValueError(f'it must have the keys {", ".join(possible)}')
    for name in content:
        if name not in possible:
            raise ValueError(f'{name} is none of its keys, which are {", ".join(possible)}')
    for name, one in possible.items():
        if name not in content and one.default is one.default_factory is MISSING:
            raise ValueError(f'it has no {name}')


def check_types(study):
    """Raise ValueError for a value, or an element of a list, of another type than its field's."""
    for one in fields(Study):
        value = getattr(study, one.name)
        if not isinstance(value, one.type):
            raise ValueError(f'{one.name} is {value!r}, not {KINDS[one.type]}')
    for name in ('seeds', 'runs'):
        if not getattr(study, name):
            raise ValueError(f'{name} is empty')
    for name, kind, words in (('table', str, 'names of options'), ('keep', int, 'epochs')):
        if not all(isinstance(value, kind) for value in getattr(study, name)):
            raise ValueError(f'{name} is {getattr(study, name)!r}, not a list of {words}')


def check_options(study):
    """Raise ValueError for what is not a mapping of options, or a run whose seeds are not some of
    the study's; OptionError for options that the study sets itself, or an unknown data set."""
    for options in [study.options, *study.recipes.values(), *study.runs]:
        if not isinstance(options, dict):
            raise ValueError(f'{options!r} is not a mapping from options to values')
        if own := OWN & options.keys():
            raise OptionError(f'{min(own)} is not for its options: the study sets it')
    for dataset in study.recipes:
        parse(['--dataset', str(dataset)])
    for run in study.runs:
        seeds = run.get('seeds', [])
        if not isinstance(seeds, list) or not all(seed in study.seeds for seed in seeds):
            raise ValueError(
                f'the seeds of a run are {seeds!r}, not a list of some of {study.seeds}'
            )


def check_figure(study):
    """Raise ValueError if the figure has other keys than one of FIGURES, or an option that is not
    in the table."""
    keys = study.figure.keys()
    if not keys or keys == {'signal'}:
        return
    if keys not in FIGURES:
        kinds = '; or '.join(', '.join(sorted(kind)) for kind in FIGURES)
        raise ValueError(f'its figure has {", ".join(map(str, keys))}, but must have {kinds}')
    for key, names in study.figure.items():
        times = ['epoch', 'seconds'] if key == 'x' and 'panels' not in keys else []
        possible = [*study.table, *times]
        for name in names if key == 'lines' and isinstance(names, list) else [names]:
            if name not in possible:
                raise ValueError(f'its figure has {name!r}, which is none of {possible}')
