"""The documents: their commands run, their links and paths exist, their numbers are in the logs.

Conventions for README.md, CONTRIBUTING.md and docs/*.md: fenced blocks marked sh or python run
here, in order, in a folder that has an interrupted digits run in logs/RUN, and images. What matches
NOT_RUN needs a download, a GPU or minutes, and indented blocks are examples: of these only the
options are checked.
"""

import importlib
import importlib.util
import pkgutil
import re
import shlex
import shutil
from pathlib import Path
from statistics import median

import numpy as np
import pytest

import train
from conftest import ROOT, read_log
from diracparams import DATASETS
from lab.runs import checkpoint
from lab.training.options import build_parser, check_combination, complete, options_table, parse

DOCS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
README = (ROOT / 'README.md').read_text()
NOT_RUN = {
    'sh': re.compile(
        r'~/|/usr/|CIFAR|SVHN|ImageNet|FashionMNIST|--ngpu|torchrun|pytest|test\.py|NAME|'
        r'tools\.(benchmark|study)'
    ),
    'python': re.compile(r'diracnet(18|34).*pretrained=True|~/|torchvision'),
}
PLACEHOLDER = re.compile(r'NAME|\.\.\.')
TABLE = re.compile(r'<!-- options: .* -->\n(.*)\n<!-- end -->', re.DOTALL)

each_doc = pytest.mark.parametrize('path', DOCS, ids=lambda path: path.stem)


def fenced_blocks(text):
    """The (language, content) of each fenced block."""
    return re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The lines of a text, with continued lines joined, that call python or torchrun."""
    lines = text.replace('\\\n', ' ').splitlines()
    called = (line.strip().rpartition('&& ')[2] for line in lines)
    return [line for line in called if line.startswith(('python ', 'torchrun '))]


def inline_code(text):
    """What stands in backticks outside of blocks."""
    return re.findall(r'`([^`]+)`', re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.M))


def all_commands(text):
    return commands(text) + [code for code in inline_code(text) if code.startswith('python ')]


def run_command(line):
    """Run `python train.py ...` or `python -m tools.X ...` in this process."""
    words = shlex.split(line, comments=True)
    if words[1] == 'train.py':
        status = train.main(words[2:])
    else:
        assert words[1] == '-m', line
        is_package = (ROOT / words[2].replace('.', '/')).is_dir()
        name = f'{words[2]}.__main__' if is_package else words[2]
        status = importlib.import_module(name).main(words[3:])
    assert not status, line


# --- the README's size, its quick start and its numbers ----------------------------------------


def test_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1600


def test_quick_start():
    """.ci/run finds these two lines in the same way."""
    assert re.findall('^ *pip install -r requirements.txt && (.*)$', README, re.MULTILINE) == [
        'python train.py --dataset digits',
        'python -m pytest',
    ]


def measured_rows():
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in README.splitlines()]
    return [row for row in cells if row and row[-1].startswith('`logs/reference/')]


@pytest.mark.parametrize('row', measured_rows(), ids=lambda row: row[0])
def test_readme_numbers_are_in_the_logs(row):
    network, data, recipe, n, middle, bounds, runs = row
    epochs, _, recipe = recipe.partition(', ')
    options = dict(re.findall(r'(bn_init|recipe|dtype|lr|warmup) ([\w.]+)', f'{network} {recipe}'))
    assert options or recipe == 'defaults'
    folders = sorted(ROOT.glob(runs.strip('`')))
    last = [read_log(folder)[-1] for folder in folders]
    errors = [100 - line['test_acc'] for line in last]
    assert (n, middle) == (str(len(folders)), f'{median(errors):.2f}')
    assert bounds == f'{min(errors):.2f} to {max(errors):.2f}'
    for line in last:
        assert line['epoch'] == line['epochs'] == int(epochs) and line['holdout'] == 0
        source = Path(line['dataroot']).name if line['dataset'] == 'folder' else line['dataset']
        assert source.replace('-', '').lower() == re.sub('[-, ]|copy', '', data).lower()
        assert str(line['depth']) in re.findall(r'\d+', network)
        assert options == {name: str(line[name]) for name in options}
        assert ('shifted' in network) == (line.get('bn_init') == 'shifted')
        model = 'plain' if network.startswith('plain') else network.split('-')[0].lower()
        assert line['model'] == model


# --- links, paths and names --------------------------------------------------------------------


@each_doc
def test_links_exist(path):
    text = path.read_text()
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if link.startswith(('http://', 'https://')):
            continue
        file_name, _, anchor = link.partition('#')
        target = path.parent / file_name if file_name else path
        assert target.exists(), link
        if anchor:
            titles = re.findall('^#+ (.*)$', target.read_text(), re.MULTILINE)
            anchors = [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles]
            assert anchor in anchors, link


@each_doc
def test_paths_and_names_exist(path):
    for code in inline_code(path.read_text()):
        is_path = re.fullmatch(
            r'(lab|tools|tests|studies|docs|logs/reference|\.ci)/[\w./*-]*', code
        )
        if is_path or re.fullmatch(r'\w+\.py', code):
            pattern = code.replace('NAME', '*').rstrip('/')
            assert list(ROOT.glob(pattern)), code
        elif re.fullmatch(r'(lab|tools)(\.\w+)+', code):
            pkgutil.resolve_name(code)


@each_doc
def test_options_exist(path):
    """A flag in backticks is one of train.py's, unless the line is about another program."""
    flags = re.findall(r'--[a-zA-Z]\w*', build_parser('').format_help())
    sources = ''.join(source.read_text() for source in ROOT.glob('tools/**/*.py'))
    others = re.findall(r"'(--[\w-]+)'", sources)
    known = {*flags, *others, '--max-restarts'}
    for code in inline_code(path.read_text()):
        for flag in re.findall(r'(?<!\S)--[a-zA-Z][\w-]*', code):
            assert flag in known, code


