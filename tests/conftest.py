"""One thread for each test: results that do not depend on the machine, and fair use of it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
