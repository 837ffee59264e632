"""What the loop of train.py leans on: configuration, ranks, optimiser, FLOPs, records of a run."""
