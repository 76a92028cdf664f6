"""All measurements that need a GPU, as one command of a few minutes: `make gpu`.

Each stage is one file; `run.py` runs them in order of importance and writes what they found after every case.
"""