# --- commands ----------------------------------------------------------------------------------


@each_doc
def test_command_lines_of_train_parse(path):
    for line in all_commands(path.read_text()):
        words = shlex.split(line, comments=True)
        if 'train.py' in words and '--help' not in words and not PLACEHOLDER.search(line):
            given = parse(words[words.index('train.py') + 1 :])
            check_combination(complete(given))


def tools_in_docs():
    texts = (path.read_text() for path in DOCS)
    return sorted({name for text in texts for name in re.findall(r'-m (tools\.\w+)', text)})


@pytest.mark.parametrize('name', tools_in_docs())
def test_help_of_tools(name, capsys):
    is_package = importlib.util.find_spec(name).submodule_search_locations is not None
    module = importlib.import_module(f'{name}.__main__' if is_package else name)
    with pytest.raises(SystemExit) as end:
        module.main(['--help'])
    assert not end.value.code
    assert 'usage' in capsys.readouterr().out


@pytest.fixture(scope='module')
def interrupted_run(tmp_path_factory):
    """The folder of a run that has finished one of two epochs."""
    folder = tmp_path_factory.mktemp('docs') / 'RUN'
    line = 'python train.py --dataset digits --depth 10 --epochs 2 --epoch_step [2] --save'
    run_command(f'{line} {shlex.quote(str(folder))}')
    (folder / checkpoint.PREVIOUS).replace(folder / checkpoint.FILE_NAME)
    return folder


@pytest.fixture
def workspace(interrupted_run, tmp_path, monkeypatch):
    """The current folder, with what the documents name: logs/RUN and images."""
    import cv2

    random = np.random.default_rng(0)
    (tmp_path / 'photos').mkdir()
    for name in ('photo.jpg', 'digit.png', 'photos/1.jpg', 'photos/2.jpg'):
        cv2.imwrite(str(tmp_path / name), random.integers(0, 256, (32, 24, 3)).astype(np.uint8))
    shutil.copytree(interrupted_run, tmp_path / 'logs' / 'RUN')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(path):
    """The (language, text) of what runs here: python blocks, and lines of sh blocks."""
    runs = []
    for language, block in fenced_blocks(path.read_text()):
        parts = commands(block) if language == 'sh' else [block]
        if language in NOT_RUN:
            runs += [(language, part) for part in parts if not NOT_RUN[language].search(part)]
    return runs


@each_doc
def test_blocks_run(path, workspace, interrupted_run):
    for language, text in runnable(path):
        if language == 'python':
            exec(compile(text, path.name, 'exec'), {})
        else:
            if '--resume' in text:
                shutil.copytree(interrupted_run, workspace / 'logs' / 'RUN', dirs_exist_ok=True)
            run_command(text)


# --- what is generated -------------------------------------------------------------------------


def test_table_of_options_is_current():
    """Only an option that is new may be missing."""
    rows = TABLE.search((ROOT / 'docs' / 'training.md').read_text())[1].splitlines()
    current = options_table().splitlines()
    assert rows == [row for row in current if row in rows], 'paste: python -m lab.training.options'


def test_recipes_are_those_of_the_options():
    text = (ROOT / 'docs' / 'training.md').read_text()
    rows = re.findall(r'^\| (`\w+`.*) \| DiracNet-(\d+)-1 \| (\d+; .*) \|$', text, re.MULTILINE)
    recipes = {name: row[1:] for row in rows for name in re.findall('`(.*?)`', row[0])}
    assert set(recipes) == {*DATASETS, 'folder --form cifar'}
    for name, recipe in recipes.items():
        options = complete(parse(['--dataset', *name.split()]))
        falls = ', '.join(map(str, options['epoch_step']))
        rate = f'{options["lr"]:g}, times {options["lr_decay_ratio"]:g} at epochs {falls}'
        assert recipe == (str(options['depth']), f'{options["epochs"]}; {rate}')
