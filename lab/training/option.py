"""What the table of options says of each option of train.py."""

import json
from dataclasses import dataclass, field

UNSET = object()  # the default of an option that a run has only if the user gives it


@dataclass(frozen=True)
class Option:
    """One option of train.py.

    `defaults` overrides `default` for some runs. A key is one or more words, each a data set, a
    form of network (cifar, imagenet), a model, an optimizer, a recipe, pretrained, no_mirror, or
    bfloat16-instructions, if the machine has them. It applies to the runs that match all its words;
    if several keys apply, the last one counts.
    """

    name: str
    help: str
    default: object = UNSET
    defaults: dict = field(default_factory=dict)
    type: object = None  # converts the text; bool: a flag without a value
    alone: object = None  # the value of the flag without one
    choices: tuple = None
    metavar: str = None
    aliases: tuple = ()
    models: tuple = None  # the only models that have it
    free_on_resume: bool = False  # a resumed run may change it
    bound_to_machine: bool = False  # a resumed run does not inherit it from the checkpoint

    def default_for(self, facts):
        """The default for a run with these facts: the words of `defaults`."""
        found = self.default
        for words, value in self.defaults.items():
            if set(words.split()) <= facts:
                found = value
        return found

    def describe_default(self):
        """The defaults in words; '' if there is none."""
        defaults = {'': self.default, **self.defaults}
        texts = [
            f'{words} {_as_text(value)}'.strip()
            for words, value in defaults.items()
            if value is not UNSET and value is not None and value is not False
        ]
        return ', '.join(texts)


def _as_text(value):
    if isinstance(value, list):
        return json.dumps(value, separators=(',', ':'))
    return f'{value:g}' if isinstance(value, float) else str(value)
