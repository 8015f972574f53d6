"""Train the embedded models again: `python recipes/seed_models.py seed-s --text DATA_FOLDER --into FOLDER`."""

import argparse
from pathlib import Path

import torch

from molehunt.cli.console import track_on_stderr
from molehunt.organism.seed_model import SEED_MODELS, train_seed_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=sorted(SEED_MODELS))
parser.add_argument("--text", type=Path, help="folder with the real text that the model card lists")
parser.add_argument("--into", type=Path, required=True)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
print(train_seed_model(SEED_MODELS[arguments.name], arguments.into, arguments.text, track_on_stderr))
