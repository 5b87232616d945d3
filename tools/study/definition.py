"""A study as its YAML file defines it."""

from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path

from lab.errors import UserError


@dataclass
class Study:
    """The content of a YAML file; `python -m tools.study --help` says what each part means."""

    name: str  # of the file, without its suffix
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


REQUIRED = ('title', 'seeds', 'dataset', 'runs', 'table')
TYPES = {
    'seeds': list,
    'runs': list,
    'table': list,
    'keep': list,
    'options': dict,
    'recipes': dict,
    'note': str,
    'figure': dict,
}


def read(path):
    """The Study in a YAML file. Raises UserError if it is not one."""
    content = read_yaml(path)
    for name in REQUIRED:
        if name not in content:
            raise UserError(f'{path} is not a study: it has no {name}')
    for name, kind in TYPES.items():
        if name in content and not isinstance(content[name], kind):
            raise UserError(
                f'{path} is not a study: {name} is {content[name]!r}, but must be a {kind.__name__}'
            )
    known = {part.name for part in fields(Study)}
    parts = {name: value for name, value in content.items() if name in known}
    study = Study(**{**parts, 'name': Path(path).stem})
    check_figure(path, study)
    return study


def read_yaml(path):
    """The dict in a YAML file."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None
    except yaml.YAMLError as error:
        raise UserError(f'{path} is not a study: {" ".join(str(error).split())}') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a study: it must be a mapping, not {content!r}')
    return content


def check_figure(path, study):
    """Raise UserError if the figure has an option that is not in the table."""
    if study.figure is None or study.figure.get('signal'):
        return
    is_heat_map = 'panels' in study.figure
    for part in ('x', 'y', 'panels') if is_heat_map else ('x',):
        possible = study.table if is_heat_map else ['epoch', *study.table]
        if study.figure.get(part) not in possible:
            raise UserError(
                f'{path} is not a study: {part} of its figure is {study.figure.get(part)!r}, but '
                f'must be one of {", ".join(possible)}'
            )


def expand(options):
    """One dict for each combination of the elements of all values that are lists.

    epoch_step is an exception: its value for a single run is a list already.
    """
    choices = []
    for name, value in options.items():
        values = value if isinstance(value, list) and name != 'epoch_step' else [value]
        choices.append([(name, one) for one in values])
    return [dict(combination) for combination in product(*choices)]
