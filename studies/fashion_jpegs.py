"""Write Fashion-MNIST as two folders of JPEG files, for studies of fine-tuning on image files.

    python -m studies.fashion_jpegs OUT DATAROOT    # DATAROOT has Fashion-MNIST's four files

OUT/source/ has the first five classes, with 1,000 training images each, OUT/target/ the other five,
with 50 each. Both have 400 test images per class. Images are enlarged from 28 to 64 pixels.
"""

import sys
from pathlib import Path

import cv2

from lab.data import datasets

PARTS = {'source': (range(5), 1000), 'target': (range(5, 10), 50)}
TEST_IMAGES, PIXELS = 400, 64


def write_images(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images.numpy()):
        enlarged = cv2.resize(image, (PIXELS, PIXELS), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{i:04}.jpg'), enlarged)


def main(out, dataroot):
    data = datasets.load('FashionMNIST', dataroot, download=False)
    for name, (classes, n_train) in PARTS.items():
        for part, (images, targets), n in (
            ('train', data.train, n_train),
            ('val', data.test, TEST_IMAGES),
        ):
            for index in classes:
                folder = Path(out, name, part, data.classes[index].replace('/', ' '))
                write_images(folder, images[targets == index][:n])


if __name__ == '__main__':
    main(*sys.argv[1:])
