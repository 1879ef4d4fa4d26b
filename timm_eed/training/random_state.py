"""The state of all random number generators of a process, as tensors, so that checkpoints need no pickled objects."""
import random
from typing import Dict, List

import numpy as np
import torch
import torch.distributed as dist

__all__ = ['RandomState', 'gather_random_states', 'get_random_state', 'set_random_state']

RandomState = Dict[str, torch.Tensor]


def get_random_state() -> RandomState:
    """States of Python's, NumPy's and PyTorch's generators, and of the current GPU's."""
    _, python, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        'python': torch.tensor(python, dtype=torch.int64),
        'python_gauss': torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        'numpy': torch.tensor(np.asarray(keys, dtype=np.int64)),
        'numpy_position': torch.tensor([position, has_gauss], dtype=torch.int64),
        'numpy_gauss': torch.tensor([cached], dtype=torch.float64),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Continue where `get_random_state` was called."""
    gauss = state['python_gauss'].tolist()
    random.setstate((3, tuple(state['python'].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state['numpy_position'].tolist()
    np.random.set_state(
        ('MT19937', state['numpy'].numpy().astype(np.uint32), position, has_gauss, state['numpy_gauss'].item()))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def gather_random_states(state: RandomState) -> List[RandomState]:
    """The states of all processes, by rank; to be called by all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [state]
    states: List[RandomState] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states
