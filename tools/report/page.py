"""The page of a report, from its content."""

from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).with_name('page.html')


def render(content):
    """The HTML of a tools.report.content.Content. All texts are escaped."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text('utf-8')).render(vars(content))
