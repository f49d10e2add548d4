"""fastsiam.train whose second rank never reaches its fourth step, and sleeps in a function called hang."""

import os
import sys
import time

from fastsiam.train import main
from fastsiam.training.step import TrainingStep


def hang():
    time.sleep(1000)


def step(self, views, number, indices, progress):
    if number == 4 and os.environ["RANK"] == "1":
        hang()
    return real(self, views, number, indices, progress)


if __name__ == "__main__":
    real, TrainingStep.__call__ = TrainingStep.__call__, step
    sys.exit(main())
