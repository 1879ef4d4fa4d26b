"""Several runs of train_eed.py in the same processes: arguments of all of them as JSON, a list per run."""
import json
import sys
from contextlib import contextmanager
from typing import Iterator
from unittest import mock

import torch.distributed as dist

import train_eed


@contextmanager
def one_process_group() -> Iterator[None]:
    """A launcher gives a job one process group; here it serves several runs."""
    dist.init_process_group('gloo')
    with mock.patch.object(dist, 'init_process_group'), mock.patch.object(dist, 'destroy_process_group'):
        yield
    dist.destroy_process_group()


if __name__ == '__main__':
    with one_process_group():
        for command in json.loads(sys.argv[1]):
            train_eed.main(command)
            dist.barrier()  # the next one may read what the first process wrote
