"""A study as its YAML file defines it. The options of its runs are checked by train.py's parser."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from lab.errors import OptionError, UserError
from lab.training.options import parse

# Options that the study or its command line sets.
OWN = {'dataset', 'device', 'evaluate', 'resume', 'save', 'seed'}
FIGURES = ({'x'}, {'x', 'lines'}, {'x', 'y', 'panels'}, {'signal'})  # keys of each kind


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


def read(path):
    """The Study in a YAML file.

    Raises:
        UserError: the file is not a study.
        OptionError: it has an option that train.py does not have, or that the study sets itself.
    """
    try:
        content = yaml.safe_load(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError('it has no keys such as title')
        study = Study(path=Path(path), **content)
        check_types(study)
        check_options(study)
        check_figure(study)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None
    # TypeError: an unknown or missing key; ValueError: our own, or text that is not UTF-8
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f'{path} is not a study: {error}') from None
    except OptionError as error:
        raise OptionError(f'{path} is not a study: {error}') from None
    return study


def check_types(study):
    """Raise ValueError for a value of another type than its field."""
    for one in fields(Study):
        value = getattr(study, one.name)
        if not isinstance(value, one.type):
            raise ValueError(f'{one.name} is {value!r}, not a {one.type.__name__}')


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
        if not set(run.get('seeds', ())) <= set(study.seeds):
            raise ValueError(f'the seeds of a run are {run["seeds"]}, not some of {study.seeds}')


def check_figure(study):
    """Raise ValueError if the figure has other keys than one of FIGURES, or an option that is not
    in the table."""
    keys = study.figure.keys()
    if not keys or keys == {'signal'}:
        return
    if keys not in FIGURES:
        kinds = '; or '.join(', '.join(sorted(kind)) for kind in FIGURES)
        raise ValueError(f'its figure has {", ".join(map(str, keys))}, but must have {kinds}')
    possible = [*study.table, 'epoch', 'seconds'] if keys == {'x'} else study.table
    for names in study.figure.values():
        for name in names if isinstance(names, list) else [names]:
            if name not in possible:
                raise ValueError(f'its figure has {name!r}, which is none of {possible}')
