"""The run of ``test_trainer``, killed after some steps: ``killed_run.py MODEL DIRECTORY STEPS``."""

import os
import signal
import sys

from slora_jax import load_base_model
from slora_jax.training import Trainer
from tests.training.runs import ADAPTER, RUN, random_examples


class KilledTrainer(Trainer):
    def step(self, batch):
        if self.step_number == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(batch)


base = load_base_model(sys.argv[1], progress=False)
KilledTrainer(base, ADAPTER, RUN).fit(random_examples(), directory=sys.argv[2], progress=False)
