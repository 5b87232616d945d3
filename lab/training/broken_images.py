"""Image files that cannot be used: naming them, and stopping a run that has too many."""

from lab import distributed
from lab.errors import UserError, printable


class BrokenImages:
    """Names each broken image file once, and ends a run that has too many of them."""

    LIMIT = 0.01  # of the images of a pass

    def __init__(self, say=distributed.say, *batches):
        """say: prints a line; batches: Batches whose broken files are known, as they are in
        memory."""
        self.named, self.logged, self.say = set(), set(), say
        for known in batches:
            self.check(known)

    def report(self, batches):
        """Print the broken files of the last pass, in any process, that were not named before."""
        batches.broken = distributed.union(batches.broken)
        new = {path: text for path, text in batches.broken.items() if path not in self.named}
        for message in new.values():
            self.say(f'broken image: {message}')
        self.named.update(new)

    def stats(self, train_batches, test_batches):
        """What an epoch's log line says about broken files; nothing if there are none."""
        for batches in (train_batches, test_batches):
            self.report(batches)
        if not train_batches.broken and not test_batches.broken:
            return {}
        new = self.named - self.logged
        self.logged.update(new)
        return {
            'train_broken': len(train_batches.broken),
            'test_broken': len(test_batches.broken),
            'broken_images': sorted(new),
        }

    def check(self, batches):
        """Raise UserError if too many files were broken in the last pass."""
        self.report(batches)
        if len(batches.broken) > self.LIMIT * batches.n_files:
            again = 'start again' if batches.n_files > batches.n else 'resume with --resume'
            raise UserError(
                f'{len(batches.broken)} of {batches.n_files} image files could not be used, such '
                f'as {printable(next(iter(batches.broken)))}: fix or remove them, then {again}'
            )
