"""Wording that the error messages of several readers share."""

from lab.errors import UserError


def missing_data(problem, remedy):
    """A UserError for missing or incomplete data. `remedy` says which files to put where."""
    return UserError(
        f'{problem}: {remedy}, or pass another folder with --dataroot '
        '(--dataset digits needs no download)'
    )


def one_line(error):
    """An exception's message on one line, cut after 160 characters."""
    text = ' '.join(str(error).split())
    return text if len(text) < 160 else text[:160] + ' ...'
